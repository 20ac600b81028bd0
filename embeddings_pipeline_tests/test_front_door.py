"""The front door, as a web application uses it."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

import embeddings_pipeline
from embeddings_pipeline import ConfigurationError, PipelineError, open_collection
from embeddings_pipeline.config.definition import COMPONENT_TYPE
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support.workbench import definition, execute, films, make_films


@pytest.fixture
def defs_dir(tmp_path: Path) -> Path:
    config = definition().attributes.model_dump(exclude_defaults=True, mode="json")
    (tmp_path / "defs").mkdir()
    (tmp_path / "defs" / "defs.yaml").write_text(yaml.safe_dump({"type": COMPONENT_TYPE, "attributes": config}))
    return tmp_path / "defs"


def test_several_threads_search_one_collection_that_was_synced_through_it(
    database: Database, project: Settings, defs_dir: Path
) -> None:
    make_films(database, films(25))
    with open_collection("films", defs_dir=defs_dir) as collection:
        assert collection.sync().embedded == 25

        def answer(number: int) -> tuple[str, str]:
            [hit] = collection.search(f"Film {number} number {number}", k=1)
            return hit.item_key, hit.item["title"]

        with ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(answer, [n % 25 + 1 for n in range(100)]))
        assert answers == [(str(n % 25 + 1), f"Film {n % 25 + 1}") for n in range(100)]
        status = collection.status()
        assert (status["items"], status["vectors"], status["coverage"]) == (25, 25, 1.0)
        execute(database, "UPDATE films SET overview = 'a lighthouse keeper' WHERE id = 3")
        assert collection.sync(dry_run=True).left == 1
    assert collection.search("lighthouse", k=1)  # it is opened again


def test_where_things_are_can_be_said_instead_of_set_in_the_environment(
    database: Database, settings: Settings, defs_dir: Path
) -> None:
    client = open_collection(database_url=database.url, state_dir=settings.state_dir, defs_dir=defs_dir)
    assert client.definition.name == "films"
    assert client.status()["fingerprint"] is None
    with pytest.raises(ConfigurationError, match="did you mean 'films'"):
        open_collection("film", defs_dir=defs_dir)
    with pytest.raises(PipelineError, match="has no vectors yet; run"):
        client.search("lighthouse")


def test_every_exported_name_is_there_and_importing_the_package_loads_nothing() -> None:
    assert all(getattr(embeddings_pipeline, name) for name in embeddings_pipeline.__all__)
    assert set(dir(embeddings_pipeline)) == {*embeddings_pipeline.__all__, "__version__"}
    assert (Path(embeddings_pipeline.__file__).parent / "py.typed").is_file()
    script = (
        "import sys; before = set(sys.modules); import embeddings_pipeline\n"
        "ours = {name.split('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names; print(ours)\n"
        "from embeddings_pipeline import open_collection, PipelineError\n"
        "print([name for name in ('dagster', 'torch', 'faiss', 'sqlalchemy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["{'embeddings_pipeline'}", "[]"]


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = embeddings_pipeline.nonsense
