"""How many tokens a hosted model counts in a text: by its own tokenizer, if that is on this machine, else estimated.

Nothing is fetched for it. A model's tokenizer is here if its weights are, or if only its `tokenizer.json` is in the
Hugging Face cache; OpenAI's models publish none that way.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.config.weights import weights_here
from embeddings_pipeline.encoders.limits import estimated_tokens
from embeddings_pipeline.errors import PipelineError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

log = logging.getLogger(__name__)

TEXTS_AT_ONCE = 256


def counts_exactly(profile: Profile) -> bool:
    """Whether the model's own tokenizer counts."""
    return _tokenizer(replace(profile, provider="local")) is not None


def count_tokens(profile: Profile, texts: Sequence[str]) -> NDArray[np.int64]:
    """The number of tokens of each text with the document prompt, special tokens included; estimated if need be."""
    prompted = [(profile.document_prompt or "") + text for text in texts]
    tokenizer = _tokenizer(replace(profile, provider="local"))
    if tokenizer is None:
        return estimated_tokens(prompted)
    counts: list[int] = []
    for start in range(0, len(prompted), TEXTS_AT_ONCE):
        counts += [len(encoding.ids) for encoding in tokenizer.encode_batch(prompted[start : start + TEXTS_AT_ONCE])]
    return np.array(counts, np.int64)


@cache
def _tokenizer(profile: Profile) -> "Tokenizer | None":
    """Of the model of a profile; None if it is not here."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError
    from tokenizers import Tokenizer

    try:
        folder = weights_here(profile)
        file = folder / "tokenizer.json" if folder else None
        if file is None or not file.is_file():
            cached = try_to_load_from_cache(profile.model, "tokenizer.json", revision=profile.revision)
            if not isinstance(cached, str):
                return None
            file = Path(cached)
    except (HFValidationError, PipelineError):  # a name that no repository has
        return None
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library's errors have no other class
        log.warning("%s cannot be read, so tokens of %s are estimated: %s", file, profile.model, error)
        return None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
