"""What every encoder on this machine does with texts, whatever runs its model: `BatchEncoder`.

Texts are sorted by their number of tokens and batched by a budget of tokens, so that little is padding and what a layer
works on stays in the processor's cache; equal texts are encoded once; a long text is cut before it is tokenised.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.encoders.token_rows import Tokens
from embeddings_pipeline.encoders.windows import Window, made_ahead, windows_of
from embeddings_pipeline.errors import OutOfMemoryError, PipelineError, ProfileError

CHARACTERS_PER_TOKEN = 32
"""A text is cut to this many characters for each token that is read before it is tokenised (see `_tokenize`)."""
CHARACTERS_TOGETHER = 1_000_000
"""Characters that are tokenised together: bounds the memory of what is truncated."""

OUT_OF_MEMORY = (
    *("can't allocate memory", "Cannot allocate memory", "not enough memory", "memory allocation of"),
    "failed to map segment",
    *("bad_alloc", "ALLOC_FAILED", "MemoryError"),
)
"""What libraries say."""

Result = Callable[[], NDArray[np.floating]]
"""Waits for the vectors of a pass that was begun."""


class Use(NamedTuple):
    """What an input is for: its task, as sentence-transformers calls it, and its prompt."""

    task: str
    prompt: str


class Counted(NamedTuple):
    """Texts that were encoded."""

    vectors: NDArray[np.float32]
    tokens: NDArray[np.int64]  # as `count_tokens` counts them


class BatchEncoder(ABC):
    """See `Encoder` for the methods. Whoever implements it says how texts become tokens, and tokens vectors."""

    device: Any
    tokens_per_batch: int
    """In one pass, padding included, unless the profile says otherwise."""
    passes_at_once = 1
    """How many passes are begun before the first one's vectors are asked for."""
    rows_step = 1
    """Texts of a pass: of more than so many, a multiple."""
    texts_of_window = 512, 4096
    """That are tokenised together: in the first window, and at most."""
    windows_ahead = 1
    """How many windows are tokenised at once, while the one before is encoded."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self._documents = Use("document", profile.document_prompt or "")
        self._queries = Use("query", profile.query_prompt or "")

    @property
    def dimensions(self) -> int:
        return self.profile.dimensions

    @property
    @abstractmethod
    def max_length(self) -> int | None:
        """Tokens that are read of a text, prompt included: the profile's word, else the model's own; None: all."""

    @property
    @abstractmethod
    def _characters_read(self) -> int | None:
        """Characters to which a text is cut before it is tokenised; None: its end may be what is read."""

    @abstractmethod
    def _tokens(self, texts: list[str]) -> Tokens:
        """Texts, prompts included, as the model reads them."""

    @abstractmethod
    def _count(self, texts: list[str]) -> Sequence[int]:
        """Numbers of tokens of texts, prompts included, of which nothing is truncated."""

    @abstractmethod
    def _start(self, texts: list[str], tokens: list[Any], use: Use) -> Result:
        """Begin one pass of the model over one batch. An error is raised here, or by the result."""

    def _check_room(self) -> None:
        """ProfileError if a prompt and the tokenizer's own tokens are all that is read: each text would be the same."""
        if self.max_length is None or self._characters_read is None:
            return
        for key, use in (("document_prompt", self._documents), ("query_prompt", self._queries)):
            [taken] = self._count([use.prompt])
            if taken >= self.max_length:
                raise ProfileError(
                    f"Profile {self.profile.name}: of the {self.max_length} tokens that are read, {taken} are "
                    f"{f'of its {key} and ' if use.prompt else ''}the tokenizer's own, so that nothing of a text would "
                    "be read; set another max_length or prompt"
                )

    def _prepare(self, texts: list[str], use: Use) -> None:
        """What is done before texts are encoded, while no thread makes tokens of them."""
        return None

    def encode_documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return self._encode(texts, self._documents).vectors

    def encode_queries(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return self._encode(texts, self._queries).vectors

    def encode_counted(self, texts: Sequence[str]) -> Counted:
        """What `encode_documents` and `count_tokens` give; each text is tokenised once."""
        return self._encode(texts, self._documents, counted=True)

    def count_tokens(self, texts: Sequence[str]) -> NDArray[np.int64]:
        return self._counted([self._documents.prompt + well_formed(text) for text in texts])

    def _counted(self, prompted: list[str]) -> NDArray[np.int64]:
        counts = np.zeros(len(prompted), dtype=np.int64)
        for part in _parts_of([len(text) for text in prompted], CHARACTERS_TOGETHER):
            counts[part] = self._count(prompted[part])
        return counts

    def _encode(self, texts: Sequence[str], use: Use, *, counted: bool = False) -> Counted:
        row_of: dict[str, int] = {}
        rows = [row_of.setdefault(text, len(row_of)) for text in texts]
        distinct = [well_formed(text) for text in row_of]
        vectors = np.full((len(distinct), self.dimensions), np.nan, dtype=np.float32)  # what has no tokens keeps NaN
        counts = np.zeros(len(distinct), dtype=np.int64)

        def tokenized(part: slice) -> Window:
            window = self._tokenize(distinct[part], use.prompt, counted=counted)
            window.start = part.start
            if window.counts is not None:
                counts[part] = window.counts
            return window

        try:
            self._prepare(distinct, use)
            parts = windows_of(len(distinct), *self.texts_of_window)
            with closing(made_ahead(tokenized, parts, self.windows_ahead)) as windows:
                for places, made in self._passes(windows, use):
                    vectors[places] = made
        except PipelineError:
            raise
        except Exception as error:
            raise self._failure(error, len(texts)) from error
        return Counted(vectors[rows], counts[rows])

    def _failure(self, error: Exception, texts: int) -> PipelineError:
        return PipelineError(f"Profile {self.profile.name}: {texts} texts could not be encoded: {first_line(error)}")

    def _passes(self, windows: Iterator[Window], use: Use) -> Iterator[tuple[list[int], NDArray[np.floating]]]:
        """Places of texts and their vectors, pass by pass; `passes_at_once` are under way, of whichever windows.

        Memory that runs out halves the batches that follow in its window.
        """
        unfinished: deque[Window] = deque()
        running: deque[tuple[Window, list[int], Result]] = deque()
        while True:
            while len(running) < self.passes_at_once:
                if not unfinished:
                    window = next(windows, None)
                    if window is None:
                        break
                    window.budget = self.profile.tokens_per_batch or self.tokens_per_batch
                    unfinished.append(window)
                if window := unfinished[0]:
                    batch = window.next_batch(self.profile.batch_size)
                    running.append((window, batch, self._begun(window, batch, use)))
                else:
                    unfinished.popleft()
            if not running:
                return
            window, batch, result = running.popleft()
            try:
                vectors = result()
            except (MemoryError, RuntimeError) as error:
                if not self._out_of_memory(error):
                    raise
                self._halve(window, batch, error)
                if window not in unfinished:
                    unfinished.appendleft(window)
            else:
                yield [window.start + row for row in batch], vectors

    def _begun(self, window: Window, batch: list[int], use: Use) -> Result:
        """Begin a pass. If memory runs out at once, its result says so, when those before it have ended."""
        try:
            return self._start([window.texts[row] for row in batch], [window.tokens[row] for row in batch], use)
        except (MemoryError, RuntimeError) as error:
            if not self._out_of_memory(error):
                raise
            return partial(_fail, error.with_traceback(None))  # and so without what the pass had made

    def _halve(self, window: Window, batch: list[int], error: Exception) -> None:
        if len(batch) == 1:
            raise OutOfMemoryError(
                f"Profile {self.profile.name}: memory ran out while encoding one text of "
                f"{window.lengths[batch[0]]} tokens on {self.device}; free memory, or use a smaller model or max_length"
            ) from error
        window.halve(batch)

    def _out_of_memory(self, error: Exception) -> bool:
        return isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)

    def _tokenize(self, texts: list[str], prompt: str, *, counted: bool = False) -> Window:
        """The texts without what is surely never read, each one's tokens and length; and, if they are wanted, counts.

        A tokenizer takes a second for a megabyte of which 256 tokens are read, so a long text is cut first, unless all
        of it is counted. Tokens may be longer than the cut allows for (white space, a word of a thousand letters): a
        cut text that does not give at least twice the tokens that are read is tokenised whole.
        """
        limit = None if counted else self._characters_read
        cut = texts if limit is None else [text[:limit] for text in texts]
        tokens, lengths, counts = self._tokens_of([prompt + text for text in cut])
        for row, count in enumerate(counts or []):
            if len(cut[row]) < len(texts[row]) and count < 2 * lengths[row]:
                cut[row] = texts[row]
                [tokens[row]], [lengths[row]], _ = self._tokens([prompt + texts[row]])
        if counted and counts is None:
            counts = self._counted([prompt + text for text in texts]).tolist()
        return Window(cut, tokens, np.array(lengths), counts, step=self.rows_step)

    def _tokens_of(self, prompted: list[str]) -> Tokens:
        """As `_tokens`, a part of the texts at a time."""
        whole = Tokens([], [], [])
        for part in _parts_of(list(map(len, prompted)), CHARACTERS_TOGETHER):
            tokens, lengths, counts = self._tokens(prompted[part])
            whole.tokens.extend(tokens)
            whole.lengths.extend(lengths)
            if counts is None or whole.counts is None:
                whole = whole._replace(counts=None)
            else:
                whole.counts.extend(counts)
        return whole


