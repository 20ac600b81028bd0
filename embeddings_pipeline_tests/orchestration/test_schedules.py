"""The schedules: the daily refresh, and the refresh of recent items."""

from embeddings_pipeline.orchestration.automation import build_refresh_jobs
from embeddings_pipeline.orchestration.component import build_definitions
from embeddings_pipeline.orchestration.sync import Recent, sync
from embeddings_pipeline_tests.support.workbench import (
    committed,
    definition,
    execute,
    films,
    make_films,
    sync_once,
)


class TestSchedules:
    def test_their_numbers_are_those_of_the_file(self) -> None:
        numbers = {"timezone": "Europe/Berlin", "daily_refresh": "23:30", "recent_every_hours": 3}
        repository = build_definitions(definition(automation=numbers)).get_repository_def()
        daily, recent = (repository.get_schedule_def(f"films_{name}_refresh") for name in ("daily", "recent"))
        assert (daily.cron_schedule, daily.execution_timezone) == ("30 23 * * *", "Europe/Berlin")
        assert recent.cron_schedule == "0 */3 * * *"
        default = build_definitions(definition()).get_repository_def()
        assert default.get_schedule_def("films_daily_refresh").cron_schedule == "0 4 * * *"
        assert default.get_schedule_def("films_recent_refresh").cron_schedule == "0 */6 * * *"

    def test_the_daily_refresh_does_all_and_runs_every_check(self, database, project, instance) -> None:
        make_films(database, films(12))
        refresh, _ = build_refresh_jobs(definition())
        assert refresh.execute_in_process(instance=instance).success
        assert len(committed(database)) == 12
        keys = build_definitions(definition()).resolve_asset_graph().asset_check_keys
        for key in keys:
            [record] = instance.event_log_storage.get_asset_check_execution_history(key, limit=1)
            assert record.status.value == "SUCCEEDED", key
        assert {key.name for key in keys} >= {"coverage", "freshness", "quarantine", "agreement", "model_drift"}

    def test_the_recent_refresh_takes_new_items_up_to_its_number_and_nothing_else(
        self, database, project, instance
    ) -> None:
        make_films(database, films(25))
        one = definition(vectors={"base": "{title} | {overview}", "title": "{title}"})
        collection, _ = sync_once(one, project)
        execute(database, "UPDATE films SET overview = 'edited' WHERE id = 3")
        for n in range(101, 112):
            execute(database, f"INSERT INTO films VALUES ({n}, 'New {n}', 'row {n}', 1)")
        collection.ledger.full_scan(collection.source)
        execute(
            database,
            "UPDATE embeddings.films_item SET first_seen_at = now() - interval '8 days' WHERE item_key = '101'",
        )
        done = sync(one, project, recent=Recent(days=7, items=6), instance=instance)
        assert done.embedded == 12  # two texts an item
        new = {key for key in committed(database) if int(key) > 100}
        assert len(new) == 6 and "101" not in new
        assert committed(database)["3"][0] != "Film 3 | edited"

    def test_the_recent_refresh_reads_what_is_new_where_the_source_has_updated_at(
        self, database, project, instance
    ) -> None:
        execute(
            database, "CREATE TABLE films (id int PRIMARY KEY, title text, overview text, revenue int, at timestamptz)"
        )
        one = definition(source={"table": "films", "key": ["id"], "updated_at": "at"})
        execute(database, "INSERT INTO films SELECT n, 'Film', 'story ' || n, n, now() FROM generate_series(1, 12) n")
        _, recent = build_refresh_jobs(one)
        assert recent.execute_in_process(instance=instance).success
        assert len(committed(database)) == 12
