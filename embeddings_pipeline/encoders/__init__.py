"""Encoders: what turns texts into vectors. `load_encoder` gives the encoder that a profile asks for.

The pipeline, searches, model changes and the command line call it; nothing else loads a model.
"""

from embeddings_pipeline.config.model_words import with_model_prompts
from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.config.settings import Settings, load_settings
from embeddings_pipeline.encoders.base import Encoder
from embeddings_pipeline.forks import ProcessLock, compute

__all__ = ["PROVIDERS", "Encoder", "load_encoder"]

PROVIDERS = ("local", "openai", "python")  # those that `load_encoder` knows

_loaded: dict[tuple[Profile, Settings | None], Encoder] = {}
_lock = ProcessLock()


def load_encoder(profile: Profile, settings: Settings | None = None) -> Encoder:
    """The encoder of a profile; equal profiles share one in a process, so a model is in memory once.

    `settings`: where a hosted model finds its key, its address, its limits and its database; left out, the
    environment's. Raises ProfileError if the model cannot be had, cannot be loaded, or gives vectors of another length.
    """
    profile = with_model_prompts(profile)
    hosted = (settings or load_settings()) if profile.provider == "openai" else None
    with _lock:
        if (profile, hosted) not in _loaded:
            _loaded[profile, hosted] = compute(_load, profile, hosted)
        return _loaded[profile, hosted]


def _load(profile: Profile, settings: Settings | None) -> Encoder:
    if settings is not None:
        from embeddings_pipeline.encoders.hosted import HostedEncoder

        return HostedEncoder(profile, settings)
    if profile.provider == "python":
        from embeddings_pipeline.encoders.own import OwnEncoder

        return OwnEncoder(profile)
    from embeddings_pipeline.encoders.local import LocalEncoder

    return LocalEncoder(profile)