def check_dimensions(profile: Profile, dimensions: int | None) -> None:
    """ProfileError if the model gives vectors of another length than the profile says."""
    if dimensions != profile.dimensions:
        raise ProfileError(
            f"Profile {profile.name}: {profile.model} gives {dimensions} dimensions, the profile says "
            f"{profile.dimensions}; set dimensions (or EMBEDDING_DIMENSIONS) to {dimensions}, or name another model"
        )


def check_length(profile: Profile, positions: int | None) -> None:
    """ProfileError if the profile asks for more tokens than the model has positions."""
    if profile.max_length is not None and positions is not None and profile.max_length > positions:
        raise ProfileError(
            f"Profile {profile.name}: max_length {profile.max_length} is more than the {positions} tokens that "
            f"{profile.model} can read"
        )


def well_formed(text: str) -> str:
    """The text with lone surrogates, which no tokenizer takes, replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def lowest_cosine(a: NDArray, b: NDArray) -> float:
    """Of the rows of two arrays of one shape; a row of zeros has the cosine 0 to any."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(((a * b).sum(axis=1) / np.where(lengths > 0, lengths, 1)).min())


def first_line(error: BaseException) -> str:
    """What the error says first; OpenVINO's errors begin with where in its code they come from."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if not line.startswith("Exception from ")), type(error).__name__).strip()


def _fail(error: Exception) -> NoReturn:
    raise error


def _parts_of(sizes: list[int], limit: int) -> Iterator[slice]:
    """Consecutive parts whose sizes add up to at most `limit`, or that are a single item."""
    start = total = 0
    for position, size in enumerate(sizes):
        if position > start and total + size > limit:
            yield slice(start, position)
            start, total = position, 0
        total += size
    if sizes:
        yield slice(start, len(sizes))
