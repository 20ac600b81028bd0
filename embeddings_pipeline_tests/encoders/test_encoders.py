"""Encoders: the same vectors as sentence-transformers, in order, whatever the texts and the memory are."""

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tokenizers import pre_tokenizers
from transformers import Qwen2Config, Qwen2Model, Qwen2Tokenizer

from embeddings_pipeline.config.profiles import BUILT_IN, Profile
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.config.weights import resolve_weights
from embeddings_pipeline.encoders import load_encoder
from embeddings_pipeline.encoders.base import Encoder
from embeddings_pipeline.encoders.batches import BatchEncoder
from embeddings_pipeline.encoders.comparison import compare
from embeddings_pipeline.encoders.local import LocalEncoder
from embeddings_pipeline.encoders.openvino import OpenVinoEncoder
from embeddings_pipeline.errors import OutageError, OutOfMemoryError, PipelineError, ProfileError
from embeddings_pipeline_tests.support.tiny_models import WORDS, bert

MINILM = replace(BUILT_IN["minilm"], device="cpu")
TEXTS = [
    "A shark keeps a small town away from its beach.",
    "Dinosaurs break out of a theme park.",
    "",
    "Ein Film über das Meer",
    "word " * 400,
    "Dinosaurs break out of a theme park.",
    "海の映画 🎬",
    "A clown fish crosses the ocean to find his son, and meets a forgetful friend on the way.",
]


@pytest.fixture(scope="module", params=[OpenVinoEncoder, LocalEncoder])
def minilm(request: pytest.FixtureRequest, encoder_settings: Settings) -> BatchEncoder:
    encoder = LocalEncoder(MINILM) if request.param is LocalEncoder else load_encoder(MINILM, encoder_settings)
    assert isinstance(encoder, BatchEncoder) and isinstance(encoder, request.param)
    return encoder


@pytest.fixture(scope="module")
def reference() -> SentenceTransformer:
    model = SentenceTransformer(str(resolve_weights(MINILM)), device="cpu", model_kwargs={"dtype": torch.float32})
    model.max_seq_length = 256
    return model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """A two-layer BERT with a vocabulary of ten words, as a folder."""
    folder = tmp_path_factory.mktemp("tiny")
    bert(folder / "transformer")
    modules = [Transformer(str(folder / "transformer")), Pooling(32, "mean"), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder / "model"))
    return Profile(name="tiny", provider="local", model=str(folder / "model"), dimensions=32, device="cpu")


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def test_vectors_are_those_of_sentence_transformers_in_the_order_given(
    minilm: BatchEncoder, reference: SentenceTransformer
) -> None:
    vectors = minilm.encode_documents(TEXTS)
    assert vectors.dtype == np.float32
    assert vectors.shape == (len(TEXTS), 384)
    assert cosines(vectors, reference.encode(TEXTS)).min() >= 0.9999
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_bfloat16_keeps_the_cosine_to_float32(reference: SentenceTransformer) -> None:
    encoder = LocalEncoder(MINILM, half=torch.bfloat16)  # where the processor emulates it this is only slow
    assert cosines(encoder.encode_documents(TEXTS), reference.encode(TEXTS)).min() >= 0.9999
    assert all(m.weight.dtype == torch.bfloat16 for m in encoder.model.modules() if isinstance(m, torch.nn.Linear))


def test_nothing_to_encode_gives_an_empty_array(minilm: BatchEncoder) -> None:
    assert minilm.encode_documents([]).shape == (0, 384)
    assert minilm.encode_queries([]).shape == (0, 384)
    assert minilm.count_tokens([]).shape == (0,)


def test_equal_texts_are_encoded_once_and_get_equal_vectors(tiny: Profile) -> None:
    encoder = LocalEncoder(tiny)
    rows = rows_of_each_pass(encoder)
    vectors = encoder.encode_documents(["one two", "three", "one two", "one two"])
    assert sum(rows) == 2
    assert (vectors[0] == vectors[2]).all()
    assert (vectors[0] == vectors[3]).all()
    assert not np.allclose(vectors[0], vectors[1])


def test_a_batch_keeps_to_the_budget_of_tokens_with_prompt_and_padding(tiny: Profile) -> None:
    encoder = LocalEncoder(replace(tiny, tokens_per_batch=40, document_prompt="ten nine "))
    rows = rows_of_each_pass(encoder)
    # [CLS] ten nine … [SEP]: 10 tokens for six words, 5 for one word
    encoder.encode_documents([" ".join(WORDS[i:] + WORDS[:i])[: -len(WORDS[i - 1]) - 1] for i in range(3)] + WORDS)
    assert rows == [3, 8, 2]  # 3 × 13 tokens, 8 × 5, the rest


