"""How good searches are, in Dagster: an asset with numbers over time, and a check of the declared floor."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.errors import RunFailed
from embeddings_pipeline.health.status import collection_status
from embeddings_pipeline.orchestration.component import build_definitions
from embeddings_pipeline.orchestration.sync import sync
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support.workbench import definition, films, make_films

ASSET = dg.AssetKey(["films", "evaluation"])
CHECK = dg.AssetCheckKey(ASSET, "search_quality")


@pytest.fixture
def declared(database: Database, tmp_path: Path) -> Callable[..., CollectionDefinition]:
    """25 films whose golden queries are these; attributes of `evaluation:`."""
    make_films(database, films(25))

    def declare(**evaluation: Any) -> CollectionDefinition:
        attributes = definition(evaluation={"queries": "golden.jsonl", **evaluation}).attributes
        return CollectionDefinition(attributes, tmp_path / "defs.yaml")

    write(tmp_path, {"query": "Film 3 number 3", "relevant": ["3"]}, {"query": "Film 7 number 7", "relevant": ["7"]})
    return declare


def write(folder: Path, *queries: Any) -> None:
    (folder / "golden.jsonl").write_text("\n".join(map(json.dumps, queries)))


def numbers(instance: dg.DagsterInstance) -> dict[str, Any]:
    event = instance.get_latest_materialization_event(ASSET)
    metadata = event.asset_materialization.metadata
    return {name: value if name == "ways" else value.value for name, value in metadata.items()}


def test_the_asset_and_its_check_are_there_if_they_are_declared(declared: Callable[..., CollectionDefinition]) -> None:
    for one, assets, checks in (
        (definition(), set(), set()),
        (declared(), {ASSET}, set()),
        (declared(least_ndcg=0.6), {ASSET}, {CHECK}),
    ):
        definitions = build_definitions(one)
        graph = definitions.resolve_asset_graph()
        assert {key for key in graph.get_all_asset_keys() if key == ASSET} == assets
        assert {key for key in graph.asset_check_keys if key == CHECK} == checks
        nodes = {node.name for node in definitions.resolve_job_def("films_audit").nodes}
        assert ("films__evaluation" in nodes) == bool(assets)
    assert definition().outcome_hash == declared(least_ndcg=0.6).outcome_hash  # nothing is embedded anew for it


def test_a_full_sync_measures_and_the_floor_is_checked(
    declared: Callable[..., CollectionDefinition],
    database: Database,
    project: Settings,
    instance: dg.DagsterInstance,
    tmp_path: Path,
) -> None:
    one = declared(least_ndcg=0.9)
    sync(one, project, instance=instance)
    assert instance.get_latest_materialization_event(ASSET) is None
    assert sync(one, project, full=True, instance=instance).checks == []
    told = numbers(instance)
    assert (told["ndcg_at_10"], told["recall_at_100"], told["mrr"], told["queries"]) == (1, 1, 1, 2)
    assert told["ndcg_at_10 test faiss base"] == 1 and told["asked"] == "test pgvector base"
    assert all(isinstance(told[name], int | float) for name in ("hit_rate_at_10", "p50_ms", "p95_ms", "missing_items"))
    assert [row.data["way"] for row in told["ways"].records] == ["test pgvector base", "test faiss base"]

    write(
        tmp_path, {"query": "Film 3 number 3", "relevant": ["4"]}, {"query": "Film 7 number 7", "relevant": ["7", "x"]}
    )
    result = sync(one, project, full=True, instance=instance)
    assert [check.name for check in result.checks] == ["search_quality"] and result.failed
    told_words = result.checks[0].told("films")
    assert "nDCG@10 of 2 queries is 0." in told_words and "at least 0.9 is asked for" in told_words
    assert "`embeddings-pipeline evaluate --collection films`" in told_words
    assert numbers(instance)["missing_items"] == 1
    shown = {check["name"]: check["passed"] for check in collection_status(one, database, project)["checks"]}
    assert shown["search_quality"] is False
    assert "search_quality" not in {
        check["name"] for check in collection_status(declared(), database, project)["checks"]
    }


def test_golden_queries_that_cannot_be_read_fail_their_step_alone(
    declared: Callable[..., CollectionDefinition],
    database: Database,
    project: Settings,
    instance: dg.DagsterInstance,
    tmp_path: Path,
) -> None:
    one = declared(least_ndcg=0.9)
    write(tmp_path, {"query": "no items"})
    with pytest.raises(RunFailed, match=r"golden\.jsonl, line 1: a line is .*it lacks 'relevant'"):
        sync(one, project, full=True, instance=instance)
    assert instance.get_latest_materialization_event(dg.AssetKey(["films", "audit"])) is not None
    [failure] = collection_status(one, database, project)["failures"]
    assert failure["step"] == "evaluation"
