"""`serve`: searches over HTTP, for programs in any language, and for agents."""

import logging
import os
import sys
from typing import Annotated

import typer

from embeddings_pipeline.config.settings import load_settings
from embeddings_pipeline.serve.options import AT_ONCE, LOOPBACK, PORT, checked_options


def serve(
    host: Annotated[
        str, typer.Option(help="Address to listen on; any but this machine's own takes SERVE_API_KEY.")
    ] = LOOPBACK,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any that is free.")] = PORT,
    at_once: Annotated[
        int, typer.Option(min=1, max=10_000, help="How many searches may be under way; more are told to come again.")
    ] = AT_ONCE,
) -> None:
    """Answer searches over HTTP, and agents over MCP, until Ctrl-C."""
    settings = load_settings()
    options = checked_options(host, port, at_once, settings)
    from embeddings_pipeline.serve.server import OncePerMinute, run_server

    for handler in logging.getLogger().handlers:
        handler.addFilter(OncePerMinute())

    def started(address: str) -> None:
        print(f"serving on {address}  (its documents: {address}/docs; Ctrl-C ends it)", flush=True)

    whole = run_server(options, settings, started)
    sys.stdout.flush()
    if not whole:  # a search goes on for somebody who has left
        os._exit(0)
