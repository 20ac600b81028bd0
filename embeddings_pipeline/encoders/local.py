"""Encoding on this machine with sentence-transformers and torch: on a GPU, and what OpenVINO cannot run.

Faster than its own `encode`: batches are those of `BatchEncoder`; matrix products run in 16 bits if a processor has
instructions for them, and on a GPU the whole model does. A GPU has its next passes before it has ended one, tokens are
made meanwhile, and nobody waits for a copy.
"""

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Dropout, LayerNorm, Pooling
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from embeddings_pipeline.config.model_words import NO_LIMIT, with_model_prompts
from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.config.weights import resolve_weights
from embeddings_pipeline.encoders.batches import (
    CHARACTERS_PER_TOKEN,
    BatchEncoder,
    Result,
    Use,
    check_dimensions,
    check_length,
    first_line,
    lowest_cosine,
)
from embeddings_pipeline.encoders.device import FEWEST_TOKENS, Link, padded, useful_tokens
from embeddings_pipeline.encoders.processor import has_bf16
from embeddings_pipeline.encoders.token_rows import Padding, TokenRows, Tokens
from embeddings_pipeline.encoders.windows import Window
from embeddings_pipeline.errors import OutageError, PipelineError, ProfileError
from embeddings_pipeline.forks import ProcessLock, compute

log = logging.getLogger(__name__)

Features = dict[str, Any]

CPU_TOKENS_PER_BATCH = 1536
PASSES_AHEAD = 3  # of a GPU, which are begun before the first one's vectors are asked for
TEXTS_AHEAD, WINDOWS_AHEAD = (2_048, 16_384), 2
"""A GPU reads faster than a tokenizer writes. One thread has the tokenizer while the other makes rows of what it said;
of many texts, more are as long as each other, and passes are larger and fewer.
"""
PASSES_TIMED, TEXTS_TRIED = 3, 512
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
KNOWN = (Transformer, Pooling, Dense, Normalize, LayerNorm, Dropout)
"""Modules of sentence-transformers that look at nothing but tokens; a pooling, at the prompt's length if it says so."""
READ = {"input_ids", "attention_mask", "token_type_ids"}
"""What `TokenRows` makes of texts."""
LONGEST_ASKED = 40_000
"""Tokens up to which a model is asked, once it is loaded, what it makes of a text that is longer than it reads."""


