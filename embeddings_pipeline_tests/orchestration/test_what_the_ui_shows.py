"""What Dagster's UI is given to show: whose partitions, what is missing, why a run failed, where it comes from."""

import dagster as dg
import pytest

from embeddings_pipeline.orchestration.component import build_definitions
from embeddings_pipeline.orchestration.instance.home import location_name
from embeddings_pipeline.orchestration.names import FOR_TAG
from embeddings_pipeline.orchestration.partitions import keys_in_words
from embeddings_pipeline.orchestration.sync import sync
from embeddings_pipeline_tests.support.workbench import definition, execute, films, make_films


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ([str(n) for n in range(1, 999)] + ["1000"], "1–998, 1000 (999 items)"),
        (["10", "9", "-1"], "-1, 9–10 (3 items)"),
        (["7"], "7 (1 item)"),
        (["001", "1"], "001, 1 (2 items)"),
        ([f"k{n:02}" for n in range(12)], "k00, k01, k02, k03, k04, …, k07, k08, k09, k10, k11 (12 items)"),
        ([], " (0 items)"),
    ],
)
def test_keys_are_said_in_a_few_words(keys: list[str], words: str) -> None:
    assert keys_in_words(keys) == words


def test_keys_of_any_length_are_some_hundred_characters() -> None:
    assert len(keys_in_words([f"{n}{'x' * 10_000}" for n in range(1000)])) < 1000


def metadata(instance: dg.DagsterInstance, asset: str, partition: str) -> dict[str, object]:
    """What the newest materialization of a partition says, in its order."""
    records = dg.AssetRecordsFilter(dg.AssetKey(["films", asset]), asset_partitions=[partition])
    [newest] = instance.fetch_materializations(records, limit=1).records
    assert newest.asset_materialization is not None
    return {name: value.value for name, value in newest.asset_materialization.metadata.items()}


def test_a_partition_says_first_that_limit_left_texts_out_until_they_are_there(database, project, instance) -> None:
    make_films(database, films(12))
    sync(definition(), project, limit=4, instance=instance)
    embedded, table = (metadata(instance, asset, "000000") for asset in ("embeddings_32", "pgvector_table"))
    assert next(iter(embedded)) == next(iter(table)) == "MISSING"
    assert str(embedded["MISSING"]).startswith("6 texts of this partition are left out by `limit`")
    assert str(table["MISSING"]).startswith("6 items of this partition are not committed")
    assert str(metadata(instance, "raw_items", "000000")["item_keys"]).endswith("(10 items)")
    sync(definition(), project, instance=instance)
    for asset in ("embeddings_32", "pgvector_table"):
        assert "MISSING" not in metadata(instance, asset, "000000")


def test_runs_of_a_sync_come_from_the_code_location_and_are_not_repeated_by_a_daemon(
    database, project, instance
) -> None:
    make_films(database, films(3))
    sync(definition(), project, instance=instance)
    runs = instance.get_runs()
    assert len(runs) == 3
    for run in runs:  # the UI's first page leaves out what comes from nowhere
        assert run.remote_job_origin.repository_origin.get_label() == "__repository__@embeddings_pipeline"
        assert run.tags["dagster/max_retries"] == "0"


@pytest.mark.parametrize(
    ("workspace", "name"),
    [
        (None, "embeddings_pipeline"),
        ("load_from: [{python_module: {module_name: shop.definitions, location_name: shop}}]", "shop"),
        ("load_from: [{python_file: here.py}]", "embeddings_pipeline"),
        ("[", "embeddings_pipeline"),
    ],
)
def test_the_code_location_is_that_of_the_project(monkeypatch, tmp_path, workspace: str | None, name: str) -> None:
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    if workspace is not None:
        (tmp_path / "workspace.yaml").write_text(workspace)
    assert location_name() == name


def test_a_failed_run_shows_its_sentence_first(database, project, instance) -> None:
    make_films(database, films(3))
    execute(database, "ALTER TABLE films RENAME COLUMN title TO headline")
    job = build_definitions(definition()).resolve_job_def("films_scan")
    done = job.execute_in_process(instance=instance, raise_on_error=False)
    [failure] = [event for event in done.all_events if event.is_step_failure]
    shown = failure.step_failure_data.error.message
    assert shown.startswith("Failed: collection 'films': template `base:` names a column 'title'")


def test_the_list_of_runs_shows_few_and_short_tags(database, project, instance) -> None:
    make_films(database, films(3))
    sync(definition(), project, instance=instance)
    job = build_definitions(definition()).resolve_job_def("films_scan")
    job.execute_in_process(instance=instance)
    shown = {tag for run in instance.get_runs() for tag in run.tags if not tag.startswith(".dagster/")}
    assert {tag for tag in shown if not tag.startswith("dagster/")} == {"collection", "found"}
    assert max(len(f"{tag}: {run.tags[tag]}") for run in instance.get_runs() for tag in shown & set(run.tags)) < 60


def test_the_first_job_of_a_collection_is_the_one_for_people() -> None:
    jobs = [job for job in build_definitions(definition()).resolve_all_job_defs() if not job.name.startswith("__")]
    first, *others = sorted(jobs, key=lambda job: job.name)
    assert (first.name, first.tags[FOR_TAG]) == ("films_all", "people")
    assert (first.description or "").startswith("THE ONE TO USE")
    assert all(job.description for job in others)
    assert {job.tags[FOR_TAG] for job in others} == {"automation", "model-change"}


def test_the_map_is_a_picture_which_a_sync_makes_again_if_it_is_gone(database, project, instance) -> None:
    make_films(database, films(30))
    one = definition(filters={"title": "text", "revenue": "number"})
    sync(one, project, instance=instance)

    def newest() -> dict[str, object]:
        records = dg.AssetRecordsFilter(dg.AssetKey(["films", "map"]))
        [found] = instance.fetch_materializations(records, limit=1).records
        return {name: value.value for name, value in found.asset_materialization.metadata.items()}

    first = newest()
    assert (first["items"], first["left_out"], first["method"]) == (30, 0, "base pca")
    picture = str(first["picture_base"])
    assert picture.startswith("![map of 30 items](data:image/png;base64,iVBOR") and "revenue: 1" in picture
    assert len(picture) < 100_000
    folder = project.state_dir / "faiss" / "films"
    generation = (folder / "CURRENT").read_text()
    (folder / "map.json").unlink()
    sync(one, project, instance=instance)
    assert newest()["made_because"] == "there was none"
    assert (folder / "map.json").is_file()
    assert (folder / "CURRENT").read_text() == generation, "an index that is current was built anew"


def test_what_is_in_the_database_is_no_markup_in_a_picture(database, project, instance) -> None:
    rows = films(20)
    rows += [(n, "[x](javascript:1)<img src=y>_*`", f"Another {n}", 1) for n in range(21, 30)]
    make_films(database, rows)
    sync(definition(filters={"title": "text"}), project, instance=instance)
    records = dg.AssetRecordsFilter(dg.AssetKey(["films", "map"]))
    [found] = instance.fetch_materializations(records, limit=1).records
    words = str(found.asset_materialization.metadata["picture_base"].value).replace("![](data:image/png;base64,", "")
    legend = words.split("title: ")[1]
    assert "&#91;x&#93;" in legend and not set("[<*`_") & set(legend.replace("![", ""))
