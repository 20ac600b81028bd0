"""Models of two layers and a vocabulary of ten words, which tests save as folders."""

from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Transformer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
POSITIONS = 64


def tokenizer_of(folder: Path, *, pairs: bool = False, **settings: Any) -> PreTrainedTokenizerFast:
    """Saved in the folder; a token is a word, between two of its own. `pairs`: it reads two texts as BERT's does."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(names)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1" if pairs else None,
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
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


def cross_encoder(folder: Path, *, labels: int = 1, activation: str | None = None, **settings: Any) -> Path:
    """A cross-encoder of that size with random weights, saved as sentence-transformers saves one; its folder."""
    tokenizer = tokenizer_of(folder, pairs=True)
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    size |= {"vocab_size": len(tokenizer), "max_position_embeddings": POSITIONS, "num_labels": labels}
    config = BertConfig(**{**size, "initializer_range": 0.3, **settings})
    if activation:
        config.sentence_transformers = {"activation_fn": activation}
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder
