"""Dagster's instance, as `dagster.yaml` in the project's folder says."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import dagster as dg
import yaml

from embeddings_pipeline.config.settings import project_root
from embeddings_pipeline.errors import ConfigurationError
from embeddings_pipeline.orchestration.dagster_internals import CheckError

LOCATION = "embeddings_pipeline"  # of this project's own definitions
LONGEST = 300  # characters of what Dagster says is wrong


def location_name() -> str:
    """What `workspace.yaml` in the project's folder calls its code location."""
    try:
        workspace = yaml.safe_load((project_root() / "workspace.yaml").read_text(encoding="utf-8"))
        return str(workspace["load_from"][0]["python_module"]["location_name"])
    except (OSError, UnicodeDecodeError, yaml.YAMLError, LookupError, TypeError):  # none, or of another form
        return LOCATION


@contextmanager
def project_instance() -> Iterator[dg.DagsterInstance]:
    """The instance of `dagster.yaml`. ConfigurationError, naming the file, if it cannot be read as one."""
    home = project_root()
    os.environ.setdefault("DAGSTER_HOME", str(home))
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
