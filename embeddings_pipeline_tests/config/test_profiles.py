"""Profiles: precedence, errors that a user can act on, weights, fingerprints."""

import json
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from embeddings_pipeline.config.fingerprint import fingerprint
from embeddings_pipeline.config.profiles import BUILT_IN, Profile, resolve_profile
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.config.weights import keep_digests, resolve_weights
from embeddings_pipeline.errors import ProfileError

MINILM = BUILT_IN["minilm"]
OWN = {"name": "own", "provider": "python", "model": "package.module:Class", "dimensions": 8}


def settings(**values: object) -> Settings:
    unset = dict.fromkeys(Settings.model_fields)
    return Settings(**(unset | values))


def test_importing_profiles_neither_loads_torch_nor_takes_long() -> None:
    code = (
        "import sys, time; started = time.perf_counter(); import embeddings_pipeline.config.profiles as p; "
        "seconds = time.perf_counter() - started; "
        "print(sorted({'torch', 'dagster', 'sentence_transformers', 'transformers'} & set(sys.modules)), seconds)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    loaded, seconds = output.rsplit(" ", 1)
    assert loaded == "[]"
    assert float(seconds) < 5  # 0.03 s on an idle machine


def test_a_collection_that_declares_nothing_follows_the_environment_else_minilm() -> None:
    assert resolve_profile(None, settings()) == MINILM
    assert resolve_profile(None, settings(embedding_profile="speed")) == BUILT_IN["speed"]


def test_what_defs_yaml_declares_wins_over_the_environment() -> None:
    environment = settings(
        embedding_profile="speed", embedding_model="x/y", embedding_dimensions=7, embedding_provider="openai"
    )
    assert resolve_profile("minilm", environment) == MINILM
    assert resolve_profile(OWN, environment) == Profile(
        name="own", provider="python", model="package.module:Class", dimensions=8
    )


def test_device_and_batch_size_of_the_environment_always_apply() -> None:
    environment = settings(embedding_device="cpu", embedding_batch_size=16)
    for declared in (None, "minilm", OWN):
        profile = resolve_profile(declared, environment)
        assert (profile.device, profile.batch_size) == ("cpu", 16)


def test_the_environment_may_name_another_model_where_nothing_is_declared() -> None:
    profile = resolve_profile(
        None, settings(embedding_provider="python", embedding_model="a.b:C", embedding_dimensions=12)
    )
    assert (profile.provider, profile.model, profile.dimensions) == ("python", "a.b:C", 12)
    assert resolve_profile(None, settings(embedding_provider="openai")) == BUILT_IN["openai"]


def test_another_provider_without_a_model_is_refused() -> None:
    with pytest.raises(ProfileError, match="EMBEDDING_PROVIDER=python needs EMBEDDING_MODEL"):
        resolve_profile(None, settings(embedding_provider="python"))


def test_a_folder_named_like_the_declared_model_gives_it_its_weights(tmp_path: Path) -> None:
    plain, cached = tmp_path / "bge-small-en-v1.5", tmp_path / "models--BAAI--bge-small-en-v1.5" / "snapshots" / "5c38"
    for folder in (plain, cached):
        folder.mkdir(parents=True)
        profile = resolve_profile("speed", settings(embedding_model=str(folder)))
        assert profile == replace(BUILT_IN["speed"], model=str(folder))


def test_a_folder_meant_for_another_collection_is_left_alone_and_said_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert resolve_profile("speed", settings(embedding_model=str(tmp_path))) == BUILT_IN["speed"]
    assert "not named bge-small-en-v1.5" in caplog.text


def test_an_unknown_profile_lists_the_known_ones_and_guesses() -> None:
    with pytest.raises(ProfileError, match=r"minilm, speed, quality, openai \(did you mean 'quality'\?\)"):
        resolve_profile("qualty", settings())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dimension": 3}, "dimension: this key is not known (did you mean 'dimensions'?)"),
        ({"dimensions": "384"}, "dimensions: '384' is not a whole number from 1"),
        ({"dimensions": True}, "dimensions: True is not a whole number from 1"),
        ({"dimensions": 0}, "dimensions: 0 is not a whole number from 1"),
        ({"normalize": "yes"}, "normalize: 'yes' is neither true nor false"),
        ({"max_length": "long"}, "max_length: 'long' is not a whole number from 1"),
        ({"provider": "locl"}, "provider: 'locl' is not 'local', 'openai' or 'python'"),
        ({"model": ""}, "model: it is blank"),
    ],
)
def test_a_profile_that_makes_no_sense_is_refused_by_key(change: dict[str, object], message: str) -> None:
    with pytest.raises(ProfileError) as error:
        resolve_profile({**OWN, **change}, settings())
    assert message in str(error.value)


def test_a_profile_without_its_required_keys_names_them() -> None:
    with pytest.raises(ProfileError, match=r"Profile own: model: this key is missing.*Missing too: dimensions"):
        resolve_profile({"name": "own", "provider": "local"}, settings())


def test_minilm_comes_with_the_project() -> None:
    assert (resolve_weights(MINILM) / "model.safetensors").is_file()


def test_without_network_a_missing_model_fails_at_once_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    started = time.perf_counter()
    with pytest.raises(ProfileError) as error:
        resolve_weights(BUILT_IN["speed"])
    assert time.perf_counter() - started < 5
    message = str(error.value)
    assert "\n" not in message
    for part in ("Profile speed", "BAAI/bge-small-en-v1.5", "EMBEDDING_MODEL=/path", "network access", "minilm"):
        assert part in message


