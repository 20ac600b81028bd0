"""Encoders: what turns texts into vectors. `load_encoder` gives the encoder that a profile asks for.

The pipeline, searches, model changes and the command line call it; nothing else loads a model.
"""

from embeddings_pipeline.config.model_words import with_model_prompts
from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.encoders.base import Encoder
from embeddings_pipeline.encoders.processor import is_cpu, share_of_cores
from embeddings_pipeline.errors import ProfileError
from embeddings_pipeline.forks import ProcessLock, compute

__all__ = ["PROVIDERS", "Encoder", "load_encoder"]

PROVIDERS = ("local", "python")  # those that `load_encoder` knows

_loaded: dict[Profile, Encoder] = {}
_lock = ProcessLock()


def load_encoder(profile: Profile, settings: Settings) -> Encoder:
    """The encoder of a profile; equal profiles share one in a process, so a model is in memory once.

    A local model on a processor is run by OpenVINO, if it can be; else by torch. Raises ProfileError if the model
    cannot be had, cannot be loaded, or gives vectors of another length.
    """
    profile = with_model_prompts(profile)
    with _lock:
        if profile not in _loaded:
            _loaded[profile] = compute(_load, profile, settings)
        return _loaded[profile]


def _load(profile: Profile, settings: Settings) -> Encoder:
    if profile.provider == "local":
        return _load_local(profile, settings)
    if profile.provider == "python":
        from embeddings_pipeline.encoders.own import OwnEncoder

        return OwnEncoder(profile)
    raise ProfileError(
        f"Profile {profile.name}: provider {profile.provider} is not available in this version yet; use a local "
        "profile (minilm, speed, quality), or provider python with an encoder class of your own"
    )


def _load_local(profile: Profile, settings: Settings) -> Encoder:
    if is_cpu(profile):
        from embeddings_pipeline.encoders.conversion import openvino_encoder

        if encoder := openvino_encoder(profile, settings):
            return encoder
    from embeddings_pipeline.encoders.local import LocalEncoder

    return LocalEncoder(profile, threads=settings.embedding_threads or share_of_cores())
