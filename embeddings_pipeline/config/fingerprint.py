"""The fingerprint of a profile: a short hash of all that changes stored vectors, and of nothing else."""

import hashlib
import json
from pathlib import Path

from embeddings_pipeline.config.model_words import with_model_prompts
from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.config.weights import resolve_weights, weights_digest
from embeddings_pipeline.errors import ProfileError


def fingerprint(profile: Profile, state_dir: Path | None = None) -> str:
    """12 hex characters that differ whenever the profile's document vectors could differ.

    BLAKE2b over provider, weights, dimensions, normalisation, document prompt, maximum length, attention, and whether
    weights are in 8 bits. The weights of a local model are the contents of its files, its own prompts among them,
    wherever they lie; of other providers, the model's name and revision. The document prompt is the one that is used,
    the profile's or the model's own. Left out: a profile's query prompt (stored vectors do not know it), device,
    precision and batch settings.

    With `state_dir`, digests of files are taken from `weights_digests.json` there, by path, size and times of the last
    change, so that a model of gigabytes is read once; `keep_digests` writes that file. Raises ProfileError where the
    weights cannot be had, or the model is refused (see `model_words`).
    """
    if profile.provider == "local":
        profile = with_model_prompts(profile)
        folder = resolve_weights(profile)
        try:
            weights = weights_digest(folder, code=profile.trust_remote_code, state_dir=state_dir)
        except OSError as error:
            raise ProfileError(
                f"Profile {profile.name}: the files in {folder} cannot be read: {error}; mend that, or fetch them again"
            ) from error
    else:
        weights = f"{profile.model}@{profile.revision or ''}"
    parts: dict[str, object] = {
        "provider": profile.provider,
        "weights": weights,
        "dimensions": profile.dimensions,
        "normalize": profile.normalize,
        "document_prompt": profile.document_prompt,
        "max_length": profile.max_length,
        "bidirectional": profile.bidirectional,
    }
    if profile.weights is not None:  # left out otherwise, as in fingerprints from before there was a choice
        parts["weights_in"] = profile.weights
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=6).hexdigest()