def test_batch_size_is_the_most_texts_of_one_pass(tiny: Profile) -> None:
    encoder = LocalEncoder(replace(tiny, batch_size=4))
    rows = rows_of_each_pass(encoder)
    encoder.encode_documents(WORDS)
    assert rows == [4, 4, 2]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] data. DefaultCPUAllocator: can't allocate memory: you tried"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_when_memory_runs_out_the_batch_is_halved_until_it_fits(tiny: Profile, error: Exception) -> None:
    expected = LocalEncoder(tiny).encode_documents(WORDS)
    encoder = LocalEncoder(tiny)
    rows = rows_of_each_pass(encoder)
    fail_on_more_than(encoder, 3, error)
    np.testing.assert_allclose(encoder.encode_documents(WORDS), expected, atol=1e-6)
    assert rows == [10, 5, 2, 2, 2, 2, 2]


def test_a_real_allocation_that_fails_is_recognised(tiny: Profile) -> None:
    encoder = LocalEncoder(tiny)

    def take_too_much(module: torch.nn.Module, arguments: tuple[dict[str, torch.Tensor]]) -> None:
        if len(arguments[0]["input_ids"]) > 1:
            torch.empty(1 << 55, dtype=torch.uint8)

    encoder.model.register_forward_pre_hook(take_too_much)
    assert np.isfinite(encoder.encode_documents(WORDS)).all()


def test_memory_too_small_for_one_text_says_so(tiny: Profile) -> None:
    encoder = LocalEncoder(tiny)
    fail_on_more_than(encoder, 0, MemoryError())
    with pytest.raises(OutOfMemoryError, match="one text of 4 tokens"):
        encoder.encode_documents(["one", "one two"])


def test_any_other_failure_is_a_pipeline_error_of_one_line(tiny: Profile) -> None:
    encoder = LocalEncoder(tiny)
    fail_on_more_than(encoder, 0, RuntimeError("shapes differ\nsecond line"))
    with pytest.raises(PipelineError, match=r"^Profile tiny: 1 texts could not be encoded: shapes differ$") as error:
        encoder.encode_documents(["one"])
    assert not isinstance(error.value, OutageError)


def test_vectors_that_are_not_numbers_come_back_for_the_caller_to_judge(tiny: Profile) -> None:
    encoder = LocalEncoder(tiny)
    first = encoder.model[0]
    first.register_forward_hook(lambda m, i, out: out | {"token_embeddings": out["token_embeddings"] * torch.nan})
    assert np.isnan(encoder.encode_documents(["one"])).all()


def test_several_threads_get_the_vectors_that_one_gets(tiny: Profile) -> None:
    encoder = LocalEncoder(tiny)
    groups = [[f"{a} {b}" for a in WORDS] for b in WORDS]
    expected = [encoder.encode_documents(group) for group in groups]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(encoder.encode_documents, groups * 3))
        list(pool.map(encoder.count_tokens, groups))
    for position, vectors in enumerate(found):
        np.testing.assert_allclose(vectors, expected[position % len(groups)], atol=1e-6)


def test_a_model_is_loaded_once_for_all_threads(tiny: Profile, encoder_settings: Settings) -> None:
    profile = replace(tiny, name="loaded once")
    start = threading.Barrier(4)

    def load(_: int) -> Encoder:
        start.wait()
        return load_encoder(profile, encoder_settings)

    with ThreadPoolExecutor(4) as pool:
        assert len({id(encoder) for encoder in pool.map(load, range(4))}) == 1


def test_prompts_go_before_queries_and_documents(tiny: Profile) -> None:
    plain = LocalEncoder(tiny)
    prompted = LocalEncoder(replace(tiny, query_prompt="nine ", document_prompt="ten "))
    np.testing.assert_allclose(prompted.encode_queries(["one"]), plain.encode_documents(["nine one"]), atol=1e-6)
    np.testing.assert_allclose(prompted.encode_documents(["one"]), plain.encode_documents(["ten one"]), atol=1e-6)
    assert prompted.count_tokens(["one"]).tolist() == [4]


def test_max_length_truncates_and_count_tokens_tells(tiny: Profile) -> None:
    encoder = LocalEncoder(replace(tiny, max_length=5))
    a, b = encoder.encode_documents(["one two three four", "one two three five six"])
    np.testing.assert_allclose(a, b, atol=1e-6)  # [CLS] one two three [SEP]
    assert encoder.count_tokens(["one two three", "one two three four"]).tolist() == [5, 6]


