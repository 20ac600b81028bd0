"""Vectors that cannot be right: of another dimension, not finite, zero, not of unit length, or all the same."""

from dataclasses import dataclass

from psycopg import sql

from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.destination.base import NORM
from embeddings_pipeline.store.models import Model

UNIT_TOLERANCE = 5e-3  # float16 keeps a unit vector's length to about 5e-4


@dataclass(frozen=True)
class Integrity:
    """Counts of vectors that cannot be right."""

    vectors: int
    wrong_dimension: int
    not_finite: int  # or zero
    not_unit: int  # 0 if the profile does not normalise
    all_equal: bool  # every vector is the same, though texts differ

    @property
    def sound(self) -> bool:
        return not (self.wrong_dimension or self.not_finite or self.not_unit or self.all_equal)


def integrity(database: Database, model: Model) -> Integrity:
    """Look at every vector, in the database."""
    with database.connect(autocommit=True) as connection:
        row = connection.execute(
            model.destination.statement("coverage/integrity", norm=sql.SQL(NORM[model.destination.storage])),
            {
                "dimension": model.destination.dimension,
                "normalized": model.profile.normalize,
                "tolerance": UNIT_TOLERANCE,
            },
        ).fetchone()
    assert row is not None
    return Integrity(*row)