class LocalEncoder(BatchEncoder):
    """A sentence-transformers model; see `Encoder` for the methods. Made by `load_encoder`."""

    def __init__(
        self,
        profile: Profile,
        half: torch.dtype | Literal["auto"] | None = "auto",
        threads: int | None = None,
        pipelined: bool | None = None,
    ) -> None:
        """Load the model. `half`: the 16-bit type of matrix products, None for float32 throughout. `threads`: of a
        processor, for all models of this process; None leaves them as they are. `pipelined`: whether the model is used
        as on a GPU; None: if it is on one.
        """
        super().__init__(with_model_prompts(profile))
        profile = self.profile
        self.device = _device(profile)
        on_cpu = self.device.type == "cpu"
        if on_cpu and threads is not None:
            torch.set_num_threads(threads)
        self.pipelined = not on_cpu if pipelined is None else pipelined
        self.tokens_per_batch = CPU_TOKENS_PER_BATCH
        if self.pipelined:
            self.passes_at_once, self.tokens_per_batch = PASSES_AHEAD, FEWEST_TOKENS
            self.texts_of_window, self.windows_ahead = TEXTS_AHEAD, WINDOWS_AHEAD
        self._found = not self.pipelined
        self.half = _half(profile, self.device) if half == "auto" else half
        self.whole_in_half = False
        self._link = Link(self.device)
        self._lock, self._finding = ProcessLock(ended_first=True), ProcessLock()
        self._process = os.getpid()
        self._load()
        check_dimensions(profile, self.model.get_embedding_dimension())
        self._check_room()
        self._settle_precision(compared=half == "auto")

    def _load(self) -> None:
        """The model in float32, and what makes its tokens."""
        self.model = load_model(self.profile, self.device)
        tokenizer = getattr(self.model, "tokenizer", None)
        self._tokenizer = tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None
        self._rows = None if self._tokenizer is None else _token_rows(self._tokenizer)
        self._tokenizing = ProcessLock(ended_first=True) if self._rows is None else self._rows.lock
        self._tokens_suffice = {use: self._ask_tokens_suffice(use) for use in (self._documents, self._queries)}

    def _settle_precision(self, *, compared: bool) -> None:
        """Have in 16 bits what keeps the vectors there. On a GPU that is the whole model, or else its matrix products,
        while embeddings, norms and residuals stay float32, as `gpu_precision` asks; on a processor, these or nothing.
        """
        half = self.half
        if half is None:
            return
        if self.pipelined:
            self.half = None
            in_full = self.encode_documents(PRECISION_TEXTS)
            self.half, self.whole_in_half = half, True
            self.model.to(half)
            if lowest_cosine(self.encode_documents(PRECISION_TEXTS), in_full) >= KEPT_COSINE:
                return
            self.whole_in_half = False
            self._load()
        if compared and not self.pipelined and self._cosine_of_half() < KEPT_COSINE:
            self.half = None
            return
        # Once here rather than by autocast in each batch.
        for module in self.model.modules():
            if isinstance(module, torch.nn.Linear):
                module.to(half)

    @property
    def attention(self) -> str | None:
        """What computes the transformer's attention, as transformers calls it; `sdpa` is torch's own. None: no such."""
        config = getattr(self.model.transformers_model, "config", None)
        return getattr(config, "_attn_implementation", None)

    @property
    def max_length(self) -> int | None:
        length = self.model.max_seq_length
        return int(length) if length is not None and length < NO_LIMIT else None

    @property
    def tokens_suffice(self) -> bool:
        """Whether the model reads the tokens of a text's prompt and of the text, and nothing else."""
        return all(self._tokens_suffice.values())

    def _count(self, texts: list[str]) -> Sequence[int]:
        if self._rows is not None:
            return self._rows.count(texts)
        with self._tokenizing:
            if self._tokenizer is None:
                features = [self.model.preprocess([text]) for text in texts]
                return [f["input_ids"].numel() if "input_ids" in f else 0 for f in features]
            encoded = self._tokenizer(texts, return_attention_mask=False, verbose=False)
            return [len(ids) for ids in encoded["input_ids"]]

    def _failure(self, error: Exception, texts: int) -> PipelineError:
        if isinstance(error, torch.AcceleratorError):
            return OutageError(f"Profile {self.profile.name}: {self.device} failed: {first_line(error)}")
        return super()._failure(error, texts)

    def _out_of_memory(self, error: Exception) -> bool:
        return isinstance(error, torch.OutOfMemoryError) or super()._out_of_memory(error)

    def _start(self, texts: list[str], tokens: list[Any], use: Use) -> Result:
        if self.device.type != "cpu" and self._process != os.getpid():
            raise ProfileError(
                f"Profile {self.profile.name}: the model was loaded on {self.device} before this process was forked, "
                "and cannot be used there after it: search first in the worker (without --preload), or set "
                "EMBEDDING_DEVICE=cpu"
            )
        return compute(self._pass, texts, tokens, use)

    def _pass(self, texts: list[str], tokens: list[Any], use: Use) -> Result:
        """A device is given the whole pass and works on it meanwhile; a processor has done it."""
        mixed = self.half is not None and not self.whole_in_half
        autocast = torch.autocast(self.device.type, dtype=self.half) if mixed else contextlib.nullcontext()
        with self._lock, torch.inference_mode(), autocast:
            features = self._padded(tokens) if self._tokens_suffice[use] else self._preprocessed(texts, use)
            vectors = self.model(features, task=use.task)["sentence_embedding"].float()
            if self.model.truncate_dim is not None:
                vectors = vectors[:, : self.model.truncate_dim]
            if self.profile.normalize:
                vectors = torch.nn.functional.normalize(vectors)
                if self.whole_in_half:
                    vectors = vectors.half()  # as exact as the model, and half as much to copy
            return self._link.fetch(vectors)

    def _prepare(self, texts: list[str], use: Use) -> None:
        """On a GPU, find how large passes are with the first texts that are more than the smallest one, and keep it."""
        if self._found or self.profile.tokens_per_batch or sum(map(len, texts)) <= FEWEST_TOKENS:
            return
        with self._finding:
            window = self._tokenize(texts[:TEXTS_TRIED], use.prompt)
            if self._found or window.lengths.sum() <= FEWEST_TOKENS:
                return
            rate = partial(self._rate, window, use)
            self.tokens_per_batch = useful_tokens(rate, self._out_of_memory)
            self._found = True
            log.info("profile %s on %s: passes of %d tokens", self.profile.name, self.device, self.tokens_per_batch)

    def _rate(self, window: Window, use: Use, tokens: int) -> float:
        """Texts a second, in passes of so many tokens over texts of the window's middle length."""
        row = int(np.argsort(window.lengths)[len(window.lengths) // 2])
        texts = max(1, tokens // max(1, int(window.lengths[row])))
        batch, seconds = [row] * texts, []
        for _ in range(1 + PASSES_TIMED):  # the first one takes memory, and does not count
            began = time.perf_counter()
            self._begun(window, batch, use)()
            seconds.append(time.perf_counter() - began)
        return texts / min(seconds[1:])

    @property
    def _characters_read(self) -> int | None:
        if self._rows is None or self._tokenizer is None or self._tokenizer.truncation_side != "right":
            return None
        return CHARACTERS_PER_TOKEN * self._tokenizer.model_max_length

    def _tokens(self, texts: list[str]) -> Tokens:
        if self._rows is not None:
            return self._rows.read(texts)
        if self._tokenizer is None:  # a model without a transformer: any measure of length will do
            return Tokens([None for _ in texts], [1 + len(text) // 4 for text in texts], None)
        counts = list(self._count(texts))
        return Tokens([None for _ in texts], [min(n, self._tokenizer.model_max_length) for n in counts], counts)

    def _padded(self, tokens: list[Any]) -> Features:
        assert self._rows is not None
        return padded(self._rows, tokens, self._link)

    def _preprocessed(self, texts: list[str], use: Use) -> Features:
        features = self._preprocess(texts, use)
        return {k: self._link.send(v) if isinstance(v, torch.Tensor) else v for k, v in features.items()}

    def _preprocess(self, texts: list[str], use: Use) -> Features:
        """As `encode_document` and `encode_query` do it."""
        with self._tokenizing:
            return dict(self.model.preprocess(texts, prompt=use.prompt or None, task=use.task))

    def _ask_tokens_suffice(self, use: Use) -> bool:
        """Whether padded tokens are all that the model's own `preprocess` makes of a text, so that it can be skipped.

        It is not so for chat templates, prompts that pooling leaves out, lengths of one task alone, or models without
        a transformer, or with several.
        """
        if self._rows is None:
            return False
        texts = list(PRECISION_TEXTS)
        if self.max_length is not None and self.max_length <= LONGEST_ASKED:
            texts.append("a " * (self.max_length + 1))
        try:
            ignored = {"modality"} if self._prompt_counts() else {"modality", "prompt_length"}
            theirs = {k: v for k, v in self._preprocess(texts, use).items() if k not in ignored}
        except Exception as error:
            raise ProfileError(
                f"Profile {self.profile.name}: {self.profile.model} takes no {use.task}: {first_line(error)}"
            ) from error
        ours = self._padded(self._tokenize(texts, use.prompt).tokens)
        return theirs.keys() == ours.keys() and all(
            torch.equal(torch.as_tensor(theirs[k]), ours[k].cpu()) for k in ours
        )

    def _prompt_counts(self) -> bool:
        """Whether a module may ask how long the prompt is."""
        return any(type(module) not in KNOWN or not getattr(module, "include_prompt", True) for module in self.model)

    def _cosine_of_half(self) -> float:
        """The lowest cosine of vectors in 16 bits to those in float32, on a few texts; 1 if all is in float32."""
        half = self.half
        if half is None:
            return 1.0
        in_half = self.encode_documents(PRECISION_TEXTS)
        self.half = None
        in_full = self.encode_documents(PRECISION_TEXTS)
        self.half = half
        return lowest_cosine(in_half, in_full)


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
        raise ProfileError(f"Profile {profile.name}: {folder} cannot be loaded: {first_line(error)}") from error
    model.eval()
    own_dimensions = model.get_embedding_dimension()
    if own_dimensions is not None and profile.dimensions < own_dimensions:  # a Matryoshka model's vectors, shortened
        model.truncate_dim = profile.dimensions
    if profile.bidirectional:
        if model.transformers_model is None:
            raise ProfileError(f"Profile {profile.name}: bidirectional needs a transformer, which {folder} is not")
        # Read at each call. As a `config_kwargs` of the constructor it is dropped, without a word.
        model.transformers_model.config.is_causal = False
    check_length(profile, positions_of(model))
    if profile.max_length is not None:
        try:
            model.max_seq_length = profile.max_length
        except AttributeError as error:  # a static model
            raise ProfileError(
                f"Profile {profile.name}: {profile.model} reads whole texts, so max_length {profile.max_length} cannot "
                "be kept; declare it without max_length, as a mapping in defs.yaml"
            ) from error
    return model


def positions_of(model: SentenceTransformer) -> int | None:
    """The tokens that the model has positions for; None: it does not say."""
    positions: int | None = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return positions


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
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    asked = profile.device or accelerator or "cpu"
    try:
        device = torch.device(asked)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        lacks_cuda = str(asked).startswith("cuda") and not torch.backends.cuda.is_built()
        build = f"torch {torch.__version__} is a build without CUDA: install one with it, or " if lacks_cuda else ""
        raise ProfileError(
            f"Profile {profile.name}: device {asked} cannot be used here ({first_line(error)}); {build}set "
            "EMBEDDING_DEVICE=cpu, or leave it out"
        ) from error
    if device.type == "cuda":
        # cuDNN plans its attention anew for each number of texts and of tokens, which takes longer than the pass.
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def _token_rows(tokenizer: PreTrainedTokenizerBase) -> TokenRows | None:
    """The tokenizer without what transformers does around it; None if it is not a fast one, or then reads otherwise."""
    inputs, padding = tokenizer.model_input_names, tokenizer.pad_token_id
    if not tokenizer.is_fast or padding is None or not READ.issuperset(inputs):
        return None
    length = tokenizer.model_max_length if tokenizer.model_max_length < NO_LIMIT else None
    fill = Padding(tokenizer.padding_side, padding, tokenizer.pad_token_type_id)
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    rows = TokenRows(backend, inputs, length, tokenizer.truncation_side, fill)
    texts = [*PRECISION_TEXTS, "a " * (length + 1 if length is not None and length <= LONGEST_ASKED else 1)]
    theirs = tokenizer(texts, truncation=length is not None, verbose=False)["input_ids"]
    return rows if [ids.tolist() for ids, _ in rows.read(texts).tokens] == theirs else None


def _half(profile: Profile, device: torch.device) -> torch.dtype | None:
    """The 16-bit type in which matrix products are fast on this device, or None.

    bfloat16 keeps MiniLM's cosine to float32 at 0.9999. On a CPU without instructions for it, it is emulated and
    ten times slower than float32.
    """
    if device.type == "cpu":
        return torch.bfloat16 if has_bf16() else None
    if device.type == "cuda" and profile.gpu_precision != "float32":
        return torch.float16 if profile.gpu_precision == "float16" else torch.bfloat16
    return None
