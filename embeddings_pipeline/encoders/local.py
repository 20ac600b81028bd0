"""Encoding on this machine with sentence-transformers and torch: on a GPU, and what OpenVINO cannot run.

Faster than its own `encode`: batches are those of `BatchEncoder`, and matrix products run in 16 bits if the device has
instructions for them.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
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
    Tokens,
    Use,
    check_dimensions,
    check_length,
    first_line,
    lowest_cosine,
)
from embeddings_pipeline.errors import OutageError, PipelineError, ProfileError
from embeddings_pipeline.forks import ProcessLock, compute

Features = dict[str, Any]

CPU_TOKENS_PER_BATCH = 1536
GPU_TOKENS_PER_BATCH = 65_536
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
LONGEST_ASKED = 40_000
"""Tokens up to which a model is asked, once it is loaded, what it makes of a text that is longer than it reads."""


class LocalEncoder(BatchEncoder):
    """A sentence-transformers model; see `Encoder` for the methods. Made by `load_encoder`."""

    def __init__(
        self, profile: Profile, half: torch.dtype | Literal["auto"] | None = "auto", threads: int | None = None
    ) -> None:
        """Load the model. `half`: the 16-bit type of matrix products, None for float32 throughout. `threads`: of a
        processor, for all models of this process; None leaves them as they are.
        """
        super().__init__(with_model_prompts(profile))
        profile = self.profile
        self.device = _device(profile)
        on_cpu = self.device.type == "cpu"
        if on_cpu and threads is not None:
            torch.set_num_threads(threads)
        self.tokens_per_batch = CPU_TOKENS_PER_BATCH if on_cpu else GPU_TOKENS_PER_BATCH
        self.half = _half(profile, self.device) if half == "auto" else half
        self.model = load_model(profile, self.device)
        tokenizer = getattr(self.model, "tokenizer", None)
        self._tokenizer = tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None
        self._lock = ProcessLock(ended_first=True)
        self._process = os.getpid()
        self._tokens_suffice = {use: self._ask_tokens_suffice(use) for use in (self._documents, self._queries)}
        check_dimensions(profile, self.model.get_embedding_dimension())
        if half == "auto" and on_cpu and self._cosine_of_half() < KEPT_COSINE:
            self.half = None
        if self.half is not None:
            # Once here rather than by autocast in each batch. Embeddings, norms and residuals stay float32.
            for module in self.model.modules():
                if isinstance(module, torch.nn.Linear):
                    module.to(self.half)

    @property
    def max_length(self) -> int | None:
        length = self.model.max_seq_length
        return int(length) if length is not None and length < NO_LIMIT else None

    @property
    def tokens_suffice(self) -> bool:
        """Whether the model reads the tokens of a text's prompt and of the text, and nothing else."""
        return all(self._tokens_suffice.values())

    def _count(self, texts: list[str]) -> Sequence[int]:
        with self._lock:
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

    def _start(self, texts: list[str], tokens: list[Features], use: Use) -> Callable[[], NDArray[np.float32]]:
        if self.device.type != "cpu" and self._process != os.getpid():
            raise ProfileError(
                f"Profile {self.profile.name}: the model was loaded on {self.device} before this process was forked, "
                "and cannot be used there after it: search first in the worker (without --preload), or set "
                "EMBEDDING_DEVICE=cpu"
            )
        return partial(compute, self._pass, texts, tokens, use)

    def _pass(self, texts: list[str], tokens: list[Features], use: Use) -> NDArray[np.float32]:
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

    @property
    def _characters_read(self) -> int | None:
        tokenizer = self._tokenizer
        if tokenizer is None or not tokenizer.is_fast or tokenizer.truncation_side != "right":
            return None
        return CHARACTERS_PER_TOKEN * tokenizer.model_max_length

    def _tokens(self, texts: list[str]) -> Tokens:
        if self._tokenizer is None:  # a model without a transformer: any measure of length will do
            return Tokens([{} for _ in texts], [1 + len(text) // 4 for text in texts], [0] * len(texts))
        with self._lock:
            encoded = self._tokenizer(texts, truncation=True, verbose=False)
        features = [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]
        overflows = [len(encoding.overflowing) for encoding in encoded.encodings or []]
        return Tokens(features, [len(one["input_ids"]) for one in features], overflows)

    def _pad(self, tokens: list[Features]) -> Features:
        assert self._tokenizer is not None
        rows = {key: [features[key] for features in tokens] for key in tokens[0]}
        return dict(self._tokenizer.pad(rows, return_tensors="pt", verbose=False))

    def _preprocess(self, texts: list[str], use: Use) -> Features:
        """As `encode_document` and `encode_query` do it."""
        return dict(self.model.preprocess(texts, prompt=use.prompt or None, task=use.task))

    def _ask_tokens_suffice(self, use: Use) -> bool:
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
            ignored = {"modality"} if self._prompt_counts() else {"modality", "prompt_length"}
            theirs = {k: v for k, v in self._preprocess(texts, use).items() if k not in ignored}
        except Exception as error:
            raise ProfileError(
                f"Profile {self.profile.name}: {self.profile.model} takes no {use.task}: {first_line(error)}"
            ) from error
        ours = self._pad(self._tokenize(texts, use.prompt)[1])
        return theirs.keys() == ours.keys() and all(torch.equal(torch.as_tensor(theirs[k]), ours[k]) for k in ours)

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
    """The model in float32, set to the profile's `max_length` and `bidirectional`. Raises ProfileError."""
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
    if profile.device is None:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(profile.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ProfileError(
            f"Profile {profile.name}: device {profile.device} cannot be used here ({first_line(error)}); set "
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
