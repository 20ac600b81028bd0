"""Encoding on this machine with sentence-transformers, faster than its own `encode`.

Where the speed comes from: texts are sorted by their number of tokens and batched by a budget of tokens, so that
little is padding and what a layer works on stays in the processor's cache; equal texts are encoded once; matrix
products run in 16 bits if the processor has instructions for them.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from embeddings_pipeline.config.model_words import NO_LIMIT, with_model_prompts
from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.config.weights import resolve_weights
from embeddings_pipeline.errors import OutageError, OutOfMemoryError, PipelineError, ProfileError
from embeddings_pipeline.forks import ProcessLock, compute

Features = dict[str, Any]

CPU_TOKENS_PER_BATCH = 1536
GPU_TOKENS_PER_BATCH = 65_536
TEXTS_PER_WINDOW = 4096
"""Texts that are tokenised and sorted together: bounds the memory of their tokens."""
CHARACTERS_PER_TOKEN = 32
"""A text is cut to this many characters for each token that is read before it is tokenised (see `_tokenize`)."""
KEPT_COSINE = 0.99995
"""What 16 bits must keep of a few texts, so that others keep 0.9999 as well; else the model runs in float32."""
PRECISION_TEXTS = (
    "cat",
    "A plain sentence in English.",
    "The quick brown fox jumps over the lazy dog while the band plays on until three in the morning.",
    "Zwei Brüder überqueren die Alpen, um ein verlorenes Fahrrad zurückzubringen.",
    "老人在海边等待一艘再也不会回来的船。",
    "1984, 2001, 3.14159, -40 °C, 1.000.000 €",
    "one two three four five six seven eight nine ten",
    "love " * 60,
)
LONGEST_ASKED = 40_000
"""Tokens up to which a model is asked, once it is loaded, what it makes of a text that is longer than it reads."""
CHARACTERS_COUNTED = 1_000_000
"""Characters tokenised together in `count_tokens`, where nothing is cut."""


class _Use(NamedTuple):
    """What sentence-transformers is told of an input: its task, by which a Router chooses modules, and its prompt."""

    task: str
    prompt: str


class LocalEncoder:
    """A sentence-transformers model; see `Encoder` for the methods. Made by `load_encoder`."""

    def __init__(self, profile: Profile, half: torch.dtype | Literal["auto"] | None = "auto") -> None:
        """Load the model. `half`: the 16-bit type of matrix products, None for float32 throughout."""
        self.profile = profile = with_model_prompts(profile)
        self.device = _device(profile)
        self.half = _half(profile, self.device) if half == "auto" else half
        self.model = load_model(profile, self.device)
        tokenizer = getattr(self.model, "tokenizer", None)
        self._tokenizer = tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None
        self._lock = ProcessLock(ended_first=True)
        self._process = os.getpid()
        self._documents = _Use("document", profile.document_prompt or "")
        self._queries = _Use("query", profile.query_prompt or "")
        self._tokens_suffice = {use: self._ask_tokens_suffice(use) for use in (self._documents, self._queries)}
        self._check_dimensions()
        if half == "auto" and self.device.type == "cpu" and self._cosine_of_half() < KEPT_COSINE:
            self.half = None
        if self.half is not None:
            # Once here rather than by autocast in each batch. Embeddings, norms and residuals stay float32.
            for module in self.model.modules():
                if isinstance(module, torch.nn.Linear):
                    module.to(self.half)

    @property
    def dimensions(self) -> int:
        return self.profile.dimensions

    @property
    def max_length(self) -> int | None:
        """Tokens that are read of a text, prompt included: the profile's word, else the model's own; None: all."""
        length = self.model.max_seq_length
        return int(length) if length is not None and length < NO_LIMIT else None

    def encode_documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return self._encode(texts, self._documents)

    def encode_queries(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return self._encode(texts, self._queries)

    def count_tokens(self, texts: Sequence[str]) -> NDArray[np.int64]:
        counts = np.zeros(len(texts), dtype=np.int64)
        prompted = [self._documents.prompt + _well_formed(text) for text in texts]
        for part in _parts_of([len(text) for text in prompted], CHARACTERS_COUNTED):
            with self._lock:
                if self._tokenizer is None:
                    features = [self.model.preprocess([text]) for text in prompted[part]]
                    counts[part] = [f["input_ids"].numel() if "input_ids" in f else 0 for f in features]
                else:
                    encoded = self._tokenizer(prompted[part], return_attention_mask=False, verbose=False)
                    counts[part] = [len(ids) for ids in encoded["input_ids"]]
        return counts

    def _encode(self, texts: Sequence[str], use: _Use) -> NDArray[np.float32]:
        row_of: dict[str, int] = {}
        rows = [row_of.setdefault(text, len(row_of)) for text in texts]
        distinct = [_well_formed(text) for text in row_of]
        vectors = np.empty((len(distinct), self.dimensions), dtype=np.float32)
        try:
            for start in range(0, len(distinct), TEXTS_PER_WINDOW):
                window = slice(start, start + TEXTS_PER_WINDOW)
                vectors[window] = self._encode_window(distinct[window], use)
        except PipelineError:
            raise
        except torch.AcceleratorError as error:
            raise OutageError(f"Profile {self.profile.name}: {self.device} failed: {_first_line(error)}") from error
        except Exception as error:
            raise PipelineError(
                f"Profile {self.profile.name}: {len(texts)} texts could not be encoded: {_first_line(error)}"
            ) from error
        return vectors[rows]

    def _encode_window(self, texts: list[str], use: _Use) -> NDArray[np.float32]:
        """Encode batch by batch, longest texts first. Memory that runs out halves the batches that follow."""
        texts, tokens, lengths = self._tokenize(texts, use.prompt)
        vectors = np.full((len(texts), self.dimensions), np.nan, dtype=np.float32)  # what has no tokens keeps NaN
        longest_first = np.argsort(-lengths, kind="stable")[: np.count_nonzero(lengths)]
        budget = self.profile.tokens_per_batch
        if budget is None:
            budget = CPU_TOKENS_PER_BATCH if self.device.type == "cpu" else GPU_TOKENS_PER_BATCH
        start = 0
        while start < len(longest_first):
            longest = int(lengths[longest_first[start]])
            size = max(1, min(budget // longest, self.profile.batch_size or len(texts)))
            batch = longest_first[start : start + size]
            try:
                vectors[batch] = self._run([texts[i] for i in batch], [tokens[i] for i in batch], use)
            except (MemoryError, RuntimeError) as error:
                if not _out_of_memory(error):
                    raise
                if len(batch) == 1:
                    raise OutOfMemoryError(
                        f"Profile {self.profile.name}: memory ran out while encoding one text of {longest} tokens on "
                        f"{self.device}; free memory, or use a smaller model or max_length"
                    ) from error
                budget = longest * len(batch) // 2
            else:
                start += len(batch)
        return vectors

    def _run(self, texts: list[str], tokens: list[Features], use: _Use) -> NDArray[np.float32]:
        """One pass of the model over one batch."""
        if self.device.type != "cpu" and self._process != os.getpid():
            raise ProfileError(
                f"Profile {self.profile.name}: the model was loaded on {self.device} before this process was forked, "
                "and cannot be used there after it: search first in the worker (without --preload), or set "
                "EMBEDDING_DEVICE=cpu"
            )
        return compute(self._pass, texts, tokens, use)

    def _pass(self, texts: list[str], tokens: list[Features], use: _Use) -> NDArray[np.float32]:
        autocast = contextlib.nullcontext() if self.half is None else torch.autocast(self.device.type, dtype=self.half)
        with self._lock, torch.inference_mode(), autocast:
            features = self._pad(tokens) if self._tokens_suffice[use] else self._preprocess(texts, use)
            features = {k: v.to(self.device) if isinstance(v, torch.Tensor) else v for k, v in features.items()}
            vectors = self.model(features, task=use.task)["sentence_embedding"].float()
            if self.model.truncate_dim is not None:
                vectors = vectors[:, : self.model.truncate_dim]
            if self.profile.normalize:
                vectors = torch.nn.functional.normalize(vectors)
            result: NDArray[np.float32] = vectors.cpu().numpy()
        return result

    def _tokenize(self, texts: list[str], prompt: str) -> tuple[list[str], list[Features], NDArray[np.int64]]:
        """The texts without what is surely never read, each one's tokens, and its length in tokens.

        A tokenizer takes a second for a megabyte of which 256 tokens are read, so a long text is cut first. Tokens
        may be longer than the cut allows for (white space, a word of a thousand letters): a cut text that does not
        give at least twice the tokens that are read is tokenised whole.
        """
        tokenizer = self._tokenizer
        if tokenizer is None:  # a model without a transformer: any measure of length will do
            return texts, [{} for _ in texts], np.array([1 + len(prompt + text) // 4 for text in texts])
        limit = CHARACTERS_PER_TOKEN * tokenizer.model_max_length
        can_cut = tokenizer.is_fast and tokenizer.truncation_side == "right"
        cut = [text[:limit] if can_cut else text for text in texts]
        with self._lock:
            tokens, overflows = self._tokens(tokenizer, [prompt + text for text in cut])
            for row, overflow in enumerate(overflows):
                if len(cut[row]) < len(texts[row]) and overflow < 2:
                    cut[row] = texts[row]
                    tokens[row] = self._tokens(tokenizer, [prompt + texts[row]])[0][0]
        return cut, tokens, np.array([len(features["input_ids"]) for features in tokens])

    @staticmethod
    def _tokens(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> tuple[list[Features], list[int]]:
        """Each text's features as lists, and into how many further pieces of full length its remainder goes."""
        encoded = tokenizer(texts, truncation=True, verbose=False)
        features = [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]
        return features, [len(encoding.overflowing) for encoding in encoded.encodings or []]

    def _pad(self, tokens: list[Features]) -> Features:
        assert self._tokenizer is not None
        rows = {key: [features[key] for features in tokens] for key in tokens[0]}
        return dict(self._tokenizer.pad(rows, return_tensors="pt", verbose=False))

    def _preprocess(self, texts: list[str], use: _Use) -> Features:
        """As `encode_document` and `encode_query` do it."""
        return dict(self.model.preprocess(texts, prompt=use.prompt or None, task=use.task))

    def _ask_tokens_suffice(self, use: _Use) -> bool:
        """Whether padded tokens are all that the model's own `preprocess` makes of a text, so that it can be skipped.

        It is not so for chat templates, prompts that pooling leaves out, lengths of one task alone, or models without
        a transformer, or with several.
        """
        if self._tokenizer is None:
            return False
        texts = ["a short text", "a text that is a little longer, with a number: 12"]
        if self.max_length is not None and self.max_length <= LONGEST_ASKED:
            texts.append("a " * (self.max_length + 1))
        try:
            theirs = {k: v for k, v in self._preprocess(texts, use).items() if k != "modality"}
        except Exception as error:
            raise ProfileError(
                f"Profile {self.profile.name}: {self.profile.model} takes no {use.task}: {_first_line(error)}"
            ) from error
        ours = self._pad(self._tokenize(texts, use.prompt)[1])
        return theirs.keys() == ours.keys() and all(torch.equal(torch.as_tensor(theirs[k]), ours[k]) for k in ours)

    def _cosine_of_half(self) -> float:
        """The lowest cosine of vectors in 16 bits to those in float32, on a few texts; 1 if all is in float32."""
        half = self.half
        if half is None:
            return 1.0
        in_half = self.encode_documents(PRECISION_TEXTS).astype(np.float64)
        self.half = None
        in_full = self.encode_documents(PRECISION_TEXTS).astype(np.float64)
        self.half = half
        lengths = np.linalg.norm(in_half, axis=1) * np.linalg.norm(in_full, axis=1)
        return float(((in_half * in_full).sum(axis=1) / np.where(lengths > 0, lengths, 1)).min())

    def _check_dimensions(self) -> None:
        dimensions = self.model.get_embedding_dimension()
        if dimensions != self.dimensions:
            raise ProfileError(
                f"Profile {self.profile.name}: {self.profile.model} gives {dimensions} dimensions, the profile says "
                f"{self.dimensions}; set dimensions (or EMBEDDING_DIMENSIONS) to {dimensions}, or name another model"
            )


