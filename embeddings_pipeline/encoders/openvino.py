"""Encoding on the processor with OpenVINO: a model that `conversion` has made ready, run without torch.

Several passes are under way at once, each on threads of its own, so that no core waits for another at each layer. A
query's, for which somebody waits, has several threads to itself.
"""

import copy
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.encoders.batches import (
    CHARACTERS_PER_TOKEN,
    BatchEncoder,
    Use,
    check_dimensions,
    check_length,
)
from embeddings_pipeline.encoders.token_rows import Padding, TokenRows, Tokens
from embeddings_pipeline.forks import ProcessLock, left_alone_in_children

GRAPH, TOKENIZER = "model.xml", "tokenizer.json"
TOKENS_STEP, ROWS_STEP = 8, 4
"""Batches are filled up to multiples of so many tokens and, beyond the first step, rows: for each shape that it meets,
OpenVINO makes code and keeps it.
"""


PRECISIONS: dict[str, dict[str, Any]] = {
    "bf16": {"INFERENCE_PRECISION_HINT": "bf16"},
    "f32": {"INFERENCE_PRECISION_HINT": "f32"},
    "i8": {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 64},
}
"""Of matrix products, as OpenVINO is told. `i8`: weights in 8 bits, by numbers that are brought to 8 bits too, 64 at a
time, if the processor has instructions for that; else in float32.
"""


MANY, ONE = "THROUGHPUT", "LATENCY"
"""What passes are to be: as many as there can be in a time, or each as soon as it can be."""
MOST_FOR_ONE = 4  # threads of a pass of one query: with more of them, each waits longer for the others than it works


@dataclass(frozen=True)
class Readiness:
    """What a converted model's own files do not say, and its encoder must know."""

    inputs: tuple[str, ...]  # of the graph, in order: input_ids, attention_mask, token_type_ids
    dimensions: int
    positions: int | None  # that the model has
    max_length: int | None  # tokens that the model's files have it read
    truncation_side: str
    padding_side: str
    pad_token: int
    pad_type: int

    def write(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self), indent=1))


class OpenVinoEncoder(BatchEncoder):
    """See `Encoder` for the methods. Made by `load_encoder`."""

    device = "cpu"
    tokens_per_batch = 1024  # more is no faster, and takes more memory
    rows_step = ROWS_STEP

    def __init__(self, profile: Profile, folder: Path, ready: Readiness, precision: str, threads: int) -> None:
        """Load the model in `folder`. `precision`: one of PRECISIONS; `threads`: all together."""
        super().__init__(profile)
        check_dimensions(profile, min(profile.dimensions, ready.dimensions))  # fewer: a Matryoshka model's
        check_length(profile, ready.positions)
        self.precision = precision
        self._ready = ready
        self._threads = threads
        self._lock = ProcessLock()
        self._rows = TokenRows(
            Tokenizer.from_file(str(folder / TOKENIZER)),
            ready.inputs,
            self.max_length,
            ready.truncation_side,
            Padding(ready.padding_side, ready.pad_token, ready.pad_type),
        )
        self._check_room()
        self._graph = core().read_model(folder / GRAPH)  # whatever becomes of the folder
        self._engines: dict[str, _Engine] = {}

    def in_precision(self, precision: str) -> "OpenVinoEncoder":
        """The same model with matrix products of another precision."""
        other = copy.copy(self)
        other.precision, other._engines = precision, {}
        return other

    @property
    def max_length(self) -> int | None:
        return self.profile.max_length or self._ready.max_length

    @property
    def passes_at_once(self) -> int:  # type: ignore[override]
        return self._engine.streams + 1 if MANY in self._engines else 1  # none runs yet

    @property
    def _characters_read(self) -> int | None:
        if self.max_length is None or self._ready.truncation_side != "right":
            return None
        return CHARACTERS_PER_TOKEN * self.max_length

    def _tokens(self, texts: list[str]) -> Tokens:
        return self._rows.read(texts)

    def _count(self, texts: list[str]) -> Sequence[int]:
        return self._rows.count(texts)

    def _start(self, texts: list[str], tokens: list[Any], use: Use) -> Callable[[], NDArray[np.float32]]:
        goal = ONE if use is self._queries and len(tokens) == 1 else MANY
        passing = self._engine_for(goal).start(partial(self._padded, tokens))

        def vectors() -> NDArray[np.float32]:
            rows = passing()[: len(tokens), : self.dimensions]
            if self.profile.normalize:
                rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
            return rows

        return vectors

    def _padded(self, tokens: list[Any]) -> list[NDArray[np.int64]]:
        """The graph's inputs: a row a text, in the order of `Readiness.inputs`."""
        longest = max(len(ids) for ids, _ in tokens)
        most = self.max_length or self._ready.positions or longest + TOKENS_STEP
        width = max(longest, min(_up_to(TOKENS_STEP, longest), most))
        height = len(tokens) if len(tokens) <= ROWS_STEP else _up_to(ROWS_STEP, len(tokens))
        return list(self._rows.padded(tokens, width, height).values())

    @property
    def _engine(self) -> "_Engine":
        return self._engine_for(MANY)

    def _engine_for(self, goal: str) -> "_Engine":
        """What runs the model in this process, from its first use: a forked one has none of its parent's threads, so it
        makes its own.
        """
        with self._lock:
            engine = self._engines.get(goal)
            if engine is None or engine.process != os.getpid():
                threads = self._threads if goal == MANY else min(self._threads, MOST_FOR_ONE)
                engine = self._engines[goal] = _Engine(self._graph, self.precision, threads, goal)
            return engine


