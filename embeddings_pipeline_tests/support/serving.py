"""The service in this process, on loopback: `with serving(settings) as service: service.post("/search", query="…")`."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from embeddings_pipeline.config.definition import COMPONENT_TYPE, CollectionDefinition
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.serve.app import make_app
from embeddings_pipeline.serve.options import ServeOptions, listen
from embeddings_pipeline.serve.server import address_of, make_server
from embeddings_pipeline.serve.service import Service
from embeddings_pipeline_tests.support.workbench import wait_until


@dataclass
class Serving:
    """A running service."""

    url: str
    service: Service
    key: str | None

    def client(self, **options: Any) -> httpx.Client:
        headers = {} if self.key is None else {b"Authorization": b"Bearer " + self.key.encode()}
        return httpx.Client(base_url=self.url, headers=headers, trust_env=False, **{"timeout": 60, **options})

    def get(self, path: str) -> httpx.Response:
        with self.client() as client:
            return client.get(path)

    def post(self, path: str, **fields: Any) -> httpx.Response:
        with self.client() as client:
            return client.post(path, json=fields)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])


@contextmanager
def serving(settings: Settings, *, key: str | None = None, at_once: int = 16, ready: bool = True) -> Iterator[Serving]:
    """Serve until the block ends; from its start on it is ready, unless it is not meant to become so."""
    service = Service(settings, at_once)
    with listen(ServeOptions(port=0)) as listening:
        server = make_server(make_app(service, key))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            running = Serving(address_of(listening), service, key)
            if ready:
                wait_until(lambda: service.readiness.state.ready)
            yield running
        finally:
            server.should_exit = True
            thread.join(60)
            service.close()
            wait_until(lambda: not service.searches.under_way)
            assert not thread.is_alive()


def write_definitions(folder: Path, *definitions: CollectionDefinition) -> Path:
    """A folder of definitions with these collections, and no others."""
    for one in definitions:
        config = one.attributes.model_dump(exclude_defaults=True, mode="json")
        (folder / one.name).mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump({"type": COMPONENT_TYPE, "attributes": config})
        (folder / one.name / "defs.yaml").write_text(text)
    return folder
