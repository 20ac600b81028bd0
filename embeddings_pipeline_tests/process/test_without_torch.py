"""Once its model is converted, no process imports torch: `sync`, its runs, `search`, what evaluates the sensor."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from embeddings_pipeline.config.definition import COMPONENT_TYPE
from embeddings_pipeline.config.profiles import BUILT_IN
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.encoders import load_encoder
from embeddings_pipeline.encoders.openvino import OpenVinoEncoder
from embeddings_pipeline.store.database import Database
from embeddings_pipeline_tests.support.command_line import PROJECT
from embeddings_pipeline_tests.support.workbench import definition, films, make_films

# Noted by every Python that starts below a process: which modules of these packages it imports. Modules within them:
# a package that is only looked for is asked for by its own name.
WATCH = """
import os, sys
WATCHED = {"torch", "transformers", "sentence_transformers", "openvino_telemetry", "openvino"}

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in WATCHED and "." in name:
            with open(os.environ["WATCHED"], "a") as file:
                file.write(f"{name} in {' '.join(sys.orig_argv[1:])[:300]!r}\\n")

sys.meta_path.insert(0, Watch())
"""
SENSOR = """
import dagster as dg
from embeddings_pipeline.definitions import defs
defs()
from embeddings_pipeline.orchestration.automation import evaluate
from embeddings_pipeline.config.loading import load_collections
from embeddings_pipeline.config.settings import load_settings
one = load_collections(load_settings().defs_dir)["films"]
with dg.DagsterInstance.get() as instance:
    evaluate(instance, one, 384)
"""


@pytest.fixture
def environment(database: Database, dagster_tables: None, settings: Settings, tmp_path: Path) -> dict[str, str]:
    """Of processes with one collection of MiniLM's, which is converted."""
    assert isinstance(load_encoder(BUILT_IN["minilm"], settings), OpenVinoEncoder)
    config = definition(profile="minilm").attributes.model_dump(exclude_defaults=True, mode="json")
    folder = tmp_path / "defs" / "films"
    folder.mkdir(parents=True)
    (folder / "defs.yaml").write_text(yaml.safe_dump({"type": COMPONENT_TYPE, "attributes": config}))
    watch = tmp_path / "watch"
    watch.mkdir()
    (watch / "sitecustomize.py").write_text(WATCH)
    home = tmp_path / "home"
    home.mkdir()
    return {
        **os.environ,
        "DATABASE_URL": database.url,
        "DAGSTER_HOME": str(PROJECT),
        "EMBEDDINGS_STATE_DIR": str(settings.state_dir),
        "EMBEDDINGS_DEFS_DIR": str(tmp_path / "defs"),
        "PYTHONPATH": str(watch),
        "WATCHED": str(tmp_path / "watched"),
        "HOME": str(home),
    }


def test_no_process_imports_torch_or_telemetry(database: Database, environment: dict[str, str], tmp_path: Path) -> None:
    make_films(database, films(12))
    commands = {
        "sync": ["-m", "embeddings_pipeline", "sync"],
        "search": ["-m", "embeddings_pipeline", "search", "a story about friends"],
        "code server": ["-c", SENSOR],
    }
    for name, arguments in commands.items():
        command = [sys.executable, *arguments]
        how = {"cwd": PROJECT, "env": environment, "capture_output": True, "text": True, "timeout": 200}
        done = subprocess.run(command, check=False, **how)  # type: ignore[call-overload]
        assert done.returncode == 0, (name, done.stderr)
    watched = Path(environment["WATCHED"]).read_text().splitlines()
    assert any(line.startswith("openvino.") for line in watched), "the watch works"
    assert not [line for line in watched if not line.startswith("openvino.")]
    assert not list(Path(environment["HOME"]).rglob("*openvino*"))