class _Engine:
    """The compiled model, and a thread for each of its streams, which share the weights and the cores."""

    def __init__(self, graph: Any, precision: str, threads: int, goal: str) -> None:
        self.process, self._goal = os.getpid(), goal
        how = {**PRECISIONS[precision], "PERFORMANCE_HINT": goal, "INFERENCE_NUM_THREADS": threads}
        compiled = core().compile_model(graph, "CPU", how)
        self.streams = int(compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))
        self._free: SimpleQueue[tuple[ProcessLock, Any]] = SimpleQueue()
        for _ in range(self.streams):
            self._free.put((ProcessLock(ended_first=True), compiled.create_infer_request()))
        self._threads = ThreadPoolExecutor(self.streams, thread_name_prefix="encoder")
        left_alone_in_children(self)

    def start(self, inputs: Callable[[], list[NDArray[np.int64]]]) -> Callable[[], NDArray[np.float32]]:
        """Begin a pass; what it returns waits for its end, or does the whole pass if it is of one query. `inputs` gives
        the graph's inputs, in the thread of the pass.
        """
        if self._goal == ONE:
            return partial(self._pass, inputs)
        return self._threads.submit(self._pass, inputs).result

    def _pass(self, inputs: Callable[[], list[NDArray[np.int64]]]) -> NDArray[np.float32]:
        given = inputs()
        lock, request = self._free.get()
        try:
            with lock, _first_alone():
                result: NDArray[np.float32] = request.infer(given, share_inputs=True)[0]
                return result.astype(np.float32)  # a copy: the request's own memory is used again
        finally:
            self._free.put((lock, request))


_first_pass = ProcessLock()
_passed = Event()


@contextmanager
def _first_alone() -> Iterator[None]:
    """A pass; the first one of a process ends before another begins.

    In its first pass OpenVINO's Python binding fills tables of its own, and gives the interpreter's lock away while it
    does: of two threads that meet there, each waits for the other for ever.
    """
    if _passed.is_set():
        yield
        return
    with _first_pass:
        yield
        _passed.set()


def _up_to(step: int, number: int) -> int:
    """The next multiple of `step`."""
    return -(-number // step) * step


@dataclass(eq=False)
class _Core:
    """OpenVINO's core, and the process that made it."""

    process: int
    core: Any


_cores: list[_Core] = []  # of this process, the last one
_making_a_core = ProcessLock()


def core() -> Any:
    """OpenVINO's core of this process: one for all models, kept to the end.

    With the last use of a core goes its plugin, and with that the stack on which the thread that loaded it handles
    signals. Of several cores one restores the stack of another that is gone, and the next signal ends the process.
    """
    with _making_a_core:
        if not _cores or _cores[-1].process != os.getpid():
            _cores.append(_Core(os.getpid(), openvino().Core()))
            left_alone_in_children(_cores[-1])
        return _cores[-1].core


def openvino() -> ModuleType:
    """The library, imported without its tools for conversion.

    They take half of the time that it takes to import, and with them comes telemetry: imported, they tell Google
    Analytics, and write into the home folder, unless a file there forbids it.
    """
    if "openvino" in sys.modules:
        return sys.modules["openvino"]
    with _not_importable("openvino.tools"):
        return import_module("openvino")


def conversion_tools() -> ModuleType:
    """What converts models, told to do without telemetry, for a process that has not imported it yet."""
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    openvino()
    return import_module("openvino.tools.ovc")


@contextmanager
def _not_importable(name: str) -> Iterator[None]:
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
