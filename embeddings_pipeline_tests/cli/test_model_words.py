"""What `profile test`, `sync` and `status` say of how a local model is used, and of texts that are too long for it."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import dagster as dg
import pytest
import yaml
from sentence_transformers.sentence_transformer.modules import Pooling

from embeddings_pipeline.config.definition import COMPONENT_TYPE
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support.command_line import run_here
from embeddings_pipeline_tests.support.tiny_models import WORDS, bert, sentence_model
from embeddings_pipeline_tests.support.workbench import definition, films, make_films

Command = Callable[..., CompletedProcess[str]]


def command_of(folder: Path, **profile: Any) -> Command:
    """`embeddings-pipeline …` with one collection, whose profile is this local one."""
    values = {"name": "mine", "provider": "local", "dimensions": 32, "device": "cpu", **profile}
    config = definition(profile=values).attributes.model_dump(exclude_defaults=True, mode="json")
    (folder / "defs").mkdir()
    (folder / "defs" / "defs.yaml").write_text(yaml.safe_dump({"type": COMPONENT_TYPE, "attributes": config}))
    return lambda *arguments: run_here(arguments, {"EMBEDDINGS_DEFS_DIR": str(folder / "defs")})


def test_profile_test_shows_how_the_model_is_used_and_that_it_is_as_the_library_does(tmp_path: Path) -> None:
    prompts = {"query": "one two ", "document": "seven ", "sts": "six "}
    model = sentence_model(tmp_path, Pooling(32, "cls"), max_length=20, prompts=prompts)
    command = command_of(tmp_path, model=str(model), query_prompt="ten ", normalize=False)
    done = command("profile", "test")
    assert done.returncode == 0, done.stderr
    for line in (
        'document prompt               "seven "  (the model\'s own)',
        'query prompt                  "ten "  (the profile\'s)',
        "prompts not used              sts",
        "reads                         20 tokens of a text  (the model's own)",
        "measure                       cosine",
        "modules                       Transformer > Pooling",
        "pooling                       cls",
        "unit length                   no",
        "warning: Profile mine (" + str(model) + "): the profile counts where it and the model's files differ: "
        'query_prompt is "ten ", the model\'s own is "one two "',
    ):
        assert line in done.stdout
    [measured] = json.loads(command("profile", "test", "--json").stdout)
    assert min(measured["cosine_to_encode_document"], measured["cosine_to_encode_query"]) >= 0.9999
    assert measured["as_sentence_transformers"] is True
    shown = command("profile", "show", "mine").stdout
    assert "seven" in shown and re.search(r"^weights here +yes$", shown, re.MULTILINE)
    assert json.loads(command("profile", "show", "mine", "--json").stdout)["weights_here"] is True


def test_profile_show_says_that_weights_are_not_here(tmp_path: Path) -> None:
    command = command_of(tmp_path, model=str(tmp_path / "nowhere"))
    done = command("profile", "show", "mine")
    assert done.returncode == 0 and re.search(r"^weights here +no$", done.stdout, re.MULTILINE)
    assert "weights here" not in command("profile", "show", "openai").stdout


def test_profile_test_says_that_a_pooling_is_a_guess(tmp_path: Path) -> None:
    bert(tmp_path / "bare")
    done = command_of(tmp_path, model=str(tmp_path / "bare"))("profile", "test")
    assert "pooling                       mean  (a guess: the folder has no modules.json)" in done.stdout


def test_profile_test_of_a_broken_model_is_one_line(tmp_path: Path) -> None:
    model = sentence_model(tmp_path, Pooling(32))
    (model / "modules.json").write_text("[{")
    done = command_of(tmp_path, model=str(model))("profile", "test")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "modules.json cannot be read" in done.stderr


def test_sync_its_dry_run_status_and_the_check_count_texts_that_are_too_long(
    database: Database, project: Settings, instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    make_films(database, [*films(3), (4, "one two", " ".join(WORDS), 1)])
    model = sentence_model(tmp_path, Pooling(32), max_length=14)  # with the tokens at both ends
    command = command_of(tmp_path, model=str(model))
    dry = command("sync", "--dry-run")
    assert "4 texts to embed, 0 reused; texts longer than the model reads: 1 (the longest 15 tokens)" in dry.stdout
    done = command("sync")
    assert done.returncode == 0 and "truncation" in done.stderr  # it warns
    assert "texts longer than the model reads: 1 (the longest 15 tokens)" in done.stdout, done.stderr
    again = json.loads(command("sync", "--json").stdout)
    assert (again["embedded"], again["truncated"], again["longest_tokens"]) == (0, 1, 15)
    assert "too long        1  (texts longer than the model reads, the longest 15 tokens)" in command("status").stdout
    status = json.loads(command("status", "--json").stdout)
    assert (status["truncated"], status["longest_tokens"]) == (1, 15)
    key = dg.AssetCheckKey(dg.AssetKey(["films", "pgvector_index"]), "truncation")
    [record] = instance.event_log_storage.get_asset_check_execution_history(key, limit=1)
    assert record.event is not None and record.event.dagster_event is not None
    evaluation = record.event.dagster_event.asset_check_evaluation_data
    assert (evaluation.passed, evaluation.severity) == (False, dg.AssetCheckSeverity.WARN)
    assert evaluation.description is not None
    assert evaluation.description.startswith(
        "1 of 4 texts (25.00 %) longer than the model reads, the longest 15 tokens"
    )


@pytest.mark.parametrize("measure", ["dot", "euclidean"])
def test_a_refused_model_is_one_line_with_the_remedy(
    measure: str, database: Database, project: Settings, tmp_path: Path
) -> None:
    make_films(database, films(3))
    model = sentence_model(tmp_path, Pooling(32), similarity_fn_name=measure)
    done = command_of(tmp_path, model=str(model))("sync")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert f"compared by {measure}" in done.stderr and "`similarity: cosine`" in done.stderr
