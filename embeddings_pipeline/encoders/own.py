"""A class of the user's own as an encoder: whatever it does wrong is one line that names it and what it gave."""

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.encoders.outage import is_outage, status_of
from embeddings_pipeline.errors import OutageError, OutOfMemoryError, PipelineError, ProfileError

REQUIRED = ("encode_documents", "encode_queries")
REFUSES_ALL = (401, 402, 403, 407)  # of a service that the class asks


class OwnEncoder:
    """See `Encoder` for the methods. Made by `load_encoder` for `provider: python`."""

    def __init__(self, profile: Profile, *, enabled: bool = True) -> None:
        """Make the object of the user's class. ProfileError if that fails, or a method is missing.

        `enabled`: whether it may be asked for vectors.
        """
        module_name, separator, class_name = profile.model.partition(":")
        if not (module_name and separator and class_name):
            raise ProfileError(
                f"Profile {profile.name}: provider python wants model package.module:Class, not {profile.model!r}"
            )
        try:
            self._encoder: Any = getattr(importlib.import_module(module_name), class_name)(profile)
            self.dimensions = int(self._encoder.dimensions)
        except PipelineError:
            raise
        except Exception as error:
            raise ProfileError(f"Profile {profile.name}: {profile.model} cannot be loaded: {_said(error)}") from error
        self._name, self._enabled = f"Profile {profile.name}: {profile.model}", enabled
        missing = [method for method in REQUIRED if not callable(getattr(self._encoder, method, None))]
        if missing:
            raise ProfileError(f"{self._name} has no method {' and no '.join(missing)}")
        if self.dimensions != profile.dimensions:
            raise ProfileError(
                f"{self._name} gives {self.dimensions} dimensions, the profile says {profile.dimensions}"
            )

    def encode_documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return self._encode("encode_documents", texts)

    def encode_queries(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return self._encode("encode_queries", texts)

    def count_tokens(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """What the class counts; zeros if it does not count."""
        if not hasattr(self._encoder, "count_tokens"):
            return np.zeros(len(texts), np.int64)
        counts = self._call("count_tokens", texts)
        array = np.asarray(counts) if isinstance(counts, np.ndarray | list | tuple) else None
        if array is None or array.shape != (len(texts),) or (array.size and array.dtype.kind not in "iu"):
            raise ProfileError(
                f"{self._name}.count_tokens gave {_described(counts)} for {len(texts)} texts; it must give a whole "
                "number for each, or be left out"
            )
        return array.astype(np.int64)

    def _encode(self, method: str, texts: Sequence[str]) -> NDArray[np.float32]:
        if not self._enabled:
            raise ProfileError(f"{self._name} takes money, which EMBEDDING_ENABLED=false forbids; unset it to go on")
        vectors = self._call(method, texts)
        shape = (len(texts), self.dimensions)
        if not (isinstance(vectors, np.ndarray) and vectors.dtype.kind == "f" and vectors.shape == shape):
            raise ProfileError(
                f"{self._name}.{method} gave {_described(vectors)} for {len(texts)} texts; it must give a NumPy array "
                f"of float32 with the shape {shape}"
            )
        with np.errstate(over="ignore"):  # infinite in float32: refused as such
            return vectors.astype(np.float32, copy=False)

    def _call(self, method: str, texts: Sequence[str]) -> Any:
        try:
            return getattr(self._encoder, method)(texts)
        except PipelineError:
            raise
        except MemoryError as error:
            raise OutOfMemoryError(f"{self._name}.{method}: memory ran out for {len(texts)} texts") from error
        except (Exception, SystemExit) as error:
            said = f"{self._name}.{method} failed: {_said(error)}"
            if is_outage(error):
                raise OutageError(said) from error
            if (status := status_of(error)) in REFUSES_ALL:
                raise ProfileError(f"{said}; it answers {status} to every text: see its key and its account") from error
            raise PipelineError(said) from error


def _described(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} with the shape {value.shape}"
    size = f" of {len(value)}" if isinstance(value, list | tuple) else ""
    return "nothing" if value is None else f"a {type(value).__name__}{size}"


def _said(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
