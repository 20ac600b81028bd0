"""What `profile test` says of how a local model is used: its own words, the profile's, and what comes of them."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from embeddings_pipeline.config.profiles import Profile
    from embeddings_pipeline.config.settings import Settings

SAME_COSINE = 0.9999  # to sentence-transformers in float32; 16-bit products keep it
SAME_COSINE_IN_8_BITS = 0.99


def described(profile: "Profile", settings: "Settings") -> dict[str, Any]:
    """Prompts, tokens read, measure, modules, and the cosines to `encode_document` and `encode_query`.

    Nothing for a profile that is not local. Raises ProfileError.
    """
    if profile.provider != "local":
        return {}
    from embeddings_pipeline.config.model_words import differences, model_warning, model_words, with_model_prompts
    from embeddings_pipeline.encoders import load_encoder
    from embeddings_pipeline.encoders.base import tokens_read
    from embeddings_pipeline.encoders.comparison import compare
    from embeddings_pipeline.pipeline.canaries import CANARIES

    words = model_words(profile)
    encoder = load_encoder(profile, settings)
    used = with_model_prompts(profile)
    length = tokens_read(encoder, used)
    longer = "a word more " * min(length or 256, 4096)  # than the model reads
    likeness = compare(profile, encoder, [*CANARIES, longer])
    return {
        "document_prompt": used.document_prompt,
        "document_prompt_of": _whose(profile.document_prompt, words.document_prompt),
        "query_prompt": used.query_prompt,
        "query_prompt_of": _whose(profile.query_prompt, words.query_prompt),
        "other_prompts": {name: text for name, text in words.prompts.items() if name not in ("query", "document")},
        "default_prompt_name": words.default_prompt_name,
        "max_length": length,
        "max_length_of": _whose(profile.max_length, length),
        "similarity": words.similarity,
        "modules": list(words.modules),
        "pooling": words.pooling,
        "pooling_guessed": words.pooling_guessed,
        "normalized_by": "model" if words.normalizes else "profile" if profile.normalize else None,
        "cosine_to_encode_document": likeness.documents,
        "cosine_to_encode_query": likeness.queries,
        "as_sentence_transformers": min(likeness) >= (SAME_COSINE_IN_8_BITS if profile.weights else SAME_COSINE),
        "differences": differences(profile, words),
        "warning": model_warning(profile),
    }


def description_lines(result: dict[str, Any]) -> list[str]:
    """What `described` found, a line each."""
    if "modules" not in result:
        return []
    from embeddings_pipeline.config.model_words import quoted

    whose = {"profile": "  (the profile's)", "model": "  (the model's own)", None: ""}
    length = "all" if result["max_length"] is None else f"{result['max_length']:,} tokens of a text"
    rows = [
        (kind.replace("_", " "), f"{quoted(result[kind]) if result[kind] else 'none'}{whose[result[f'{kind}_of']]}")
        for kind in ("document_prompt", "query_prompt")
    ]
    if result["other_prompts"]:
        default = result["default_prompt_name"]
        names = ", ".join(f"{name} (default)" if name == default else name for name in result["other_prompts"])
        rows.append(("prompts not used", names))
    guess = f"  (a guess: {result['pooling_guessed']})" if result["pooling_guessed"] else ""
    normalized = {"model": "by the model", "profile": "by the profile", None: "no"}[result["normalized_by"]]
    rows += [
        ("reads", f"{length}{whose[result['max_length_of']]}"),
        ("measure", f"{result['similarity']}{'' if result['similarity'] == 'cosine' else ', searched by cosine'}"),
        ("modules", " > ".join(result["modules"])),
        ("pooling", f"{result['pooling'] or 'none'}{guess}"),
        ("unit length", normalized),
        ("cosine to encode_document", f"{result['cosine_to_encode_document']:.6f} or more"),
        ("cosine to encode_query", f"{result['cosine_to_encode_query']:.6f} or more"),
    ]
    lines = [f"{name:<28}  {value}" for name, value in rows]
    return lines + ([f"warning: {result['warning']}"] if result["warning"] else [])


def _whose(said: object, own: object) -> str | None:
    return "profile" if said is not None else "model" if own else None
