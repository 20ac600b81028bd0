"""All collections of one `live`: a thread each, and a report each minute.

follow(definitions, settings, ended, told=Told(line=print, minute=report))
"""

import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import psycopg

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.errors import PipelineError
from embeddings_pipeline.health.activity import LIVE, activity
from embeddings_pipeline.live.done import Done, Tally
from embeddings_pipeline.live.follower import Follower
from embeddings_pipeline.store.database import Database, open_database
from embeddings_pipeline.store.locks import run_lock
from embeddings_pipeline.store.retry import comes_of_outage

MINUTE = 60.0
STOP_SECONDS = 8.0  # what a batch may take to its end once it is to stop
QUIET_SECONDS = 3.0  # after so many of them it is said that it takes long


@dataclass(frozen=True)
class Told:
    """Who is told what: `line` each line for people, `started` how each collection is watched, `minute` what was done
    in the last minute, by collection, if anything was.
    """

    line: Callable[[str], None]
    started: Callable[[Mapping[str, str]], None]
    minute: Callable[[Mapping[str, Done]], None]


def follow(
    definitions: Sequence[CollectionDefinition],
    settings: Settings,
    ended: threading.Event,
    told: Told,
    *,
    use_log: bool = True,
    minute: float = MINUTE,
) -> bool:
    """Follow these collections until `ended` is set, or none of them is there any more.

    One that cannot be followed is told, and left out; PipelineError if that is each of them. Returns whether all that
    was begun has come to its end: if not, a batch is still being worked on by a daemon thread, which may be killed.
    """
    tally = Tally()
    followers = [Follower(each, settings, tally, told.line, ended, use_log=use_log) for each in definitions]
    followers = _opened(followers, told, ended)
    database, number = open_database(settings), f"activity {uuid.uuid4()}"
    told.started({follower.name: follower.words for follower in followers})
    for follower in followers:
        follower.told_how = True
    threads = [threading.Thread(target=each.run, name=f"live {each.name}", daemon=True) for each in followers]
    with ExitStack() as stack:
        for thread in threads:
            thread.start()
        at, noted = time.monotonic() + minute, _noted(stack, database, number, followers)
        try:
            while any(thread.is_alive() for thread in threads) and not ended.wait(1.0):
                noted = noted or _noted(stack, database, number, followers)
                if time.monotonic() >= at:
                    at += minute
                    _report(tally, told)
        finally:
            ended.set()
            if not _ended_within(QUIET_SECONDS, threads):
                told.line("ending, once the batches at hand are committed; asked again, at once")
                _ended_within(STOP_SECONDS - QUIET_SECONDS, threads)
            _report(tally, told)
    return _ended_within(0.0, threads)


def _noted(stack: ExitStack, database: Database, number: str, followers: Sequence[Follower]) -> bool:
    """Note that this process is at work until `stack` ends; False if the database is away."""
    try:
        stack.enter_context(run_lock(database, number))
    except (PipelineError, psycopg.Error):
        return False
    for each in followers:
        stack.enter_context(activity(database, each.name, LIVE, run_id=number))(f"following {each.words}", 0, 0)
    return True


def _opened(followers: list[Follower], told: Told, ended: threading.Event) -> list[Follower]:
    """Those that can be followed; a database or a source that is away just now is waited for."""
    opened, errors = [], []
    for follower in followers:
        try:
            follower.open()
        except (PipelineError, psycopg.Error) as error:
            if not comes_of_outage(error):
                errors.append(error)
                continue
        opened.append(follower)
    for each in errors if opened else errors[1:]:
        told.line(f"warning: {each}")
    if errors and not opened:
        raise errors[0]
    return opened


def _ended_within(seconds: float, threads: Sequence[threading.Thread]) -> bool:
    """Wait for them so long; whether all have ended."""
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return not any(thread.is_alive() for thread in threads)


def _report(tally: Tally, told: Told) -> None:
    if done := tally.take():
        told.minute(done)
