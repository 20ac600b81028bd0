"""Having the code location load its definitions anew, where that can be done.

A code server cannot load its definitions a second time. What `dagster dev`, `dg dev` and `dagster code-server start`
run is a process in front of it, its parent, which starts another one and then ends the first. What was started with
`dagster api grpc` has no such parent: a person reloads it, by starting it again.
"""

import logging
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from embeddings_pipeline.config.loading import read_collections
from embeddings_pipeline.errors import PipelineError
from embeddings_pipeline.orchestration.dagster_internals import grpc_client

if TYPE_CHECKING:
    from embeddings_pipeline.orchestration.dagster_internals import DagsterGrpcClient

log = logging.getLogger(__name__)

PAUSE_SECONDS = 2.0  # the tick that asks for it has answered by then
RELOAD_SECONDS = 120
_under_way = threading.Lock()


def reload_definitions(path: Path) -> bool:
    """Have this process's definitions loaded anew, if `path`, a `defs.yaml` that has changed, has no mistake.

    Whether that is under way: this process ends soon after.
    """
    try:
        readable = path.is_file() and not read_collections(path.parent).mistakes
    except PipelineError:
        readable = False
    client = code_server() if readable else None
    if client is None:
        return False
    if _under_way.acquire(blocking=False):
        threading.Thread(target=_reload, args=[client], name="reload definitions", daemon=True).start()
    return True


def _reload(client: "DagsterGrpcClient") -> None:
    try:
        time.sleep(PAUSE_SECONDS)
        client.reload_code(timeout=RELOAD_SECONDS)
    except Exception as error:  # of gRPC, or of Dagster around it: the sensor goes on saying what to do
        log.warning("the definitions could not be reloaded: %s", str(error).partition("\n")[0])
    finally:
        _under_way.release()


def code_server() -> "DagsterGrpcClient | None":
    """The process in front of this code server; None if there is none."""
    try:
        parent = psutil.Process().parent()
        words = parent.cmdline() if parent else []
        environment = parent.environ() if parent else {}
    except psutil.Error:
        return None
    if "code-server" not in words:
        return None
    given = dict(pairwise(words))
    port = given.get("--port") or given.get("-p") or environment.get("DAGSTER_CODE_SERVER_PORT")
    socket = given.get("--socket") or given.get("-s") or environment.get("DAGSTER_CODE_SERVER_SOCKET")
    if port is not None:
        return grpc_client(port=int(port))
    return grpc_client(socket=socket) if socket is not None else None
