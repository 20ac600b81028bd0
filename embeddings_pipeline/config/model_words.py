"""What a local model's own files say of its use: prompts, measure, length, modules. Read without loading the model.

The rules are those of sentence-transformers 6: queries get the prompt `query`, texts the prompt `document`
(`encode_query`, `encode_document`), and a folder without modules.json is a transformer with a pooling that is guessed.
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.config.weights import ModelFileError, read_json, read_object, resolve_weights
from embeddings_pipeline.errors import ProfileError

NO_LIMIT = 1_000_000_000  # a tokenizer without a limit says 10^30
SHOWN = 80  # characters of a prompt in a line
LENGTH_FILES = ["sentence_bert_config.json"] + [
    f"sentence_{kind}_config.json" for kind in ("roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
]
LEGACY_POOLING = {  # keys of a Pooling's config.json before sentence-transformers 5
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
SAME_ORDER = ("dot", "euclidean")  # of unit vectors, as by cosine


@dataclass(frozen=True)
class ModelWords:
    """What a model's files say; a guess of sentence-transformers where they are silent about the pooling."""

    modules: tuple[str, ...] = ()  # kinds, in order: Transformer, Pooling, Dense, Normalize …
    pooling: str | None = None  # None: no Pooling module
    pooling_guessed: str | None = None  # why, if it is a guess
    prompts: Mapping[str, str] = field(default_factory=dict)  # those that are not empty, by name
    default_prompt_name: str | None = None
    similarity: str = "cosine"
    max_length: int | None = None  # tokens; None: no limit
    truncate_dim: int | None = None

    @property
    def query_prompt(self) -> str:
        return self.prompts.get("query", "")

    @property
    def document_prompt(self) -> str:
        return self.prompts.get("document", "")

    @property
    def normalizes(self) -> bool:
        """Whether the model itself makes its vectors unit length."""
        return self.modules[-1:] == ("Normalize",) and self.truncate_dim is None

    def unused_prompts(self, profile: Profile) -> list[str]:
        """Names of prompts that seem meant for texts or for all, which sentence-transformers gives to neither."""
        names = ["passage", "corpus"] if profile.document_prompt is None and not self.document_prompt else []
        if profile.document_prompt is None or profile.query_prompt is None:
            names += [self.default_prompt_name or ""]
        return [name for name in dict.fromkeys(names) if name in self.prompts and name not in ("query", "document")]


def model_words(profile: Profile) -> ModelWords:
    """What the files of a local profile's model say.

    Raises ProfileError, in one line, if they cannot be had or are broken, or if they name a measure that searches here
    do not go by: dot and euclidean order vectors as cosine does only if these are of unit length.
    """
    folder = resolve_weights(profile)
    try:
        files = sorted([*folder.glob("*.json"), *folder.glob("*/*.json")])
        words = _read(folder, tuple((path, path.stat().st_mtime_ns, path.stat().st_size) for path in files))
    except ModelFileError as error:
        raise ProfileError(f"Profile {profile.name}: {error}") from error
    if words.similarity != "cosine" and not _ordered_as_by_cosine(words) and profile.similarity is None:
        raise ProfileError(
            f"Profile {profile.name}: the files of {profile.model} say that its vectors are compared by "
            f"{words.similarity}, and searches here compare by cosine, which gives another order; use a model that was "
            "made for cosine, or add `similarity: cosine` to the profile to search with this one all the same"
        )
    return words


def with_model_prompts(profile: Profile) -> Profile:
    """The profile with the model's own prompts where it says nothing. Raises ProfileError as `model_words`."""
    if profile.provider != "local":
        return profile
    words = model_words(profile)
    return replace(
        profile,
        query_prompt=words.query_prompt if profile.query_prompt is None else profile.query_prompt,
        document_prompt=words.document_prompt if profile.document_prompt is None else profile.document_prompt,
    )


def differences(profile: Profile, words: ModelWords) -> list[str]:
    """Where the profile and the model's own files both speak and differ, the profile's word first, which counts."""
    differ = []
    for key in ("query_prompt", "document_prompt"):
        said, own = getattr(profile, key), getattr(words, key)
        if said is not None and own and said != own:
            differ.append(f"{key} is {quoted(said)}, the model's own is {quoted(own)}")
    if profile.max_length is not None and words.max_length is not None and profile.max_length != words.max_length:
        differ.append(f"max_length is {profile.max_length:,} tokens, the model's own is {words.max_length:,}")
    if not profile.normalize and words.normalizes:
        differ.append("normalize is false, and the model normalises by itself, so vectors are of unit length")
    if profile.similarity and profile.similarity != words.similarity and not _ordered_as_by_cosine(words):
        differ.append(f"similarity is {profile.similarity}, the model's own is {words.similarity}")
    return differ


def other_settings(declared: Profile, current: Profile) -> str:
    """What makes other vectors of the declared profile than of the current one: `document_prompt "passage: ", not ""`.

    Empty if it is the weights. Raises ProfileError as `model_words`.
    """
    declared, current = with_model_prompts(declared), with_model_prompts(current)
    keys = ("document_prompt", "max_length", "normalize", "dimensions", "bidirectional", "weights")
    return ", ".join(
        f"{key} {json.dumps(getattr(declared, key))}, not {json.dumps(getattr(current, key))}"
        for key in keys
        if getattr(declared, key) != getattr(current, key)
    )


