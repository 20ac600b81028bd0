"""Encoders: what turns texts into vectors. `load_encoder` gives the encoder that a profile asks for.

The pipeline, searches, model changes and the command line call it; nothing else loads a model.
"""

from dataclasses import dataclass

from embeddings_pipeline.config.fingerprint import fingerprint
from embeddings_pipeline.config.model_words import with_model_prompts
from embeddings_pipeline.config.prices import is_paid
from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.encoders.base import Encoder
from embeddings_pipeline.encoders.processor import is_cpu, share_of_cores
from embeddings_pipeline.errors import OutageError
from embeddings_pipeline.forks import ProcessLock, compute

__all__ = ["PROVIDERS", "Encoder", "Loaded", "load", "load_encoder"]

PROVIDERS = ("local", "openai", "python")  # those that `load_encoder` knows


@dataclass(frozen=True)
class Loaded:
    """A model that is in memory, and the fingerprint by what its files held when it was read."""

    encoder: Encoder
    fingerprint: str


_loaded: dict[tuple[Profile, Settings | None], Loaded] = {}
_lock = ProcessLock()


def load_encoder(profile: Profile, settings: Settings) -> Encoder:
    """The encoder of a profile; equal profiles share one in a process, so a model is in memory once. If its files are
    others by now, it is loaded anew.

    `settings`: where a local model's converted files are kept, and where a hosted one finds its key, its address, its
    limits and its database. A local model on a processor is run by OpenVINO, if it can be; else by torch. Raises
    ProfileError if the model cannot be had, cannot be loaded, or gives vectors of another length.
    """
    return load(profile, settings).encoder


def load(profile: Profile, settings: Settings) -> Loaded:
    """As `load_encoder`, with the fingerprint of what was loaded."""
    profile = with_model_prompts(profile)
    key = profile, settings if is_paid(profile) else None
    with _lock:
        known, now = _loaded.get(key), fingerprint(profile, settings.state_dir)
        while known is None or known.fingerprint != now:  # the files may change while they are read
            known = Loaded(compute(_load, profile, settings), now)
            now = fingerprint(profile, settings.state_dir)
        _loaded[key] = known
        return known


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
    try:
        from embeddings_pipeline.encoders.local import LocalEncoder

        return LocalEncoder(profile, threads=settings.embedding_threads or share_of_cores())
    except (MemoryError, ImportError) as error:
        said = " ".join(str(error).split()) or "memory ran out"
        raise OutageError(
            f"Profile {profile.name}: torch cannot load {profile.model} here: {said}; free memory, or install "
            "sentence-transformers anew"
        ) from error
