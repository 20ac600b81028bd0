"""The example of a recommender, as its page says it."""

import re

import pytest
import yaml

from embeddings_pipeline import open_collection
from embeddings_pipeline.config.loading import load_collections
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.orchestration.component import build_definitions
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support.command_line import PROJECT, commands_of, run_words
from embeddings_pipeline_tests.support.workbench import execute

PAGE = PROJECT / "docs" / "how-to" / "recommend.md"
EXAMPLE = PROJECT / "examples" / "recommender"


@pytest.mark.timeout(600)
def test_the_page_does_what_it_says(database: Database, project: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDDINGS_DEFS_DIR", str(EXAMPLE))
    blocks = PAGE.read_text(encoding="utf-8").split("```")[1::2]
    commands = commands_of("\n".join(blocks))
    assert len(commands) == 7
    loaded, synced, _, mine, recent, explained, popular = (run_words(command) for command in commands)
    assert loaded == "films: 460; ratings: 6,000 of 200 people\n" and "460 texts embedded" in synced
    assert len(mine.splitlines()) == len(recent.splitlines()) == 5
    assert "vector base: pgvector" in explained and "popularity: the highest revenue" in popular + run_words(
        "-m embeddings_pipeline recommend -k 3 --explain"
    )
    [(people, pairs)] = execute(
        database,
        "SELECT (SELECT count(*) FROM embeddings.liked), (SELECT count(*) FROM embeddings.cooccurrence)",
    )
    assert people > 300 and pairs > 10_000
    best = [row[0] for row in execute(database, "SELECT id::text FROM films ORDER BY revenue DESC LIMIT 3")]
    with open_collection("recommender") as films:
        assert [hit.item_key for hit in films.recommend(k=3, diversity=0)] == best
        rated = {str(row[0]) for row in execute(database, "SELECT film FROM ratings WHERE person = 1")}
        assert rated.isdisjoint(hit.item_key for hit in films.recommend(user=1, k=100))
        # What is held back of what people liked is found far more often than by chance, which is 46 in some 430.
        liked: dict[int, dict[bool, list[str]]] = {}
        for person, film in execute(database, "SELECT person, film::text FROM ratings WHERE stars > 3"):
            liked.setdefault(person, {True: [], False: []})[int(film) % 5 == 0].append(film)
        found = wanted = 0
        for parts in list(liked.values())[:50]:
            hits = films.recommend(liked=parts[False], k=46)
            found += len(set(parts[True]) & {hit.item_key for hit in hits})
            wanted += len(parts[True])
    assert wanted > 100 and found / wanted > 0.15
    [(most,)] = execute(database, "SELECT max((payload ->> 'revenue')::bigint) FROM embeddings.recommender")
    assert most > 2**31


def test_the_definition_is_the_page_s_and_has_its_asset() -> None:
    [shown] = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert yaml.safe_load(shown) == yaml.safe_load((EXAMPLE / "defs.yaml").read_text(encoding="utf-8"))
    definitions = build_definitions(load_collections(EXAMPLE)["recommender"])
    assert "recommender/cooccurrence" in {
        key.to_user_string() for key in definitions.resolve_asset_graph().get_all_asset_keys()
    }
    schedule = definitions.get_repository_def().get_schedule_def("recommender_daily_refresh")
    assert schedule.cron_schedule == "0 4 * * *"
