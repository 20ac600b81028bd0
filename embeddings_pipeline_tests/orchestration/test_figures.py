"""What steps report, through metadata and back: a number with another name is an error."""

from dataclasses import dataclass, fields

import pytest

from embeddings_pipeline.ledger.full_scan import FullScan
from embeddings_pipeline.orchestration.figures import (
    BATCH_FIGURES,
    Materialization,
    metadata_of,
    read_figures,
    run_figures,
    scan_figures,
)
from embeddings_pipeline.orchestration.names import BATCH_STEPS
from embeddings_pipeline.pipeline.figures import OF_ONE_BATCH, Committed, Embedded, ItemsRead, RunFigures, TextsRendered


def test_metadata_has_the_fields_and_what_follows_from_them() -> None:
    committed = metadata_of(Committed(inserted=2, unchanged=1, left=1))
    assert (committed["inserted"], committed["left"], committed["coverage_percent"]) == (2, 1, 75.0)
    embedded = metadata_of(Embedded(embedded=10, seconds=4.00049))
    assert (embedded["seconds"], embedded["texts_per_second"]) == (4.0, 2.5)


def test_a_run_is_the_sum_of_its_batches() -> None:
    steps = [
        Materialization("raw_items", metadata_of(ItemsRead(rows=10, gone=1))),
        Materialization("item_texts", metadata_of(TextsRendered(texts=9, blank=1, sample=["a"]))),
        Materialization("embeddings", metadata_of(Embedded(embedded=4, reused=5))),
        Materialization("pgvector_table", metadata_of(Committed(inserted=10, version=7))),
    ]
    total = run_figures([*steps, *steps])
    assert (total.rows, total.gone, total.texts, total.embedded, total.reused, total.inserted) == (20, 2, 18, 8, 10, 20)


def test_a_partition_added_by_hand_reports_nothing() -> None:
    assert run_figures([Materialization("raw_items", {})]) == RunFigures()


@pytest.mark.parametrize("kind", BATCH_FIGURES.values())
def test_a_renamed_number_is_an_error(kind) -> None:
    metadata = metadata_of(kind())
    for name in [field.name for field in fields(kind) if field.type in (int, float)]:
        renamed = {"renamed" if key == name else key: value for key, value in metadata.items()}
        with pytest.raises(KeyError, match=name):
            read_figures(kind, renamed)


def test_a_step_that_is_not_known_is_an_error() -> None:
    with pytest.raises(KeyError, match="raw_rows"):
        run_figures([Materialization("raw_rows", {"rows": 1})])


def test_a_number_that_a_run_does_not_sum_is_an_error() -> None:
    @dataclass
    class Renamed:
        lines: int = 1

    with pytest.raises(AttributeError, match="lines"):
        RunFigures().add(Renamed())  # type: ignore[arg-type]


def test_every_step_of_a_batch_has_figures_and_every_sum_a_step() -> None:
    assert tuple(BATCH_FIGURES) == BATCH_STEPS
    reported = {field.name for kind in BATCH_FIGURES.values() for field in fields(kind)}
    assert {field.name for field in fields(RunFigures)} == reported - set(OF_ONE_BATCH)


def test_a_scan_reads_back_as_it_was() -> None:
    scan = FullScan(scanned=10, new=1, changed=2, gone=3, unchanged=4)
    assert scan_figures([Materialization("item_ledger", {**metadata_of(scan), "new_partitions": 1})]) == scan
