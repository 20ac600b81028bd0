"""What Dagster is told of a collection, line by line in two text files: a name that changes shows in review.

EMBEDDINGS_TESTS_UPDATE=1 writes the files anew.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from embeddings_pipeline.orchestration.component import build_definitions
from embeddings_pipeline_tests.support.workbench import definition

FOLDER = Path(__file__).parent / "snapshots"


def lines_of(definitions: dg.Definitions) -> Iterator[str]:
    """Every asset, check, job, schedule and sensor, a line each."""
    graph = definitions.resolve_asset_graph()
    for key in sorted(graph.get_all_asset_keys()):
        node = graph.get(key)
        parents = " ".join(sorted(parent.to_user_string() for parent in node.parent_keys)) or "-"
        partitions = type(node.partitions_def).__name__ if node.partitions_def else "-"
        name = getattr(node.partitions_def, "name", None)
        yield f"asset {key.to_user_string()} group={node.group_name} partitions={name or partitions} deps={parents}"
    for check in sorted(graph.asset_check_keys):
        yield f"check {check.asset_key.to_user_string()}:{check.name}"
    for job in sorted(definitions.resolve_all_job_defs(), key=lambda job: job.name):
        if not job.name.startswith("__"):
            nodes = " ".join(sorted(node.name for node in job.nodes))
            yield f"job {job.name}: {nodes}"
    for schedule in sorted(definitions.schedules or [], key=lambda schedule: schedule.name):
        yield f"schedule {schedule.name} job={schedule.job_name} cron={schedule.cron_schedule}"  # type: ignore[union-attr]
    for sensor in sorted(definitions.sensors or [], key=lambda sensor: sensor.name):
        yield f"sensor {sensor.name} status={sensor.default_status.value}"


HOSTED = {"name": "hosted", "provider": "openai", "model": "text-embedding-3-small", "dimensions": 1536}


@pytest.mark.parametrize(("name", "attributes"), [("items", {}), ("films", {}), ("hosted", {"profile": HOSTED})])
def test_everything_that_dagster_is_told_of_a_collection(name: str, attributes: dict[str, Any]) -> None:
    """`items` is the one collection whose assets and jobs bear no name; `hosted` has a model that is paid for."""
    text = "".join(f"{line}\n" for line in lines_of(build_definitions(definition(name, **attributes))))
    file = FOLDER / f"{name}.txt"
    if os.environ.get("EMBEDDINGS_TESTS_UPDATE"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    assert text == file.read_text()