@pytest.mark.parametrize("answers", ["refuses", "is silent"])
def test_a_hub_that_does_not_answer_fails_within_seconds(answers: str, tmp_path: Path) -> None:
    with socket.socket() as hub:
        hub.bind(("127.0.0.1", 0))
        if answers == "is silent":
            hub.listen()
        code = (
            "from embeddings_pipeline.config.profiles import BUILT_IN\n"
            "from embeddings_pipeline.config.weights import resolve_weights\n"
            "from embeddings_pipeline.errors import ProfileError\n"
            "try: resolve_weights(BUILT_IN['speed'])\n"
            "except ProfileError as error: print(error)"
        )
        environment = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.getsockname()[1]}", "HF_HOME": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=40, check=True
        )
    assert done.stdout.startswith("Profile speed: ")
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize("model", ["/no/such/folder", "./no/such/folder", "~/no-such-folder"])
def test_a_folder_that_is_not_there_is_not_looked_for_on_the_network(model: str) -> None:
    with pytest.raises(ProfileError, match="there is no folder"):
        resolve_weights(replace(MINILM, model=model))


def test_an_incomplete_folder_names_what_it_lacks(tmp_path: Path) -> None:
    profile = replace(MINILM, model=str(tmp_path))
    with pytest.raises(ProfileError, match=r"holds no modules.json or config.json"):
        resolve_weights(profile)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ProfileError, match=r"holds no model.safetensors"):
        resolve_weights(profile)
    (tmp_path / "model-1.safetensors").write_bytes(b"")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors", "b": "m-2"}}')
    with pytest.raises(ProfileError, match=r"holds no m-2"):
        resolve_weights(profile)


def test_the_same_weights_elsewhere_have_the_same_fingerprint(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(resolve_weights(MINILM), copy)
    (copy / "README.md").write_text("changed")
    (copy / "onnx").mkdir()
    (copy / "onnx" / "config.json").write_text("{}")
    (copy / "pytorch_model.bin").write_bytes(b"the same weights in the older format")
    assert fingerprint(replace(MINILM, model=str(copy))) == fingerprint(MINILM)


@pytest.mark.parametrize("file", ["model.safetensors", "1_Pooling/config.json", "tokenizer.json"])
def test_a_changed_model_file_changes_the_fingerprint(file: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(resolve_weights(MINILM), copy)
    with (copy / file).open("ab") as changed:
        changed.write(b" ")
    assert fingerprint(replace(MINILM, model=str(copy))) != fingerprint(MINILM)


def test_the_fingerprint_is_12_hex_characters_and_follows_what_changes_vectors() -> None:
    fields: list[dict[str, object]] = [
        {"dimensions": 383},
        {"normalize": False},
        {"document_prompt": "passage: "},
        {"max_length": 128},
        {"bidirectional": True},
        {"weights": "int8"},
    ]
    prints = [fingerprint(MINILM), *(fingerprint(replace(MINILM, **change)) for change in fields)]  # type: ignore[arg-type]
    assert len(set(prints)) == len(prints)
    assert all(len(value) == 12 and int(value, 16) >= 0 for value in prints)


def test_the_fingerprint_does_not_follow_what_changes_no_vector() -> None:
    other = replace(MINILM, name="other", query_prompt="query: ", device="cpu", batch_size=7, tokens_per_batch=99)
    assert fingerprint(other) == fingerprint(MINILM)


def test_providers_without_weights_are_told_apart_by_model_and_revision() -> None:
    openai = BUILT_IN["openai"]
    variants = [openai, replace(openai, model="text-embedding-3-large"), replace(openai, revision="2")]
    assert len({fingerprint(profile) for profile in variants}) == 3


def test_a_model_is_read_once_in_the_life_of_a_state_folder(tmp_path: Path) -> None:
    state = tmp_path / "state"
    first = fingerprint(MINILM, state)
    assert not state.exists()  # what only looks writes nothing
    keep_digests(state)
    code = (
        "import hashlib, pathlib, sys; from embeddings_pipeline.config import fingerprint as p, profiles\n"
        "hashlib.file_digest = None  # any reading of a file would fail\n"
        "print(p.fingerprint(profiles.BUILT_IN['minilm'], pathlib.Path(sys.argv[1])))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(state)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == first


@pytest.mark.parametrize("content", ["", "[]", "not json"])
def test_a_damaged_memory_of_digests_is_written_anew(content: str, tmp_path: Path) -> None:
    (tmp_path / "weights_digests.json").write_text(content)
    digest = fingerprint(MINILM, tmp_path)
    keep_digests(tmp_path)
    assert digest == fingerprint(MINILM) == fingerprint(MINILM, tmp_path)
    assert json.loads((tmp_path / "weights_digests.json").read_text())


def test_a_state_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    assert fingerprint(MINILM, tmp_path / "state") == fingerprint(MINILM)
    keep_digests(tmp_path / "state")


def test_weights_in_8_bits_are_for_local_models_on_a_processor() -> None:
    own = {"name": "mine", "provider": "local", "model": "/models/mine", "dimensions": 8, "weights": "int8"}
    with pytest.raises(ProfileError, match=r"Profile mine: .*`weights: int8` is for provider local"):
        resolve_profile({**own, "provider": "openai"}, Settings())
    with pytest.raises(ProfileError, match=r"Profile mine: .*`weights: int8` runs on a processor, not on cuda"):
        resolve_profile(own, Settings(embedding_device="cuda"))
    with pytest.raises(ProfileError, match=r"Profile mine: weights: .*int8"):
        resolve_profile({**own, "weights": "int4"}, Settings())
