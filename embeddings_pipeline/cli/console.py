"""What the commands share: their options, what they open, and what they print."""

import logging
import math
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import click
import psycopg
import simplejson
import typer

from embeddings_pipeline.config.settings import Settings, load_settings
from embeddings_pipeline.errors import ConfigurationError, PipelineError
from embeddings_pipeline.progress import Progress, silent
from embeddings_pipeline.wording import counted, many

if TYPE_CHECKING:
    from embeddings_pipeline.config.definition import CollectionDefinition
    from embeddings_pipeline.config.loading import Defined
    from embeddings_pipeline.store.database import Database

CollectionOption = Annotated[str | None, typer.Option("--collection", "-c", help="Left out: the only one, or `items`.")]
EachCollectionOption = Annotated[str | None, typer.Option("--collection", "-c", help="Left out: each one.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
FIRST_LINE_SECONDS, LINE_SECONDS = 5.0, 9.0  # until the first line of progress, and between two
ApiOption = Annotated[
    str,
    typer.Option(
        "--api",
        click_type=click.Choice(["direct", "batch"]),
        help="batch: hand texts to a hosted model's Batch API, at half the price, within a day.",
    ),
]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before it starts.")]


def a_number(value: float | None) -> float | None:
    """For an option that `nan` would switch off."""
    if value is not None and math.isnan(value):
        raise typer.BadParameter("nan is no number")
    return value


def pipeline_database(settings: Settings) -> "Database":
    """The pipeline's database, with its schema."""
    from embeddings_pipeline.store.database import open_database
    from embeddings_pipeline.store.schema import ensure_schema

    database = open_database(settings)
    ensure_schema(database)
    return database


def database_to_read(settings: Settings) -> "Database":
    """The pipeline's database for what only looks: its schema may not be there."""
    from embeddings_pipeline.store.database import open_database_to_read
    from embeddings_pipeline.store.schema import has_schema

    database = open_database_to_read(settings)
    has_schema(database)
    return database


def start_database(settings: Settings) -> None:
    """Have a thread start the embedded database, if there is one, while this thread imports what the command needs.

    What fails there is told by whoever opens the database next.
    """
    from embeddings_pipeline.store.database import open_database, was_used

    def start() -> None:
        with suppress(PipelineError, psycopg.Error, OSError):
            open_database(settings)

    if not settings.database_url and was_used(settings):
        threading.Thread(target=start, name="database", daemon=True).start()


def chosen_collection(name: str | None) -> "CollectionDefinition":
    """The collection of that name; without a name, the only one or `items`."""
    defined = defined_collections()
    chosen = defined.find(name)
    warn_of_mistakes(defined)
    return chosen


def chosen_collections(name: str | None) -> "list[CollectionDefinition]":
    """The collection of that name; without a name, each one whose file has no mistake, the sample only if alone."""
    from embeddings_pipeline.config.loading import without_sample

    defined = defined_collections()
    own = without_sample(defined.collections)
    chosen = [defined.find(name)] if name is not None or not own else [*own.values()]
    warn_of_mistakes(defined)
    return chosen


def defined_collections() -> "Defined":
    """What is defined below the defs folder."""
    from embeddings_pipeline.config.loading import read_collections

    return read_collections(load_settings().defs_dir)


def check_all_defined(name: str | None) -> None:
    """For a command that was to do all collections, at its end: PipelineError if some have a mistake in their file."""
    mistakes = {} if name is not None else defined_collections().mistakes
    if mistakes:
        raise PipelineError(f"{', '.join(map(str, mistakes))}: left out because of the mistake that is told above")


def warn_of_mistakes(defined: "Defined") -> None:
    """A mistake in another collection's file is told, and stops nothing."""
    for error in defined.mistakes.values():
        tell(f"warning: {error}")


def about_undefined(name: str, defined: "Defined") -> str:
    """Of a collection that is kept, and is not among those that are defined: why that is, and what to do."""
    if defined.mistakes:
        path = defined.likeliest(name)
        return f"its defs.yaml cannot be read, or is gone: {path} has a mistake, and has to be mended or deleted first"
    drops, settings = f"`embeddings-pipeline collection remove {name}` drops it", load_settings()
    folder = settings.defs_dir
    if defined.own and settings.embeddings_defs_dir is not None:
        return (
            f"not defined in {folder}, which EMBEDDINGS_DEFS_DIR names: only if all of your collections are there, and "
            f"this one is to go, {drops}"
        )
    if not defined.own:
        return (
            f"not defined, as no collection of yours is in {folder}: does EMBEDDINGS_DEFS_DIR name the folder of your "
            f"collections? Only if it does, and this one is to go, {drops}"
        )
    return f"no longer defined: {drops}"


def confirm(question: str, otherwise: str) -> None:
    """Ask, and end unless the answer is yes. ConfigurationError, saying `otherwise`, if there is nobody to ask."""
    if not sys.stdin.isatty():
        raise ConfigurationError(otherwise)
    with _shown_here():
        typer.confirm(question, abort=True, err=True)


class Pace:
    """How far long work is, for people: `300 of 1,200 texts, 250 texts/s, 4 s left`."""

    def __init__(self, unit: str) -> None:
        self.unit, self.phase, self.done, self.total = unit, "starting", 0, 0
        self._since, self._first, self._moves = time.monotonic(), 0, False

    def update(self, phase: str, done: int, total: int) -> None:
        is_known = self.total and done >= self.done  # else: other texts, or the first time that they are known
        comes_first = done > self.done and not self._moves  # it waited for a model to load
        if total and (comes_first or not is_known):
            self._since, self._first, self._moves = time.monotonic(), done, bool(is_known)
        self.phase, self.done, self.total = phase, done, total

    def __str__(self) -> str:
        if not self.total:
            return ""
        parts = [f"{self.done:,} of {counted(self.total, self.unit)}"]
        seconds, newly = time.monotonic() - self._since, self.done - self._first
        if newly > 0 and seconds > 0:
            left = (self.total - self.done) * seconds / newly
            parts += [f"{newly / seconds:,.0f} {many(2, self.unit)}/s", f"{duration(max(1, left))} left"]
        return ", ".join(parts)


@contextmanager
def progress_bar(name: str, *, show: bool, unit: str = "text") -> Iterator[Progress]:
    """`progress(phase, done, total)` for long work: a bar on a terminal, else a line now and then."""
    if not show:
        yield silent
        return
    shown = _bar if sys.stderr.isatty() else _lines
    with _shown_here(), shown(name, Pace(unit)) as progress:
        yield progress


@contextmanager
def sign_of_life(name: str) -> Iterator[None]:
    """A line now and then that the work goes on, unless a bar or lines of its own say so."""
    with _now_and_then(lambda: None if _shown else f"{name}: still at work"):
        yield


_shown: list[object] = []  # bars and lines that are shown at the moment


@contextmanager
def _shown_here() -> Iterator[None]:
    _shown.append(shown := object())
    try:
        yield
    finally:
        _shown.remove(shown)


@contextmanager
def _bar(name: str, pace: Pace) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[pace]}"), TimeElapsedColumn()]
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"{name}: starting", total=None, pace="")

        def progress(phase: str, done: int, total: int) -> None:
            pace.update(phase, done, total)
            bar.update(task, description=f"{name}: {phase}", completed=done, total=total or None, pace=str(pace))

        yield progress


