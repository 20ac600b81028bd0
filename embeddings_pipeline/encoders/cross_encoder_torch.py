"""Cross-encoders by sentence-transformers and torch: on a GPU, and those that OpenVINO cannot run."""

import contextlib
import os
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import CrossEncoder

from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.config.weights import resolve_weights
from embeddings_pipeline.encoders.batches import OUT_OF_MEMORY, first_line, well_formed
from embeddings_pipeline.encoders.cross_encoder import check_labels
from embeddings_pipeline.encoders.local import _device, _half, _without_progress_bars
from embeddings_pipeline.errors import OutOfMemoryError, PipelineError, ProfileError
from embeddings_pipeline.forks import ProcessLock, compute

PAIRS_PER_PASS = 32  # as sentence-transformers has it
KEPT_SCORE = {"bf16": 2e-3, "f32": 1e-3}
"""How far a score may be from `predict`'s in float32, of the largest one, or of 1 if that is more."""
COMPARED = (
    ("a film about a lost dog", "Two brothers look for a dog that was lost in a small town by the sea."),
    ("a film about a lost dog", "a film about a lost dog"),
    ("a film about a lost dog", "1984, 2001, 3.14159, -40 °C, 1.000.000 €"),
    ("Wer überquert die Alpen?", "Zwei Brüder überqueren die Alpen, um ein verlorenes Fahrrad zurückzubringen."),
    ("海", "老人在海边等待一艘再也不会回来的船。"),
    ("one", "one two three four five six seven eight nine ten"),
    ("love", "love " * 60),
    ("one two three", ""),
)


class TorchCrossEncoder:
    """See `CrossEncoder` for the methods. Made by `load_cross_encoder`."""

    def __init__(self, profile: Profile, threads: int | None = None) -> None:
        """Load the model; `threads`: of a processor, for all models of this process."""
        self.profile = profile
        self._device = _device(profile)
        if self._device.type == "cpu" and threads is not None:
            torch.set_num_threads(threads)
        self.model = load_model(profile, self._device)
        self.halved = 0
        self._process = os.getpid()
        self._pairs = profile.batch_size or PAIRS_PER_PASS
        self._lock = ProcessLock(ended_first=True)
        self._half: torch.dtype | None = None
        self._half = self._half_that_keeps()

    @property
    def runs_on(self) -> str:
        precision = str(self._half or torch.float32).removeprefix("torch.")
        return f"torch on {self._device.type}, {precision}"

    def score(self, query: str, texts: Sequence[str]) -> NDArray[np.float32]:
        if self._device.type != "cpu" and self._process != os.getpid():
            raise ProfileError(
                f"Profile {self.profile.name}: the model was loaded on {self._device} before this process was forked, "
                "and cannot be used there after it: search first in the worker (without --preload), or set "
                "EMBEDDING_DEVICE=cpu"
            )
        pairs = [(well_formed(query), well_formed(text)) for text in texts]
        try:
            return compute(self._scores, pairs)
        except PipelineError:
            raise
        except Exception as error:
            raise PipelineError(
                f"Profile {self.profile.name}: {len(pairs)} pairs could not be scored: {first_line(error)}"
            ) from error

    def _scores(self, pairs: list[tuple[str, str]]) -> NDArray[np.float32]:
        half = self._half
        autocast = contextlib.nullcontext() if half is None else torch.autocast(self._device.type, dtype=half)
        with self._lock:
            while True:
                try:
                    with autocast:
                        scores = self.model.predict(pairs, batch_size=self._pairs, show_progress_bar=False)
                    return np.asarray(scores, np.float32)
                except (MemoryError, RuntimeError) as error:
                    self._halve(error)

    def _halve(self, error: Exception) -> None:
        """Score half as many pairs at once from now on. Raises the error, if it is of something else than memory."""
        if not _ran_out_of_memory(error):
            raise error
        if self._pairs == 1:
            raise OutOfMemoryError(
                f"Profile {self.profile.name}: memory ran out while scoring one pair on {self._device}; free memory, "
                "or set RERANK_MODEL to a smaller model"
            ) from error
        self._pairs, self.halved = self._pairs // 2, self.halved + 1

    def _half_that_keeps(self) -> torch.dtype | None:
        """The 16-bit type that is fast here, if a few pairs keep their scores in it."""
        half = _half(self.profile, self._device)
        if half is None:
            return None
        full = self._scores(list(COMPARED))
        self._half = half
        return half if difference(self._scores(list(COMPARED)), full) <= KEPT_SCORE["bf16"] else None


def _ran_out_of_memory(error: Exception) -> bool:
    said = any(words in str(error) for words in OUT_OF_MEMORY)
    return said or isinstance(error, MemoryError | torch.OutOfMemoryError)


def difference(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    """How far scores are from those that they should be: of the largest one, or of 1 if that is more. NaN if any is."""
    return float(np.abs(ours - theirs).max() / max(1.0, float(np.abs(theirs).max())))


def load_model(profile: Profile, device: torch.device) -> CrossEncoder:
    """The model in float32. Raises ProfileError if it cannot be loaded, or gives a pair more than one score."""
    folder = resolve_weights(profile)
    try:
        with _without_progress_bars():
            model = CrossEncoder(
                str(folder),
                device=str(device),
                local_files_only=True,
                model_kwargs={"dtype": torch.float32},  # else weights stored in 16 bits crawl on most CPUs
            )
    except Exception as error:
        if _ran_out_of_memory(error):
            raise MemoryError(first_line(error)) from error
        raise ProfileError(f"Profile {profile.name}: {folder} cannot be loaded: {first_line(error)}") from error
    check_labels(profile, model.num_labels)
    model.eval()
    return model
