"""What every encoder on this machine does with texts, whatever runs its model: `BatchEncoder`.

Texts are sorted by their number of tokens and batched by a budget of tokens, so that little is padding and what a layer
works on stays in the processor's cache; equal texts are encoded once; a long text is cut before it is tokenised.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.errors import OutOfMemoryError, PipelineError, ProfileError

TEXTS_PER_WINDOW = 4096
"""Texts that are tokenised and sorted together: bounds the memory of their tokens."""
CHARACTERS_PER_TOKEN = 32
"""A text is cut to this many characters for each token that is read before it is tokenised (see `_tokenize`)."""
CHARACTERS_COUNTED = 1_000_000
"""Characters tokenised together in `count_tokens`, where nothing is cut."""


class Use(NamedTuple):
    """What an input is for: its task, as sentence-transformers calls it, and its prompt."""

    task: str
    prompt: str


class Tokens(NamedTuple):
    """Texts as the model reads them, truncated."""

    tokens: list[Any]  # of each text, in the form that the encoder's `_start` takes
    lengths: list[int]
    overflows: list[int]  # into how many further pieces of full length each text's remainder goes


class BatchEncoder(ABC):
    """See `Encoder` for the methods. Whoever implements it says how texts become tokens, and tokens vectors."""

    device: Any
    tokens_per_batch: int
    """In one pass, padding included, unless the profile says otherwise."""
    passes_at_once = 1
    """How many passes are begun before the first one's vectors are asked for."""

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
    def _start(self, texts: list[str], tokens: list[Any], use: Use) -> Callable[[], NDArray[np.float32]]:
        """Begin one pass of the model over one batch; what it returns waits for the vectors."""

    def encode_documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return self._encode(texts, self._documents)

    def encode_queries(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return self._encode(texts, self._queries)

    def count_tokens(self, texts: Sequence[str]) -> NDArray[np.int64]:
        counts = np.zeros(len(texts), dtype=np.int64)
        prompted = [self._documents.prompt + well_formed(text) for text in texts]
        for part in _parts_of([len(text) for text in prompted], CHARACTERS_COUNTED):
            counts[part] = self._count(prompted[part])
        return counts

    def _encode(self, texts: Sequence[str], use: Use) -> NDArray[np.float32]:
        row_of: dict[str, int] = {}
        rows = [row_of.setdefault(text, len(row_of)) for text in texts]
        distinct = [well_formed(text) for text in row_of]
        vectors = np.empty((len(distinct), self.dimensions), dtype=np.float32)
        try:
            for start in range(0, len(distinct), TEXTS_PER_WINDOW):
                window = slice(start, start + TEXTS_PER_WINDOW)
                vectors[window] = self._encode_window(distinct[window], use)
        except PipelineError:
            raise
        except Exception as error:
            raise self._failure(error, len(texts)) from error
        return vectors[rows]

    def _failure(self, error: Exception, texts: int) -> PipelineError:
        return PipelineError(f"Profile {self.profile.name}: {texts} texts could not be encoded: {first_line(error)}")

    def _encode_window(self, texts: list[str], use: Use) -> NDArray[np.float32]:
        """Encode batch by batch, longest texts first. Memory that runs out halves the batches that follow."""
        texts, tokens, lengths = self._tokenize(texts, use.prompt)
        vectors = np.full((len(texts), self.dimensions), np.nan, dtype=np.float32)  # what has no tokens keeps NaN
        rest = deque(np.argsort(-lengths, kind="stable")[: np.count_nonzero(lengths)].tolist())
        budget = self.profile.tokens_per_batch or self.tokens_per_batch
        running: deque[tuple[list[int], Callable[[], NDArray[np.float32]]]] = deque()
        while rest or running:
            while rest and len(running) < self.passes_at_once:
                size = max(1, min(budget // int(lengths[rest[0]]), self.profile.batch_size or len(texts), len(rest)))
                batch = [rest.popleft() for _ in range(size)]
                running.append((batch, self._start([texts[i] for i in batch], [tokens[i] for i in batch], use)))
            batch, result = running.popleft()
            try:
                vectors[batch] = result()
            except (MemoryError, RuntimeError) as error:
                if not self._out_of_memory(error):
                    raise
                longest = int(lengths[batch[0]])
                if len(batch) == 1:
                    raise OutOfMemoryError(
                        f"Profile {self.profile.name}: memory ran out while encoding one text of {longest} tokens on "
                        f"{self.device}; free memory, or use a smaller model or max_length"
                    ) from error
                budget = longest * len(batch) // 2
                rest = deque(sorted([*batch, *rest], key=lambda row: -lengths[row]))
        return vectors

    def _out_of_memory(self, error: Exception) -> bool:
        if isinstance(error, MemoryError):
            return True
        return any(words in str(error) for words in ("can't allocate memory", "not enough memory", "bad_alloc"))

    def _tokenize(self, texts: list[str], prompt: str) -> tuple[list[str], list[Any], NDArray[np.int64]]:
        """The texts without what is surely never read, each one's tokens, and its length in tokens.

        A tokenizer takes a second for a megabyte of which 256 tokens are read, so a long text is cut first. Tokens
        may be longer than the cut allows for (white space, a word of a thousand letters): a cut text that does not
        give at least twice the tokens that are read is tokenised whole.
        """
        limit = self._characters_read
        cut = texts if limit is None else [text[:limit] for text in texts]
        tokens, lengths, overflows = self._tokens([prompt + text for text in cut])
        for row, overflow in enumerate(overflows):
            if len(cut[row]) < len(texts[row]) and overflow < 2:
                cut[row] = texts[row]
                [tokens[row]], [lengths[row]], _ = self._tokens([prompt + texts[row]])
        return cut, tokens, np.array(lengths)


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