def test_a_max_length_beyond_the_models_positions_is_refused(tiny: Profile) -> None:
    with pytest.raises(ProfileError, match="max_length 65 is more than the 64 tokens"):
        LocalEncoder(replace(tiny, max_length=65))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_length": 2}, "of the 2 tokens that are read, 2 are the tokenizer's own"),
        ({"max_length": 8, "document_prompt": "one " * 6}, "8 are of its document_prompt and the tokenizer's own"),
        ({"query_prompt": "one " * 80}, "82 are of its query_prompt and"),
    ],
)
def test_a_length_that_leaves_nothing_of_a_text_is_refused(settings: dict[str, Any], said: str, tiny: Profile) -> None:
    with pytest.raises(ProfileError, match=rf"^Profile tiny: [^\n]*{said}[^\n]*$"):
        LocalEncoder(replace(tiny, **settings))


@pytest.mark.parametrize(
    "text",
    ["A film about the sea. " * 50_000, " " * 1_000_000 + "sea", "x" * 1_000_000 + " sea", "y" * 9000 + " and the sea"],
    ids=["words", "white space first", "a word of a megabyte", "a long word first"],
)
def test_a_megabyte_of_text_gives_the_vector_of_its_first_tokens_soon(
    text: str, minilm: BatchEncoder, reference: SentenceTransformer
) -> None:
    started = time.perf_counter()
    vectors = minilm.encode_documents([text])
    assert time.perf_counter() - started < 30  # 0.1 s to 1 s on an idle machine
    assert cosines(vectors, reference.encode([text])).min() >= 0.9999
    assert (minilm.count_tokens([text])[0] > 256) == text.startswith("A film")


def test_broken_unicode_is_read_with_replacement_characters(minilm: BatchEncoder) -> None:
    texts = ["sea \ud800 film", "\udfff", "null \x00 character", "\ufffe\uffff"]
    vectors = minilm.encode_documents(texts)
    assert np.isfinite(vectors).all()
    np.testing.assert_allclose(vectors[0], minilm.encode_documents(["sea \ufffd film"])[0], atol=1e-5)
    assert (minilm.count_tokens(texts) >= 2).all()


def test_meaning_is_kept(minilm: BatchEncoder) -> None:
    query = minilm.encode_queries(["giant reptiles escape from an amusement park"])
    assert (minilm.encode_documents(TEXTS) @ query[0]).argmax() == 1


def test_a_model_of_other_dimensions_is_refused_with_the_remedy(tiny: Profile, encoder_settings: Settings) -> None:
    with pytest.raises(ProfileError, match=r"gives 32 dimensions, the profile says 384; .*EMBEDDING_DIMENSIONS"):
        load_encoder(replace(tiny, dimensions=384), encoder_settings)


def test_fewer_dimensions_than_the_models_own_are_its_first_ones_at_unit_length(
    tiny: Profile, encoder_settings: Settings
) -> None:
    texts = ["one two", "three"]
    whole, short = (load_encoder(one, encoder_settings) for one in (tiny, replace(tiny, dimensions=12)))
    for method in ("encode_documents", "encode_queries"):
        first = getattr(whole, method)(texts)[:, :12]
        expected = first / np.linalg.norm(first, axis=1, keepdims=True)
        np.testing.assert_allclose(getattr(short, method)(texts), expected, atol=1e-5)
    assert isinstance(short, BatchEncoder) and compare(short.profile, short, texts).documents > 0.9999


def test_a_damaged_model_is_an_error_of_one_line(tmp_path: Path, encoder_settings: Settings) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ProfileError, match=r"^Profile broken: .* cannot be loaded: [^\n]*$"):
        broken = Profile(name="broken", provider="local", model=str(tmp_path), dimensions=8, device="cpu")
        load_encoder(broken, encoder_settings)


def test_a_torch_that_cannot_be_imported_is_an_outage_of_one_line(
    tiny: Profile, encoder_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "embeddings_pipeline.encoders.local", None)
    with pytest.raises(OutageError, match=r"^Profile tiny: torch cannot load [^\n]* here: import of [^\n]*$"):
        load_encoder(replace(tiny, trust_remote_code=True), encoder_settings)


