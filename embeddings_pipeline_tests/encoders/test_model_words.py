"""A local model's own words: its prompts, measure, length and modules are used as sentence-transformers uses them."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Router
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, StaticEmbedding, Transformer

from embeddings_pipeline.config.fingerprint import fingerprint
from embeddings_pipeline.config.model_words import differences, model_warning, model_words, with_model_prompts
from embeddings_pipeline.config.profiles import BUILT_IN, Profile
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.encoders import load_encoder
from embeddings_pipeline.encoders.base import tokens_read
from embeddings_pipeline.encoders.comparison import compare
from embeddings_pipeline.encoders.convert import Refused
from embeddings_pipeline.encoders.local import KEPT_COSINE, LocalEncoder
from embeddings_pipeline.errors import ProfileError
from embeddings_pipeline_tests.support.converted import convert
from embeddings_pipeline_tests.support.tiny_models import WORDS, bert, sentence_model, tokenizer_of

TEXTS = ["one", "two three", "nine " * 100, " ".join(WORDS), "ten " * 7]
PROMPTS = {"query": "one two ", "document": "seven "}
CONFIG = "config_sentence_transformers.json"


def profile_of(folder: Path, **settings: Any) -> Profile:
    values = {"name": "mine", "provider": "local", "model": str(folder), "dimensions": 32, "device": "cpu"}
    return Profile(**{**values, **settings})


def say(folder: Path, **words: Any) -> Path:
    """Change what the model's config says."""
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **words}))
    return folder


def router(folder: Path) -> Path:
    for route in ("query", "document"):
        bert(folder / route, initializer_range=0.3 if route == "query" else 0.2)
    query, document = ([Transformer(str(folder / route)), Pooling(32)] for route in ("query", "document"))
    model = SentenceTransformer(modules=[Router.for_query_document(query, document)], device="cpu", prompts=PROMPTS)
    model.save(str(folder / "model"))
    return folder / "model"


def static(folder: Path) -> Path:
    tokenizer = tokenizer_of(folder / "tokenizer")
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=32)], device="cpu").save(str(folder / "m"))
    return folder / "m"


def bare(folder: Path) -> Path:
    bert(folder, initializer_range=0.3)
    return folder


def without_limit(folder: Path) -> Path:
    """The tokenizer says no limit, and neither does the config."""
    model = sentence_model(folder, Pooling(32), prompts=PROMPTS)
    for name, key in (("tokenizer_config.json", "model_max_length"), ("config.json", "max_position_embeddings")):
        config = json.loads((model / name).read_text())
        config[key] = 10**30 if key == "model_max_length" else 512
        (model / name).write_text(json.dumps(config))
    bert(folder / "longer", max_position_embeddings=512, initializer_range=0.3)
    shutil.copy(folder / "longer" / "model.safetensors", model)
    return model


MODELS: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
    "prompts": (lambda folder: sentence_model(folder, Pooling(32), prompts=PROMPTS), {}),
    "empty prompts": (lambda folder: sentence_model(folder, Pooling(32), prompts={"query": "", "document": ""}), {}),
    "a passage prompt": (lambda folder: sentence_model(folder, Pooling(32), prompts={"passage": "six "}), {}),
    "a default prompt": (
        lambda folder: sentence_model(folder, Pooling(32), prompts={"sts": "six "}, default_prompt_name="sts"),
        {},
    ),
    "query is the default": (
        lambda folder: sentence_model(folder, Pooling(32), prompts=PROMPTS, default_prompt_name="query"),
        {},
    ),
    "prompts left out of pooling": (
        lambda folder: sentence_model(folder, Pooling(32, "mean", include_prompt=False), prompts=PROMPTS),
        {},
    ),
    "max_seq_length": (lambda folder: sentence_model(folder, Pooling(32), max_length=9, prompts=PROMPTS), {}),
    "last token": (lambda folder: sentence_model(folder, Pooling(32, "lasttoken"), prompts=PROMPTS), {}),
    "two poolings": (lambda folder: sentence_model(folder, Pooling(32, ("cls", "mean"))), {"dimensions": 64}),
    "dense": (lambda folder: sentence_model(folder, Pooling(32), Dense(32, 16), Normalize()), {"dimensions": 16}),
    "cut dimensions": (
        lambda folder: say(sentence_model(folder, Pooling(32), Normalize()), truncate_dim=20),
        {"dimensions": 20},
    ),
    "normalize false": (lambda folder: sentence_model(folder, Pooling(32)), {"normalize": False}),
    "the profile's prompts": (
        lambda folder: sentence_model(folder, Pooling(32), prompts=PROMPTS),
        {"query_prompt": "", "document_prompt": "nine nine ", "max_length": 12},
    ),
    "no modules.json": (bare, {}),
    "a router": (router, {}),
    "static": (static, {}),
    "no limit": (without_limit, {}),
}


