"""What is kept to be told later may hold characters that PostgreSQL does not take."""

import pytest

from embeddings_pipeline.config.profiles import BUILT_IN
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.errors import PipelineError
from embeddings_pipeline.health.activity import activity, under_way
from embeddings_pipeline.health.check_results import CheckResult, checks_of, last_results, note_result
from embeddings_pipeline.health.failures import failure_kept, failures
from embeddings_pipeline.pipeline.collection import open_collection
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support.workbench import definition, films, make_films

UNSTORABLE, STORED = "NUL \x00 and half \udcff a character", "NUL \ufffd and half \ufffd a character"


@pytest.fixture(autouse=True)
def _films(database: Database, settings: Settings) -> None:
    make_films(database, films(3))
    open_collection(definition(), settings)


def test_why_a_step_failed(database: Database) -> None:
    with pytest.raises(PipelineError), failure_kept(database, "films", "scan"):
        raise PipelineError(UNSTORABLE)
    assert [failure.reason for failure in failures(database, "films")] == [STORED]


def test_what_a_check_found(database: Database) -> None:
    note_result(database, "films", CheckResult("model_drift", False, "error", UNSTORABLE))
    assert [result.description for result in last_results(database, "films", ["model_drift"])] == [STORED]


def test_what_was_spent_is_a_check_of_paid_models_alone(database: Database) -> None:
    note_result(database, "films", CheckResult("spend", False, "error", "too much"))
    found = {
        name: [result.name for result in last_results(database, "films", checks_of(definition(), BUILT_IN[name]))]
        for name in ("openai", "minilm")
    }
    assert found == {"openai": ["spend"], "minilm": []}


def test_who_is_at_work(database: Database) -> None:
    with activity(database, "films", "sync", who=UNSTORABLE):
        assert [each.who for each in under_way(database, "films")] == [STORED]
