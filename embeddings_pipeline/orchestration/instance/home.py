"""Dagster's instance, as `dagster.yaml` in the project's folder says."""

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dagster as dg
import yaml

from embeddings_pipeline.config.settings import project_root
from embeddings_pipeline.errors import ConfigurationError
from embeddings_pipeline.orchestration.dagster_internals import CheckError

LOCATION = "embeddings_pipeline"  # of this project's own definitions
STORAGES = (
    "storage",
    "run_storage",
    "event_log_storage",
    "schedule_storage",
)  # the last three are Dagster's former way
LONGEST = 300  # characters of what Dagster says is wrong


def location_name() -> str:
    """What `workspace.yaml` in the project's folder calls its code location."""
    try:
        workspace = yaml.safe_load((project_root() / "workspace.yaml").read_text(encoding="utf-8"))
        return str(workspace["load_from"][0]["python_module"]["location_name"])
    except (OSError, UnicodeDecodeError, yaml.YAMLError, LookupError, TypeError):  # none, or of another form
        return LOCATION


def _check_storage(file: Path) -> None:
    """ConfigurationError if Dagster would keep its runs in files of its own beside `file`, where nothing looks."""
    if not file.is_file():
        raise ConfigurationError(
            f"{file.parent}: no dagster.yaml is there; work in the folder of a project, or name it in DAGSTER_HOME "
            "(`embeddings-pipeline init FOLDER` makes one)"
        )
    with contextlib.suppress(OSError, UnicodeDecodeError, yaml.YAMLError):  # Dagster says what is wrong with it
        content = yaml.safe_load(file.read_bytes())
        if content is None or (isinstance(content, dict) and not any(content.get(name) for name in STORAGES)):
            raise ConfigurationError(
                f"{file}: it names no `storage:`, and Dagster would keep its runs in files of its own; take the "
                "dagster.yaml that this package comes with"
            )


def check_home() -> None:
    """ConfigurationError if `DAGSTER_HOME` is a folder in which Dagster would keep runs in files of its own."""
    if os.environ.get("DAGSTER_HOME"):
        _check_storage(project_root() / "dagster.yaml")


@contextmanager
def project_instance() -> Iterator[dg.DagsterInstance]:
    """The instance of `dagster.yaml`. ConfigurationError, naming the file, if it is not there, cannot be read as one or
    names no storage.
    """
    home = project_root()
    _check_storage(home / "dagster.yaml")
    if not os.environ.get("DAGSTER_HOME"):  # an empty one counts as none
        os.environ["DAGSTER_HOME"] = str(home)
    try:
        instance = dg.DagsterInstance.get()
        # What Dagster makes only when it is asked for.
        _ = instance.compute_log_manager, instance.run_launcher, instance.run_coordinator, instance.scheduler
    except (dg.DagsterError, yaml.YAMLError, CheckError, OSError, UnicodeDecodeError, ImportError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        said = " ".join(str(getattr(error, "problem", None) or error).split())
        raise ConfigurationError(
            f"{home / 'dagster.yaml'}{line}: Dagster cannot use it: {said[:LONGEST]}; correct it, or take the one that "
            "this package comes with"
        ) from error
    with instance:
        yield instance
