"""What the commands print with: a progress bar for people, JSON for programs."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def progress_bar(name: str, *, show: bool) -> Iterator[Callable[[str, int, int], None]]:
    """`progress(phase, done, total)` for long work; a bar in batches where stderr is a terminal."""
    if not show or not sys.stderr.isatty():
        yield lambda phase, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("batches")]
    columns += [TimeElapsedColumn()]
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"{name}: starting", total=None)
        yield lambda phase, done, total: bar.update(
            task, description=f"{name}: {phase}", completed=done, total=total or None
        )


def print_json(value: Any) -> None:
    """One JSON document; what JSON has no form for, times for one, as text."""
    print(json.dumps(value, ensure_ascii=False, default=str))
