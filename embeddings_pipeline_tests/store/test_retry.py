"""What is an outage, and that only an outage is tried again."""

import psycopg
import pytest

from embeddings_pipeline.errors import DatabaseError, OutageError
from embeddings_pipeline.store import retry
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.retry import is_outage, outage_attempts


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "OUTAGE_FIRST_WAIT_SECONDS", 0.01)


def failing(errors: list[Exception], *kinds: type[Exception]) -> int:
    """Attempts at something that fails with these errors, one after the other, and then goes well: how many."""
    tried = 0
    for attempt in outage_attempts("films", *kinds):
        with attempt:
            tried += 1
            if errors:
                raise errors.pop(0)
    return tried


def test_an_outage_is_waited_for_and_told(caplog: pytest.LogCaptureFixture) -> None:
    assert failing([OutageError("no answer"), OutageError("none again")], OutageError) == 3
    told = [record.getMessage() for record in caplog.records if record.name == retry.__name__]
    assert told == [
        "collection 'films': no answer; trying again in 0.01 s",
        "collection 'films': none again; trying again in 0.04 s",
    ]


def test_an_outage_that_lasts_is_raised_in_the_end() -> None:
    errors: list[Exception] = [OutageError(str(n)) for n in range(5)]
    with pytest.raises(OutageError, match="2"):
        failing(errors, OutageError)
    assert len(errors) == 2


def test_what_is_no_outage_is_raised_at_once() -> None:
    errors: list[Exception] = [DatabaseError("another kind"), OutageError("never tried")]
    with pytest.raises(DatabaseError):
        failing(errors, OutageError)
    assert len(errors) == 1


def test_a_session_that_the_server_ended_is_an_outage_and_a_wrong_statement_is_not(database: Database) -> None:
    with database.connect(autocommit=True) as connection, database.connect(autocommit=True) as other:
        with pytest.raises(psycopg.ProgrammingError) as wrong:
            connection.execute("SELECT nothing_of_that_name")
        other.execute("SELECT pg_terminate_backend(%s, 5000)", [connection.info.backend_pid])
        with pytest.raises(psycopg.OperationalError) as ended:
            connection.execute("SELECT 1")
    assert is_outage(ended.value) and not is_outage(wrong.value)