def test_a_model_that_16_bits_would_change_runs_in_float32(tmp_path: Path) -> None:
    folder = sentence_model(tmp_path, Pooling(32, ("cls", "mean")))
    encoder = LocalEncoder(profile_of(folder, dimensions=64))
    encoder.half = torch.bfloat16
    assert encoder._cosine_of_half() < KEPT_COSINE  # in any machine: 16 bits can be emulated
    assert LocalEncoder(profile_of(folder, dimensions=64)).half is None


NOT_CONVERTED = {"prompts left out of pooling", "a router", "static"}


@pytest.mark.parametrize("name", MODELS)
def test_openvino_gives_the_vectors_of_encode_document_and_encode_query(name: str, tmp_path: Path) -> None:
    make, settings = MODELS[name]
    profile = profile_of(make(tmp_path), **settings)
    if name in NOT_CONVERTED:
        with pytest.raises(Refused, match=r"^its? [^\n]*$"):
            convert(profile, tmp_path / "converted")
        return
    encoder = convert(profile, tmp_path / "converted")
    assert min(compare(profile, encoder, TEXTS)) >= 0.9999
    assert encoder.count_tokens(TEXTS).tolist() == LocalEncoder(profile).count_tokens(TEXTS).tolist()
    assert tokens_read(encoder, profile) == tokens_read(LocalEncoder(profile), profile)


@pytest.mark.parametrize("name", MODELS)
def test_vectors_are_those_of_encode_document_and_encode_query(name: str, tmp_path: Path) -> None:
    make, settings = MODELS[name]
    profile = profile_of(make(tmp_path), **settings)
    assert min(compare(profile, LocalEncoder(profile), TEXTS)) >= 0.9999


def test_minilm_says_nothing_more_and_keeps_its_fingerprint() -> None:
    assert fingerprint(BUILT_IN["minilm"]) == "60fce31310a8"
    assert model_warning(BUILT_IN["minilm"]) is None
    words = model_words(BUILT_IN["minilm"])
    assert (words.pooling, words.max_length, words.normalizes, words.prompts) == ("mean", 256, True, {})


def test_the_models_own_prompts_are_part_of_the_fingerprint_and_count_as_if_the_profile_said_them(
    tmp_path: Path,
) -> None:
    folder = sentence_model(tmp_path, Pooling(32), prompts=PROMPTS)
    mine = profile_of(folder)
    assert with_model_prompts(mine).document_prompt == "seven "
    assert fingerprint(mine) == fingerprint(replace(mine, document_prompt="seven "))
    assert fingerprint(mine) != fingerprint(replace(mine, document_prompt=""))
    before = fingerprint(mine)
    say(folder, prompts={**PROMPTS, "document": "eight "})
    assert with_model_prompts(mine).document_prompt == "eight "
    assert fingerprint(mine) != before


def test_one_warning_names_each_difference_and_the_profile_counts(tmp_path: Path) -> None:
    folder = sentence_model(tmp_path, Pooling(32), Normalize(), max_length=20, prompts=PROMPTS)
    mine = profile_of(folder, query_prompt="ten ", document_prompt="", max_length=10, normalize=False)
    warning = model_warning(mine)
    assert warning is not None and "\n" not in warning
    for word in ('query_prompt is "ten "', '"one two "', 'document_prompt is ""', '"seven "', "10 tokens", "normalize"):
        assert word in warning
    assert model_warning(profile_of(folder)) is None
    assert model_warning(profile_of(folder, document_prompt="seven ", query_prompt="one two ", max_length=20)) is None


def test_an_empty_prompt_of_the_model_differs_from_none_of_the_profiles(tmp_path: Path) -> None:
    folder = sentence_model(tmp_path, Pooling(32), prompts={"query": "", "document": ""})
    mine = profile_of(folder, query_prompt="one ", document_prompt="two ")
    assert differences(mine, model_words(mine)) == []


