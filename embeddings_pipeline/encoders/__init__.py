"""Encoders: what turns texts into vectors. `load_encoder` gives the encoder that a profile asks for.

The pipeline, searches, model changes and the command line call it; nothing else loads a model.
"""

from embeddings_pipeline.config.model_words import with_model_prompts
from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.encoders.base import Encoder
from embeddings_pipeline.errors import ProfileError
from embeddings_pipeline.forks import ProcessLock, compute

__all__ = ["PROVIDERS", "Encoder", "load_encoder"]

PROVIDERS = ("local", "python")  # those that `load_encoder` knows

_loaded: dict[Profile, Encoder] = {}
_lock = ProcessLock()


def load_encoder(profile: Profile) -> Encoder:
    """The encoder of a profile; equal profiles share one in a process, so a model is in memory once.

    Raises ProfileError if the model cannot be had, cannot be loaded, or gives vectors of another length.
    """
    profile = with_model_prompts(profile)
    with _lock:
        if profile not in _loaded:
            _loaded[profile] = compute(_load, profile)
        return _loaded[profile]


def _load(profile: Profile) -> Encoder:
    if profile.provider == "local":
        from embeddings_pipeline.encoders.local import LocalEncoder

        return LocalEncoder(profile)
    if profile.provider == "python":
        from embeddings_pipeline.encoders.own import OwnEncoder

        return OwnEncoder(profile)
    raise ProfileError(
        f"Profile {profile.name}: provider {profile.provider} is not available in this version yet; use a local "
        "profile (minilm, speed, quality), or provider python with an encoder class of your own"
    )