def load_model(profile: Profile, device: torch.device) -> SentenceTransformer:
    """The model in float32, set to the profile's `max_length`, `dimensions`, `bidirectional`. Raises ProfileError."""
    folder = resolve_weights(profile)
    try:
        with _without_progress_bars():
            model = SentenceTransformer(
                str(folder),
                device=str(device),
                local_files_only=True,
                trust_remote_code=profile.trust_remote_code,
                model_kwargs={"dtype": torch.float32},  # else weights stored in 16 bits crawl on most CPUs
            )
    except Exception as error:
        raise ProfileError(f"Profile {profile.name}: {folder} cannot be loaded: {_first_line(error)}") from error
    model.eval()
    own_dimensions = model.get_embedding_dimension()
    if own_dimensions is not None and profile.dimensions < own_dimensions:  # a Matryoshka model's vectors, shortened
        model.truncate_dim = profile.dimensions
    if profile.bidirectional:
        if model.transformers_model is None:
            raise ProfileError(f"Profile {profile.name}: bidirectional needs a transformer, which {folder} is not")
        # Read at each call. As a `config_kwargs` of the constructor it is dropped, without a word.
        model.transformers_model.config.is_causal = False
    if profile.max_length is not None:
        positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        if positions is not None and profile.max_length > positions:
            raise ProfileError(
                f"Profile {profile.name}: max_length {profile.max_length} is more than the {positions} tokens that "
                f"{profile.model} can read"
            )
        try:
            model.max_seq_length = profile.max_length
        except AttributeError as error:  # a static model
            raise ProfileError(
                f"Profile {profile.name}: {profile.model} reads whole texts, so max_length {profile.max_length} cannot "
                "be kept; declare it without max_length, as a mapping in defs.yaml"
            ) from error
    return model


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _device(profile: Profile) -> torch.device:
    if profile.device is None:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(profile.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ProfileError(
            f"Profile {profile.name}: device {profile.device} cannot be used here ({_first_line(error)}); set "
            "EMBEDDING_DEVICE=cpu, or leave it out"
        ) from error
    return device


def _half(profile: Profile, device: torch.device) -> torch.dtype | None:
    """The 16-bit type in which matrix products are fast on this device, or None.

    bfloat16 keeps MiniLM's cosine to float32 at 0.9999. On a CPU without instructions for it, it is emulated and
    ten times slower than float32.
    """
    if device.type == "cpu":
        has = torch.cpu.get_capabilities()
        return torch.bfloat16 if has.get("avx512_bf16") or has.get("amx_bf16") else None
    if device.type == "cuda" and profile.gpu_precision != "float32":
        return torch.float16 if profile.gpu_precision == "float16" else torch.bfloat16
    return None


def _out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(words in str(error) for words in ("can't allocate memory", "not enough memory", "bad_alloc"))


def _well_formed(text: str) -> str:
    """The text with lone surrogates, which no tokenizer takes, replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


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


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