@pytest.mark.parametrize(
    "words", [{"prompts": {"passage": "six "}}, {"prompts": {"sts": "six "}, "default_prompt_name": "sts"}]
)
def test_a_prompt_that_the_library_puts_before_nothing_is_named(words: dict[str, Any], tmp_path: Path) -> None:
    folder = say(sentence_model(tmp_path, Pooling(32)), **words)
    warning = model_warning(profile_of(folder))
    assert warning is not None and 'document_prompt: "six "' in warning
    assert model_warning(profile_of(folder, document_prompt="six ", query_prompt="")) is None


def test_a_folder_without_modules_says_that_its_pooling_is_a_guess_and_which(tmp_path: Path) -> None:
    bert(tmp_path)
    warning = model_warning(profile_of(tmp_path))
    assert warning is not None and "pooling (mean) is a guess" in warning and "modules.json" in warning
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["Qwen2ForCausalLM"]}))
    assert "pooling (lasttoken) is a guess" in str(model_warning(profile_of(tmp_path)))


@pytest.mark.parametrize(
    ("measure", "normalizes", "allowed"),
    [
        ("cosine", False, True),
        ("dot", True, True),  # unit vectors: the order is that of cosine
        ("euclidean", True, True),
        ("manhattan", True, False),
        ("dot", False, False),
        ("euclidean", False, False),
        ("a new one", True, False),
    ],
)
def test_a_model_of_another_measure_is_refused_unless_it_comes_to_the_same(
    measure: str, normalizes: bool, allowed: bool, tmp_path: Path, encoder_settings: Settings
) -> None:
    modules = [Pooling(32), Normalize()] if normalizes else [Pooling(32)]
    mine = profile_of(say(sentence_model(tmp_path, *modules), similarity_fn_name=measure))
    if allowed:
        assert fingerprint(mine)
        assert model_warning(mine) is None
        return
    for step in (fingerprint, partial(load_encoder, settings=encoder_settings)):
        with pytest.raises(ProfileError, match=rf"^Profile mine: [^\n]*compared by {measure}[^\n]*similarity: cosine"):
            step(mine)
    mine = replace(mine, similarity="cosine")
    assert fingerprint(mine)
    assert f"similarity is cosine, the model's own is {measure}" in str(model_warning(mine))


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("modules.json", "[{", "modules.json cannot be read"),
        ("modules.json", "", "modules.json cannot be read"),
        ("modules.json", "[]", "no list of modules"),
        ("modules.json", '{"a": 1}', "no list of modules"),
        ("modules.json", '[{"idx": 0}]', "no `type` or no `path`"),
        ("modules.json", '[{"type": "no.such.Module", "path": ""}]', "cannot be loaded"),
        ("1_Pooling/config.json", None, "config.json is missing"),
        ("1_Pooling/config.json", "[1]", "holds no object"),
        (CONFIG, "not json", "cannot be read"),
        (CONFIG, "[]", "holds no object"),
        (CONFIG, '{"prompts": ["query: "]}', "`prompts` is no mapping"),
        (CONFIG, '{"prompts": {"query": 5}}', "`prompts` is no mapping"),
        (CONFIG, '{"prompts": null}', "`prompts` is no mapping"),
        (CONFIG, '{"prompts": {"query": "q"}, "default_prompt_name": "web"}', "`default_prompt_name` is 'web'"),
        (CONFIG, '{"similarity_fn_name": 3}', "`similarity_fn_name` is no name"),
        ("sentence_bert_config.json", "{", "cannot be read"),
        ("model.safetensors.index.json", "{", "cannot be read"),
    ],
)
def test_a_broken_file_is_one_line(
    file: str, content: str | None, said: str, tmp_path: Path, encoder_settings: Settings
) -> None:
    folder = sentence_model(tmp_path, Pooling(32))
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    with pytest.raises(ProfileError, match=r"^Profile mine: [^\n]*$") as error:
        load_encoder(profile_of(folder), encoder_settings)
    assert said in str(error.value)


def test_the_length_that_counts_is_the_profiles_else_the_models_own_else_none(tmp_path: Path) -> None:
    folder = sentence_model(tmp_path, Pooling(32), max_length=20)
    for profile, length in ((profile_of(folder), 20), (profile_of(folder, max_length=7), 7)):
        assert tokens_read(LocalEncoder(profile), profile) == length
    assert model_words(profile_of(folder)).max_length == 20
    whole = profile_of(static(tmp_path / "static"))
    assert tokens_read(LocalEncoder(whole), whole) is None
    with pytest.raises(ProfileError, match=r"reads whole texts, so max_length 256 cannot be kept"):
        LocalEncoder(replace(whole, max_length=256))