@contextmanager
def _lines(name: str, pace: Pace) -> Iterator[Progress]:
    with _now_and_then(lambda: f"{name}: {', '.join(filter(None, (pace.phase, str(pace))))}"):
        yield pace.update


@contextmanager
def _now_and_then(line: Callable[[], str | None]) -> Iterator[None]:
    """A line after FIRST_LINE_SECONDS, and then after each LINE_SECONDS, so that a log shows that the work goes on."""
    started, ended = time.monotonic(), threading.Event()

    def tell() -> None:
        wait = FIRST_LINE_SECONDS
        while not ended.wait(wait):
            if told := line():
                print(f"{told}; {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
            wait = LINE_SECONDS

    telling = threading.Thread(target=tell, daemon=True)
    telling.start()
    try:
        yield
    finally:
        ended.set()
        telling.join()


def print_json(value: Any) -> None:
    """One JSON document, in ASCII if the output takes no more."""
    written = json_of(value)
    try:
        written.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        written = json_of(value, ensure_ascii=True)
    print(written)


def json_of(value: Any, *, ensure_ascii: bool = False) -> str:
    """As JSON; a Decimal with all its digits, what JSON has no form for, such as a time, as text."""
    return simplejson.dumps(value, ensure_ascii=ensure_ascii, default=str, use_decimal=True, ignore_nan=True)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """What is waited for, until it is there."""
    if sys.stderr.isatty():
        from rich.console import Console

        with _shown_here(), Console(stderr=True).status(what):
            yield
    else:
        with _shown_here(), _now_and_then(lambda: what):
            yield


def print_cut(bold: str, dimmed: str) -> None:
    """One line: on a terminal in bold and dimmed, as wide as that is; elsewhere whole."""
    if not sys.stdout.isatty():
        print(bold + dimmed)
        return
    from rich.console import Console
    from rich.text import Text

    Console().print(Text.assemble((bold, "bold"), (dimmed, "dim")), no_wrap=True, overflow="ellipsis")


def printable(text: str) -> str:
    """A text on one line, with what a terminal would obey, or could not show, escaped: line ends, colours, bells."""
    return "".join(
        char if char == " " or char.isprintable() or _joins(char) else char.encode("unicode_escape").decode()
        for char in text
    )


def tell(line: str) -> None:
    """A line on stderr, as a terminal may have it."""
    print(printable(line), file=sys.stderr)


class LineFormatter(logging.Formatter):
    """Each record is a line, and a traceback below it lines, that a terminal may have."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        return "\n".join(map(printable, super().formatException(ei).split("\n")))


def _joins(char: str) -> bool:
    """Joiners and variation selectors make up emoji and scripts; spaces such as U+00A0 do no harm."""
    return char in "\u200c\u200d" or unicodedata.category(char) == "Zs"


def size(count: int) -> str:
    """A number of bytes for people."""
    sign, count = ("-" if count < 0 else ""), abs(count)
    return f"{sign}{count / 1e9:.1f} GB" if count >= 1e9 else f"{sign}{count / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """A length of time for people."""
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"


def ago(since: float | datetime) -> str:
    """How long ago something was, for people: from seconds, or from when it was."""
    seconds = (datetime.now(UTC) - since).total_seconds() if isinstance(since, datetime) else since
    for unit, size_of, most in (("second", 1, 120), ("minute", 60, 7200), ("hour", 3600, 172_800)):
        if seconds < most:
            number = max(0, int(seconds / size_of))
            return f"{number} {unit}{'' if number == 1 else 's'} ago"
    return f"{seconds / 86_400:.0f} days ago"
