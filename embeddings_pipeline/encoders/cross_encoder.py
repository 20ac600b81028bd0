"""Cross-encoders: what gives a query and a text together one score. `load_cross_encoder` gives them.

On a processor OpenVINO runs them, made ready as encoders are (`conversion`); else torch does.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.config.reranking import Reranker
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.config.weights import ModelFileError, read_object, resolve_weights
from embeddings_pipeline.encoders.batches import well_formed
from embeddings_pipeline.encoders.conversion import Kind, openvino_encoder
from embeddings_pipeline.encoders.openvino import OpenVinoEncoder, Readiness
from embeddings_pipeline.encoders.processor import is_cpu, share_of_cores
from embeddings_pipeline.encoders.token_rows import Tokens
from embeddings_pipeline.errors import OutageError, OutOfMemoryError, ProfileError
from embeddings_pipeline.forks import ProcessLock, compute


class CrossEncoder(Protocol):
    """A model that reads pairs of texts. Threads may share it."""

    @property
    def runs_on(self) -> str:
        """For people: `OpenVINO, bf16`."""

    @property
    def halved(self) -> int:
        """How often memory ran out, so that fewer pairs were scored at once."""

    def score(self, query: str, texts: Sequence[str]) -> NDArray[np.float32]:
        """Of each text with the query, the score that sentence-transformers' `CrossEncoder.predict` gives.

        Memory that runs out halves the pairs of a pass. Raises OutOfMemoryError if one pair is too much, else
        PipelineError.
        """


class OpenVinoCrossEncoder(OpenVinoEncoder):
    """A cross-encoder that `conversion` has made ready. To its batches, a pair is a text, and its score a vector."""

    def __init__(self, profile: Profile, folder: Path, ready: Readiness, precision: str, threads: int) -> None:
        super().__init__(profile, folder, ready, precision, threads)
        self._query = ""
        self._times_halved: list[None] = []  # shared by copies

    @property
    def runs_on(self) -> str:
        return f"OpenVINO, {self.precision}"

    @property
    def halved(self) -> int:
        return len(self._times_halved)

    def score(self, query: str, texts: Sequence[str]) -> NDArray[np.float32]:
        asked = copy.copy(self)
        asked._query = well_formed(query)
        return asked.encode_documents(texts)[:, 0]

    def _tokens(self, texts: list[str]) -> Tokens:
        return self._rows.read_pairs(self._query, texts, self._characters_read)

    def _out_of_memory(self, error: Exception) -> bool:
        ran_out = super()._out_of_memory(error)
        if ran_out:
            self._times_halved.append(None)
        return ran_out


CROSS_ENCODERS = Kind("embeddings_pipeline.encoders.convert_cross_encoder", "-cross-encoder", OpenVinoCrossEncoder)

_loaded: dict[Reranker, CrossEncoder] = {}
_lock = ProcessLock()


def load_cross_encoder(profile: Reranker, settings: Settings) -> CrossEncoder:
    """The cross-encoder of a profile; equal ones share one in a process, so a model is in memory once.

    Its weights are found as an encoder's are, and it is converted as one is. Raises ProfileError if it cannot be had,
    cannot be loaded, or gives a pair more than one score, and OutOfMemoryError if it is too large.
    """
    with _lock:
        if profile not in _loaded:
            try:
                _loaded[profile] = compute(_load, profile, settings)
            except MemoryError as error:
                raise OutOfMemoryError(
                    f"Profile {profile.name}: memory ran out while {profile.model} was loaded; free memory, or set "
                    "RERANK_MODEL to a smaller model"
                ) from error
        return _loaded[profile]


def forget_cross_encoder(profile: Reranker) -> None:
    """Let its memory go, once nobody uses it any more."""
    with _lock:
        _loaded.pop(profile, None)


def _load(profile: Reranker, settings: Settings) -> CrossEncoder:
    _check_kind(profile)
    if is_cpu(profile):
        try:
            encoder = openvino_encoder(profile, settings, CROSS_ENCODERS)
        except OutageError as error:  # a smaller model may have room
            raise OutOfMemoryError(str(error)) from error
        if isinstance(encoder, OpenVinoCrossEncoder):
            return encoder
    from embeddings_pipeline.encoders.cross_encoder_torch import TorchCrossEncoder

    return TorchCrossEncoder(profile, settings.embedding_threads or share_of_cores())


def _check_kind(profile: Reranker) -> None:
    """ProfileError if the model's files say that it is no cross-encoder of one score."""
    folder = resolve_weights(profile)
    try:
        config = read_object(folder / "config.json")
    except ModelFileError as error:
        raise ProfileError(f"Profile {profile.name}: {error}") from error
    names = config.get("architectures") or [""]
    of_its_own = (folder / "modules.json").is_file()
    if not of_its_own and not str(names[0]).endswith(("ForSequenceClassification", "ForCausalLM")):
        raise ProfileError(
            f"Profile {profile.name}: {profile.model} is no cross-encoder: its config.json names {names[0] or 'none'}, "
            "and a cross-encoder's …ForSequenceClassification; set RERANK_MODEL to one"
        )
    if not of_its_own and str(names[0]).endswith("ForSequenceClassification"):
        labels = len(config.get("id2label") or "ab")  # as transformers reads it
        check_labels(profile, labels)


def check_labels(profile: Profile, labels: int) -> None:
    """ProfileError if the model gives each pair more than one score."""
    if labels != 1:
        raise ProfileError(
            f"Profile {profile.name}: {profile.model} gives each pair {labels} scores (num_labels), and a reranker "
            "gives one; set RERANK_MODEL to a cross-encoder with num_labels 1"
        )
