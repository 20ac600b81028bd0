"""Encoders: what turns texts into vectors. `load_encoder` gives the encoder that a profile asks for.

The pipeline, searches, model changes and the command line call it; nothing else loads a model.
"""

import importlib

from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.encoders.base import Encoder
from embeddings_pipeline.errors import PipelineError, ProfileError
from embeddings_pipeline.forks import ProcessLock, compute

__all__ = ["Encoder", "load_encoder"]

_loaded: dict[Profile, Encoder] = {}
_lock = ProcessLock()


def load_encoder(profile: Profile) -> Encoder:
    """The encoder of a profile; equal profiles share one in a process, so a model is in memory once.

    Raises ProfileError if the model cannot be had, cannot be loaded, or gives vectors of another length.
    """
    with _lock:
        if profile not in _loaded:
            _loaded[profile] = compute(_load, profile)
        return _loaded[profile]


def _load(profile: Profile) -> Encoder:
    if profile.provider == "local":
        from embeddings_pipeline.encoders.local import LocalEncoder

        return LocalEncoder(profile)
    if profile.provider == "python":
        return _load_class(profile)
    raise ProfileError(
        f"Profile {profile.name}: provider {profile.provider} is not available in this version yet; use a local "
        "profile (minilm, speed, quality), or provider python with an encoder class of your own"
    )


def _load_class(profile: Profile) -> Encoder:
    module_name, separator, class_name = profile.model.partition(":")
    if not (module_name and separator and class_name):
        raise ProfileError(
            f"Profile {profile.name}: provider python wants model package.module:Class, not {profile.model!r}"
        )
    try:
        encoder: Encoder = getattr(importlib.import_module(module_name), class_name)(profile)
    except PipelineError:
        raise
    except Exception as error:
        raise ProfileError(f"Profile {profile.name}: {profile.model} cannot be loaded: {error}") from error
    if encoder.dimensions != profile.dimensions:
        raise ProfileError(
            f"Profile {profile.name}: {profile.model} gives {encoder.dimensions} dimensions, the profile says "
            f"{profile.dimensions}"
        )
    return encoder