def test_a_device_that_is_not_there_is_an_error_of_one_line(encoder_settings: Settings) -> None:
    with pytest.raises(ProfileError, match=r"device cuda:7 cannot be used here \([^\n]*EMBEDDING_DEVICE=cpu"):
        load_encoder(replace(MINILM, device="cuda:7"), encoder_settings)


@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="this torch is a build with CUDA")
def test_a_torch_without_cuda_is_named_where_cuda_is_asked_for(encoder_settings: Settings) -> None:
    with pytest.raises(ProfileError, match=r"; torch \S+ is a build without CUDA: install one with it, or set [^\n]*$"):
        load_encoder(replace(MINILM, device="cuda"), encoder_settings)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """A two-layer Qwen2 that reads bytes and ends each text with a token of its own; the first token is the vector."""
    folder = tmp_path_factory.mktemp("decoder")
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(vocab=letters, merges=[], add_eos_token=True)
    tokenizer.save_pretrained(folder / "transformer")
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=64,
        initializer_range=0.5,  # the usual 0.02 would hide what attention does
    )
    Qwen2Model(config).save_pretrained(folder / "transformer")
    modules = [Transformer(str(folder / "transformer")), Pooling(32, "cls")]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder / "model"))
    return Profile(name="decoder", provider="local", model=str(folder / "model"), dimensions=32, device="cpu")


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("half", [None, torch.bfloat16])
def test_a_bidirectional_decoder_sees_what_follows(
    bidirectional: bool, half: torch.dtype | None, decoder: Profile
) -> None:
    encoder = LocalEncoder(replace(decoder, bidirectional=bidirectional), half=half)
    a, b, c = encoder.encode_documents(["abc", "abd", "abde"])
    assert np.allclose(a, b, atol=1e-3) is not bidirectional
    assert np.allclose(b, c, atol=1e-3) is not bidirectional


def test_a_tokenizer_that_ends_texts_with_a_token_of_its_own_still_does(decoder: Profile) -> None:
    assert LocalEncoder(decoder).count_tokens(["abc"]).tolist() == [4]


def test_a_text_without_tokens_has_no_vector_and_harms_no_other(decoder: Profile) -> None:
    encoder = LocalEncoder(decoder)
    assert encoder._tokenizer is not None
    encoder._tokenizer.add_eos_token = False
    vectors = encoder.encode_documents(["abc", "", "d"])
    assert np.isnan(vectors[1]).all()
    assert np.isfinite(vectors[[0, 2]]).all()


def test_a_users_own_class_is_an_encoder(encoder_settings: Settings) -> None:
    model = "embeddings_pipeline_tests.support.deterministic:DeterministicEncoder"
    encoder = load_encoder(Profile(name="own", provider="python", model=model, dimensions=64), encoder_settings)
    assert encoder.count_tokens(["a red car", ""]).tolist() == [3, 0]
    vectors = encoder.encode_documents(["a red car", "a red bus", "stock market news", "a red car", ""])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert vectors.dtype == np.float32
    assert (vectors[0] == vectors[3]).all()
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("no_such_package:Class", "No module named 'no_such_package'"),
        ("embeddings_pipeline_tests.support.deterministic:Missing", "has no attribute 'Missing'"),
        ("embeddings_pipeline_tests.support.deterministic", "wants model package.module:Class"),
    ],
)
def test_a_class_that_cannot_be_loaded_is_an_error_of_one_line(
    model: str, message: str, encoder_settings: Settings
) -> None:
    with pytest.raises(ProfileError, match=message):
        load_encoder(Profile(name="own", provider="python", model=model, dimensions=64), encoder_settings)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_gives_the_vectors_of_the_cpu(reference: SentenceTransformer) -> None:
    encoder = LocalEncoder(replace(MINILM, device="cuda"))
    assert encoder.half == torch.float16
    assert cosines(encoder.encode_documents(TEXTS), reference.encode(TEXTS)).min() >= 0.9999


def rows_of_each_pass(encoder: LocalEncoder) -> list[int]:
    rows: list[int] = []
    encoder.model.register_forward_pre_hook(lambda model, arguments: rows.append(len(arguments[0]["input_ids"])))
    return rows


def fail_on_more_than(encoder: LocalEncoder, most: int, error: Exception) -> None:
    """Raise inside the model for batches of more than `most` texts, as an allocation in one of its layers would."""

    def fail(module: torch.nn.Module, arguments: tuple[dict[str, torch.Tensor]]) -> None:
        if len(arguments[0]["input_ids"]) > most:
            raise error

    encoder.model[0].register_forward_pre_hook(fail)
