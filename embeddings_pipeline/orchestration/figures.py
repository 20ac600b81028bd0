"""What a step reports becomes metadata in the UI, and metadata becomes what the step reported.

Both go by the fields of the step's dataclass, so that a number with another name is an error and not a silent zero.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from embeddings_pipeline.ledger.full_scan import FullScan
from embeddings_pipeline.pipeline.figures import Committed, Embedded, ItemsRead, RunFigures, TextsRendered

BATCH_FIGURES: dict[str, type[ItemsRead | TextsRendered | Embedded | Committed]] = {
    "raw_items": ItemsRead,
    "item_texts": TextsRendered,
    "embeddings": Embedded,
    "pgvector_table": Committed,
}

Figures = TypeVar("Figures")


@dataclass(frozen=True)
class Materialization:
    """What a run reported of an asset, or of one partition of it."""

    step: str  # the asset's name, less the number of dimensions
    metadata: Mapping[str, Any]


def metadata_of(figures: Any) -> dict[str, Any]:
    """The fields and properties of a step's dataclass by name; fractions with three digits, dollars with six."""
    names = [field.name for field in fields(figures)]
    names += [name for name, member in vars(type(figures)).items() if isinstance(member, property)]
    values = {name: getattr(figures, name) for name in names}
    digits = {"usd": 6}
    return {n: round(value, digits.get(n, 3)) if isinstance(value, float) else value for n, value in values.items()}


def read_figures(kind: type[Figures], metadata: Mapping[str, Any]) -> Figures:
    """The numbers of a step's dataclass, from its metadata. KeyError if one is not there."""
    numbers = [field.name for field in fields(kind) if field.type in (int, float)]  # type: ignore[arg-type]
    return kind(**{name: metadata[name] for name in numbers})


def figures_of_step(step: str, figures: RunFigures) -> dict[str, Any]:
    """What a sum over several runs says of one step, as its metadata."""
    names = [each.name for each in fields(BATCH_FIGURES[step]) if hasattr(figures, each.name)]
    return {name: round(getattr(figures, name), 3) for name in names}


def run_figures(materializations: Iterable[Materialization]) -> RunFigures:
    """The sums over a run of batches. KeyError if a step is not known or a number of it is missing."""
    total = RunFigures()
    for each in materializations:
        if each.metadata:  # a partition that somebody added by hand has none
            total.add(read_figures(BATCH_FIGURES[each.step], each.metadata))
    return total


def scan_figures(materializations: Iterable[Materialization]) -> FullScan:
    """What the one materialization of item_ledger says. KeyError if a number of it is missing."""
    [scan] = materializations
    return read_figures(FullScan, scan.metadata)
