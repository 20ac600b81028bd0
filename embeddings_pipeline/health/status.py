"""What `status` shows of a collection: a list of facts, each a function that gives what JSON calls by name."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import psycopg

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.encoders.batch_jobs import BatchJobs
from embeddings_pipeline.errors import VectorIndexError
from embeddings_pipeline.health.activity import under_way
from embeddings_pipeline.health.check_results import CheckResult, checks_of, last_results
from embeddings_pipeline.health.coverage import coverage
from embeddings_pipeline.health.failures import Waiting, failures, waiting
from embeddings_pipeline.index.faiss_read import read_manifest
from embeddings_pipeline.index.pgvector import describe_indexes
from embeddings_pipeline.index.standing import Standing, standing, why_foreign
from embeddings_pipeline.ledger.ledger import Ledger
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.models import CollectionState, Model, collection_identity, collection_state
from embeddings_pipeline.store.sql import load_sql

NO_FAISS: dict[str, Any] = {"generation": None, "vectors": 0, "current": False, "standing": Standing.MISSING.value}
COUNTS = ("items", "vectors", "missing", "stale", "orphans", "quarantined", "quarantined_items")
NEVER_RUN: dict[str, Any] = {
    **dict.fromkeys(("passed", "severity", "checked_at", "age_seconds")),
    **dict.fromkeys(("description", "remedy"), ""),
}


@dataclass(frozen=True)
class Subject:
    """The collection that is looked at."""

    definition: CollectionDefinition
    database: Database
    settings: Settings
    model: Model | None  # None: before the first sync
    state: CollectionState

    @property
    def name(self) -> str:
        return self.definition.name

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.definition, self.database)


def collection_status(definition: CollectionDefinition, database: Database, settings: Settings) -> dict[str, Any]:
    """Counts from the data itself, the current model, the indexes, what checks found, what failed, who is at work.
    Nothing is written, no model loaded.
    """
    with database.connect(autocommit=True) as connection:
        state = collection_state(connection, definition.name)
    if state is None:
        return empty_status(definition)
    subject = Subject(definition, database, settings, Ledger(definition, database).current(), state)
    figures: dict[str, Any] = {"collection": definition.name}
    for fact in FACTS:
        figures |= fact(subject)
    return figures


def empty_status(definition: CollectionDefinition) -> dict[str, Any]:
    """What `collection_status` says of a collection that no database knows."""
    return {
        "collection": definition.name,
        "profile": None,
        "fingerprint": None,
        **dict.fromkeys(COUNTS, 0),
        "coverage": 0.0,
        "truncated": 0,
        "longest_tokens": 0,
        "dirty_batches": 0,
        "waiting": asdict(Waiting(0, 0, None, None)),
        "quarantine": {"given_up": 0, "next_try": None},
        "pgvector_index": [],
        "faiss": dict(NO_FAISS),
        "last_scan": None,
        "failures": [],
        "checks": [{"name": name, **NEVER_RUN} for name in checks_of(definition, None)],
        "under_way": [],
        "batch_jobs": [],
        "definition": None,
        "database": None,
    }


def undefined_collections(database: Database, defined: list[str]) -> list[str]:
    """The collections that the database keeps and that are not defined."""
    try:
        with database.connect(autocommit=True) as connection:
            return [row[0] for row in connection.execute(load_sql("health/undefined"), {"defined": defined})]
    except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):  # nothing was ever synced there
        return []


def _model(subject: Subject) -> dict[str, Any]:
    model = subject.model
    return {
        "profile": model.profile.name if model else None,
        "fingerprint": model.destination.fingerprint if model else None,
    }


def _coverage(subject: Subject) -> dict[str, Any]:
    """`coverage` is a share of what the last full scan saw; 0 if that is nothing."""
    if subject.model is None:
        return {**dict.fromkeys(COUNTS, 0), "coverage": 0.0}
    covered = coverage(subject.database, subject.model)
    return {**{name: getattr(covered, name) for name in COUNTS}, "coverage": round(covered.share, 6)}


def _truncated(subject: Subject) -> dict[str, Any]:
    """Texts that are longer than the model reads; None if not all were looked at."""
    if subject.model is None:
        return {"truncated": 0, "longest_tokens": 0}
    counted = subject.ledger.truncation(subject.model.destination.fingerprint)
    return {
        "truncated": counted.truncated if counted.known else None,
        "longest_tokens": counted.longest if counted.known else None,
    }


def _work(subject: Subject) -> dict[str, Any]:
    if subject.model is None:
        return {"dirty_batches": 0}
    return {"dirty_batches": len(subject.ledger.dirty_batches())}


def _waiting(subject: Subject) -> dict[str, Any]:
    """What was tried and is tried again: batches, and texts of the quarantine."""
    quarantine: dict[str, Any] = {"given_up": 0, "next_try": None}
    if subject.model is not None:
        parameters = {
            "collection": subject.name,
            "fingerprint": subject.model.destination.fingerprint,
            "attempts": subject.definition.attributes.quarantine.attempts,
        }
        with subject.database.session() as connection:
            row = connection.execute(load_sql("health/quarantine"), parameters).fetchone()
        if row:
            quarantine = {"given_up": row[0], "next_try": row[1]}
    return {"waiting": asdict(waiting(subject.database, subject.name)), "quarantine": quarantine}


def _indexes(subject: Subject) -> dict[str, Any]:
    if subject.model is None:
        return {"pgvector_index": [], "faiss": NO_FAISS}
    with subject.database.connect(autocommit=True) as connection:
        indexes = describe_indexes(connection, subject.model.destination)
        faiss = _faiss_status(connection, subject.name, subject.settings)
    return {"pgvector_index": [asdict(index) for index in indexes], "faiss": faiss}


def _faiss_status(connection: psycopg.Connection, collection: str, settings: Settings) -> dict[str, Any]:
    """The current generation, and what it is to the database; a foreign one with the reason."""
    try:
        manifest = read_manifest(settings.state_dir / "faiss", collection)
    except VectorIndexError:  # damaged: the next sync builds it again
        return NO_FAISS
    stands = standing(connection, collection, manifest)
    if manifest is None:
        return NO_FAISS
    of = {"database": manifest.database, "epoch": manifest.epoch, "current": stands is Standing.CURRENT}
    why = {"foreign": why_foreign(connection, manifest)} if stands is Standing.FOREIGN else {}
    return {
        "generation": manifest.generation,
        "vectors": manifest.count,
        **of,
        "standing": stands.value,
        **why,
    }


def _definition(subject: Subject) -> dict[str, Any]:
    return {"definition": subject.ledger.definition_notice() if subject.model else None}


def _database(subject: Subject) -> dict[str, Any]:
    """Which database the files beside it have to be of."""
    if subject.model is None:
        return {"database": None}
    with subject.database.connect(autocommit=True) as connection:
        identity = collection_identity(connection, subject.name)
    return {"database": {"name": subject.database.name_and_host, "id": identity.database, "epoch": identity.epoch}}


def _scan(subject: Subject) -> dict[str, Any]:
    return {"last_scan": subject.state.full_scan_at}


def _failures(subject: Subject) -> dict[str, Any]:
    """What was refused or failed, and has not gone well since."""
    return {"failures": [asdict(failure) for failure in failures(subject.database, subject.name)]}


def _checks(subject: Subject) -> dict[str, Any]:
    """The last result of each check; `passed` is null for one that was never run."""
    names = checks_of(subject.definition, subject.model.profile if subject.model else None)
    last = {result.name: result for result in last_results(subject.database, subject.name, names)}

    def shown(name: str) -> dict[str, Any]:
        result: CheckResult | None = last.get(name)
        return result.as_dict(subject.name) if result else {"name": name, **NEVER_RUN}

    return {"checks": [shown(name) for name in names]}


def _batch_jobs(subject: Subject) -> dict[str, Any]:
    """Those that are at work."""
    listed = BatchJobs(subject.database, subject.settings, subject.name).listed(days=0)
    return {"batch_jobs": [job for job in listed if job["ended_at"] is None]}


def _activity(subject: Subject) -> dict[str, Any]:
    return {"under_way": [asdict(each) for each in under_way(subject.database, subject.name)]}


FACTS: tuple[Callable[[Subject], dict[str, Any]], ...] = (
    *(
        _model,
        _coverage,
        _truncated,
        _work,
        _waiting,
        _indexes,
        _scan,
        _failures,
        _checks,
        _activity,
        _batch_jobs,
        _definition,
        _database,
    ),
)
