"""Encoders: what turns texts into vectors. `load_encoder` gives the encoder that a profile asks for.

The pipeline, searches, model changes and the command line call it; nothing else loads a model.
"""

from embeddings_pipeline.config.model_words import with_model_prompts
from embeddings_pipeline.config.prices import is_paid
from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.encoders.base import Encoder
from embeddings_pipeline.encoders.processor import is_cpu, share_of_cores
from embeddings_pipeline.forks import ProcessLock, compute

__all__ = ["PROVIDERS", "Encoder", "load_encoder"]

PROVIDERS = ("local", "openai", "python")  # those that `load_encoder` knows

_loaded: dict[tuple[Profile, Settings | None], Encoder] = {}
_lock = ProcessLock()


def load_encoder(profile: Profile, settings: Settings) -> Encoder:
    """The encoder of a profile; equal profiles share one in a process, so a model is in memory once.

    `settings`: where a local model's converted files are kept, and where a hosted one finds its key, its address, its
    limits and its database. A local model on a processor is run by OpenVINO, if it can be; else by torch. Raises
    ProfileError if the model cannot be had, cannot be loaded, or gives vectors of another length.
    """
    profile = with_model_prompts(profile)
    key = profile, settings if is_paid(profile) else None
    with _lock:
        if key not in _loaded:
            _loaded[key] = compute(_load, profile, settings)
        return _loaded[key]


def _load(profile: Profile, settings: Settings) -> Encoder:
    if profile.provider == "openai":
        from embeddings_pipeline.encoders.hosted import HostedEncoder

        return HostedEncoder(profile, settings)
    if profile.provider == "python":
        from embeddings_pipeline.encoders.own import OwnEncoder

        return OwnEncoder(profile, enabled=settings.embedding_enabled is not False or not is_paid(profile))
    if profile.weights is not None or is_cpu(profile):
        from embeddings_pipeline.encoders.conversion import openvino_encoder

        if encoder := openvino_encoder(profile, settings):
            return encoder
    from embeddings_pipeline.encoders.local import LocalEncoder

    return LocalEncoder(profile, threads=settings.embedding_threads or share_of_cores())