def model_warning(profile: Profile) -> str | None:
    """One line about all that a person should know of how the model is used here; None if there is nothing.

    Raises ProfileError as `model_words`.
    """
    if profile.provider != "local":
        return None
    words = model_words(profile)
    says = []
    if words.pooling_guessed:
        says.append(
            f"its pooling ({words.pooling}) is a guess, because {words.pooling_guessed}: compare it with the model's "
            "card, and use a folder that sentence-transformers has saved if the card names another"
        )
    if differ := differences(profile, words):
        says.append(f"the profile counts where it and the model's files differ: {', '.join(differ)}")
    for name in words.unused_prompts(profile):
        prompt = quoted(words.prompts[name])
        says.append(
            f"its prompt {name!r} ({prompt}) is put before nothing, as in encode_document and encode_query; "
            f'`document_prompt: {prompt}` puts it before each text, `document_prompt: ""` with `query_prompt` ends '
            "this warning"
        )
    return f"Profile {profile.name} ({profile.model}): {'; '.join(says)}" if says else None


def quoted(prompt: str) -> str:
    """A prompt on one line, in double quotes, its end cut off if it is long."""
    return json.dumps(prompt if len(prompt) <= SHOWN else prompt[: SHOWN - 1] + "…", ensure_ascii=False)


def _ordered_as_by_cosine(words: ModelWords) -> bool:
    return words.normalizes and words.similarity in SAME_ORDER


@functools.lru_cache(maxsize=64)
def _read(folder: Path, files: tuple[tuple[Path, int, int], ...]) -> ModelWords:
    """What the folder's files say; `files`, their paths, times and sizes, so that what has changed is read again."""
    says = folder / "config_sentence_transformers.json"
    config = read_object(says)
    if not (folder / "modules.json").exists():
        ignored = ", so its prompts are not read either" if config.get("prompts") else ""
        return _guessed(folder, f"the folder has no modules.json{ignored}")
    kind = config.get("model_type", "SentenceTransformer")
    if kind != "SentenceTransformer":
        return _guessed(folder, f"{says} says that it is a {kind}")
    modules = _modules(folder / "modules.json")
    first = folder / modules[0][1]
    length = _length(next((said for name in LENGTH_FILES if (said := read_object(first / name))), {}))
    return ModelWords(
        modules=tuple(name for name, _ in modules),
        pooling=_pooling(folder, modules),
        prompts=_prompts(says, config),
        default_prompt_name=config.get("default_prompt_name"),
        similarity=_similarity(says, config),
        max_length=_limit(length) if length is not None else _tokenizer_limit(first),
        truncate_dim=config.get("truncate_dim"),
    )


def _guessed(folder: Path, why: str) -> ModelWords:
    config = read_object(folder / "config.json")
    architecture = str((config.get("architectures") or [""])[0])
    causal = architecture.endswith("ForCausalLM") and config.get("is_causal", True)
    pooling = "lasttoken" if causal else "mean"
    return ModelWords(("Transformer", "Pooling"), pooling, why, max_length=_tokenizer_limit(folder))


def _modules(path: Path) -> list[tuple[str, str]]:
    """Kind and folder of each module."""
    modules = read_json(path)
    if not isinstance(modules, list) or not modules:
        raise ModelFileError(f"{path} holds no list of modules; fetch it again")
    for module in modules:
        if not isinstance(module, dict) or not all(isinstance(module.get(key), str) for key in ("type", "path")):
            raise ModelFileError(f"{path}: a module has no `type` or no `path`; fetch it again")
    return [(module["type"].rsplit(".", 1)[-1], module["path"]) for module in modules]


def _pooling(folder: Path, modules: list[tuple[str, str]]) -> str | None:
    for name, place in modules:
        if name != "Pooling":
            continue
        path = folder / place / "config.json"
        if not path.exists():
            raise ModelFileError(f"{folder}/modules.json names a Pooling, and {path} is missing; fetch it again")
        config = read_object(path)
        modes = config.get("pooling_mode", [mode for key, mode in LEGACY_POOLING.items() if config.get(key)])
        modes = [modes] if isinstance(modes, str) else modes or ["mean"]
        without = "" if config.get("include_prompt", True) else ", without the prompt"
        return " and ".join(map(str, modes)) + without
    return None


def _prompts(path: Path, config: Mapping[str, Any]) -> dict[str, str]:
    prompts = config.get("prompts", {})
    if not isinstance(prompts, dict) or not all(isinstance(prompt, str | None) for prompt in prompts.values()):
        raise ModelFileError(f"{path}: `prompts` is no mapping of names to texts; mend it, or fetch it again")
    default = config.get("default_prompt_name")
    if default is not None and default not in {*prompts, "query", "document"}:
        raise ModelFileError(
            f"{path}: `default_prompt_name` is {default!r}, and the prompts are {', '.join(prompts) or 'none'}; mend it"
        )
    return {name: prompt for name, prompt in prompts.items() if prompt}


def _similarity(path: Path, config: Mapping[str, Any]) -> str:
    measure = config.get("similarity_fn_name") or "cosine"
    if not isinstance(measure, str):
        raise ModelFileError(f"{path}: `similarity_fn_name` is no name; mend it, or fetch it again")
    return measure


def _length(config: Mapping[str, Any]) -> Any:
    if config.get("max_seq_length") is not None:
        return config["max_seq_length"]
    arguments = config.get("processor_kwargs") or config.get("tokenizer_args")
    return arguments.get("model_max_length") if isinstance(arguments, dict) else None


def _tokenizer_limit(folder: Path) -> int | None:
    """As transformers has it: the tokenizer's own limit, and no more than the model has positions."""
    limits = [
        read_object(folder / "tokenizer_config.json").get("model_max_length"),
        read_object(folder / "config.json").get("max_position_embeddings"),
    ]
    return min((limit for value in limits if (limit := _limit(value)) is not None), default=None)


def _limit(value: Any) -> int | None:
    return int(value) if isinstance(value, int | float) and 0 < value < NO_LIMIT else None
