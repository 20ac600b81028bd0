"""Models of two layers and a vocabulary of ten words, which tests save as folders."""

from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Transformer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
POSITIONS = 64


def tokenizer_of(folder: Path, **settings: Any) -> PreTrainedTokenizerFast:
    """Saved in the folder; a token is a word, between two of its own."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(names)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    settings = {"model_max_length": POSITIONS, **settings}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", **settings)
    tokenizer.save_pretrained(folder)
    return tokenizer


def bert(folder: Path, **settings: Any) -> None:
    """A BERT of 32 dimensions and its tokenizer, in the folder."""
    tokenizer = tokenizer_of(folder)
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    size |= {"vocab_size": len(tokenizer), "max_position_embeddings": POSITIONS}
    BertModel(BertConfig(**{**size, **settings})).save_pretrained(folder)


def sentence_model(folder: Path, *modules: Any, max_length: int | None = None, **settings: Any) -> Path:
    """A sentence-transformers model of that BERT and `modules` after it, saved; its folder."""
    bert(folder / "transformer", initializer_range=0.3)
    model = SentenceTransformer(modules=[Transformer(str(folder / "transformer")), *modules], device="cpu", **settings)
    if max_length is not None:
        model.max_seq_length = max_length
    model.save(str(folder / "model"))
    return folder / "model"
