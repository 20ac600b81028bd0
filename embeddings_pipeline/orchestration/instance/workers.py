"""The processes of runs, forked from one that has imported everything: a run's first step begins within a second.

For each run Dagster's code server starts a new interpreter, which imports Dagster and the pipeline for two seconds.
Here it forks one from a process beside it (multiprocessing's fork server), which has imported the same and does no
more: it has one thread, no session and no model. What Dagster does with the process of a run stays as it is.

The fork server is started by the sensor's first tick, or by the first run, and again if it is gone. Its workers end
with it, since the code server takes them for dead then; it ends with the code server and the last of its workers.
"""

import logging
import os
import sys
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

from embeddings_pipeline.forks import end_with_parent
from embeddings_pipeline.orchestration.dagster_internals import MODULES_OF_A_RUN, start_runs_by

log = logging.getLogger(__name__)

PRELOADED = [
    "embeddings_pipeline.definitions",
    "embeddings_pipeline.orchestration.instance.storage",
    "embeddings_pipeline.orchestration.instance.launcher",
    *MODULES_OF_A_RUN,
    "psycopg2.extras",
    "upath.implementations.local",  # what Dagster asks for the state of definitions, whether there is any or not
    "faiss",
    "numpy.ma",
    "numpy.random",
    "pyarrow.dataset",
    "pyarrow.pandas_compat",
    "pyarrow.parquet",
]


class Worker(ForkServerProcess):
    """A run's process, in the environment that the code server has now."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._environment = dict(os.environ)

    def run(self) -> None:
        end_with_parent(os.getppid())
        os.environ.clear()
        os.environ.update(self._environment)
        super().run()


class Workers(ForkServerContext):
    """Starts the processes of runs."""

    Process = Worker


@cache
def _workers() -> Workers:
    workers = Workers()
    workers.set_forkserver_preload(PRELOADED)
    return workers


def fork_runs() -> None:
    """If this process is a code server of Linux, have it fork the processes of its runs."""
    if _is_code_server():
        start_runs_by(lambda: _workers() if warm_up() else None)


def warm_up() -> bool:
    """In a code server: start what runs are forked from, if it does not run. False if that cannot be."""
    if not _is_code_server():
        return False
    _workers()
    try:
        forkserver.ensure_running()
    except OSError as error:  # no folder for its socket, or one whose path is too long
        log.warning("runs start slowly, since the process to fork them from cannot be started: %s", error)
        return False
    return True


def _is_code_server() -> bool:
    """Whether this is `dagster api grpc`, as `dagster dev`, the daemon and `dagster code-server start` begin it."""
    return sys.platform == "linux" and sys.argv[1:3] == ["api", "grpc"]
