"""`embeddings-pipeline …` in a process of its own that has nothing to import: a fork of one that has imported it all.

For tests that start the command line many times. The forks are real processes, which can be killed; the one that they
are forked from has no threads, no sessions and no encoder.
"""

import multiprocessing
import os
import sys
from multiprocessing.process import BaseProcess

from embeddings_pipeline_tests.support.command_line import PROJECT

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["embeddings_pipeline.cli.main", "embeddings_pipeline.definitions", "embeddings_pipeline_tests.process.chaos"]
)


def start(arguments: list[str]) -> BaseProcess:
    """The command, begun in this process' environment; what it prints goes nowhere."""
    process = FORKS.Process(target=_run, args=(arguments, dict(os.environ)))
    process.start()
    return process


def _run(arguments: list[str], environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(PROJECT)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.argv = ["embeddings-pipeline", *arguments]
    from embeddings_pipeline.cli.main import main

    main()
