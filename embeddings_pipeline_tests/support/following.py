"""`live` in this process: `with following(definition, settings) as told: …`."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.live.done import Done
from embeddings_pipeline.live.follow import Told, follow
from embeddings_pipeline_tests.support.workbench import wait_until


@dataclass
class Heard:
    """What it told, and how it ended."""

    lines: list[str] = field(default_factory=list)
    watched: dict[str, str] = field(default_factory=dict)
    minutes: list[Mapping[str, Done]] = field(default_factory=list)
    error: BaseException | None = None
    ended: bool = False

    def says(self, words: str) -> bool:
        return any(words in line for line in self.lines)


@contextmanager
def following(*definitions: CollectionDefinition, settings: Settings, use_log: bool = False) -> Iterator[Heard]:
    """Follow these collections until the block ends; from its start on they are watched."""
    heard, ended = Heard(), threading.Event()

    def line(text: str) -> None:
        if not ended.is_set():  # how long its end takes depends on what else this machine does
            heard.lines.append(text)

    told = Told(line, heard.watched.update, heard.minutes.append)

    def run() -> None:
        try:
            follow(definitions, settings, ended, told, use_log=use_log)
        except BaseException as error:
            heard.error = error
        heard.ended = True

    thread = threading.Thread(target=run)
    thread.start()
    try:
        wait_until(lambda: bool(heard.watched) or heard.ended)
        yield heard
    finally:
        ended.set()
        thread.join(60)
        assert not thread.is_alive()
