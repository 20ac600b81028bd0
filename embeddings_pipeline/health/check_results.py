"""What each check found last, kept in the database: `sync` and `status` tell it without asking Dagster."""

from collections.abc import Container
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Literal

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.prices import is_paid
from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.config.templates import clean
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.sql import load_sql

Severity = Literal["error", "warning"]
SEARCH_QUALITY = "search_quality"

REMEDIES = {  # every check, in the order in which they are shown
    "coverage": "run `embeddings-pipeline sync --collection {name}`",
    "integrity": "correct the profile or its model, then run `embeddings-pipeline sync --force --collection {name}`",
    "quarantine": "see `embeddings-pipeline quarantine list --collection {name}`",
    "truncation": "split long texts with `chunk:` in the defs.yaml of {name}",
    "spend": "raise `budget:` in the defs.yaml of {name}, or wait; give `price:` in the profile if none is known",
    "freshness": "see whether the sensor and the daily refresh are on and why runs fail, or run "
    "`embeddings-pipeline sync --collection {name}`",
    "index_parity": "run `embeddings-pipeline sync --collection {name}`, which builds the index again",
    SEARCH_QUALITY: "see `embeddings-pipeline evaluate --collection {name}`; `sync --full` measures again",
    "agreement": "run `embeddings-pipeline sync --full --collection {name}`",
    "model_drift": "go back to the library, the processor or the service that made the vectors, or run "
    "`embeddings-pipeline sync --force --collection {name}`",
}


def checks_of(definition: CollectionDefinition, profile: Profile | None) -> list[str]:
    """The checks of a collection with this profile, or before its first model: nothing is spent on a model of one's
    own, and how good searches are is checked if a floor is declared.
    """
    evaluation = definition.attributes.evaluation
    without = set()
    if profile is None or not is_paid(profile):
        without.add("spend")
    if evaluation is None or evaluation.least_ndcg is None:
        without.add(SEARCH_QUALITY)
    return [name for name in REMEDIES if name not in without]


def remedy(check: str, collection: str) -> str:
    """What to do about a check that does not pass."""
    return REMEDIES.get(check, "").format(name=collection)


@dataclass(frozen=True)
class CheckResult:
    """What a check found."""

    name: str
    passed: bool
    severity: Severity  # of a check that did not pass
    description: str
    checked_at: datetime | None = None
    age_seconds: float = 0.0

    @property
    def failed(self) -> bool:
        """Whether it is an error, and no warning."""
        return not self.passed and self.severity == "error"

    def as_dict(self, collection: str) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "remedy": "" if self.passed else remedy(self.name, collection)}

    def told(self, collection: str) -> str:
        """What a check that did not pass found, and what to do."""
        return "; ".join(filter(None, (self.description, remedy(self.name, collection))))


def note_result(database: Database, collection: str, result: CheckResult) -> None:
    """Keep what a check found, in the place of what it found before."""
    parameters = {
        "collection": collection,
        "check": result.name,
        "passed": result.passed,
        "severity": result.severity,
        "description": clean(result.description),
    }
    with database.session() as connection:
        connection.execute(load_sql("health/note_check"), parameters)


def last_results(database: Database, collection: str, checks: Container[str]) -> list[CheckResult]:
    """What each of these checks of a collection found last; those that were never run are missing."""
    with database.session() as connection:
        rows = connection.execute(load_sql("health/checks"), {"collection": collection}).fetchall()
    order = list(REMEDIES)
    results = [result for result in (CheckResult(*row) for row in rows) if result.name in checks]
    return sorted(results, key=lambda result: order.index(result.name))
