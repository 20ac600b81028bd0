"""Where a sync's time goes: a flame graph and a table, of a whole process on a fresh state folder.

    python benchmarks/profile_sync.py [movies.csv] [--changed PERCENT] [--out profile]

A sampling profiler (py-spy) looks at the process a hundred times a second, from outside, at every thread and whether it
works or waits. A sample counts for the innermost function that belongs to one of the steps: what psycopg does for COPY
is COPY's. Of threads beside the main one only what works is counted, so that steps which overlap may add up to more
than the whole. Written are `sync.svg`, the flame graph, and `sync.md`, the table, which is printed too.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import psycopg

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.store.database import open_database

ROOT = Path(__file__).resolve().parents[1]
SAMPLES_PER_SECOND = 100
# What a frame (`function (file:line)`) counts as, by the first that fits; from the innermost frame outwards.
STEPS = (
    ("starting PostgreSQL", r"\(embeddings_pipeline/store/server/"),
    ("imports", r"\(<frozen importlib|\(<frozen zipimport"),
    ("converting the model, once", r"\(embeddings_pipeline/encoders/conver"),
    ("tokens", r"^\w*token\w* \(embeddings_pipeline/encoders/|encoders/token_rows|\(tokenizers/|tokenization"),
    ("encode", r"\(embeddings_pipeline/encoders/"),
    ("hash", r"^\w*(hash|digest)\w* \(embeddings_pipeline/"),
    ("render", r"\(embeddings_pipeline/(pipeline/render|config/template)"),
    ("copy", r"\(embeddings_pipeline/store/copy_binary|^_?copy\w* \(embeddings_pipeline/"),
    ("lake", r"\(embeddings_pipeline/store/lake"),
    ("read", r"\(embeddings_pipeline/(store/source|pipeline/read)"),
    ("commit", r"\(embeddings_pipeline/(pipeline/commit|store/destination/)"),
    ("indexes", r"\(embeddings_pipeline/index/"),
    ("ledger", r"\(embeddings_pipeline/ledger/"),
    ("Dagster", r"\((dagster\w*|sqlalchemy|alembic)/"),
)
WAITS = re.compile(r"\((threading|queue|selectors|concurrent/futures/\w+)\.py")
FRAME = re.compile(r"(?P<name>.*) \([\d,]+ samples?, [\d.]+%\)", re.DOTALL)
X, WIDTH = "{http://github.com/jonhoo/inferno}x", "{http://github.com/jonhoo/inferno}w"


@dataclass(frozen=True)
class Frame:
    """One box of a flame graph: where it begins and how wide it is, in samples; y grows towards the caller."""

    name: str
    x: int
    width: int
    y: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("catalogue", nargs="?", default=str(ROOT / "examples" / "movies.csv"))
    parser.add_argument(
        "--changed", type=float, metavar="PERCENT", help="of a sync after such a change; else the first"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "profile")
    arguments = parser.parse_args()
    if shutil.which("py-spy", path=str(Path(sys.executable).parent)) is None:
        raise SystemExit(
            "error: py-spy is not there: `make profile` installs it, or pip install 'embeddings-pipeline[bench]'"
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    seconds = record(arguments.catalogue, arguments.changed, arguments.out / "sync.svg")
    table = "\n".join(rows(attributed(stacks(arguments.out / "sync.svg")), seconds))
    (arguments.out / "sync.md").write_text(table + "\n", encoding="utf-8")
    print(table)
    print(f"\nflame graph: {arguments.out / 'sync.svg'} (open it in a browser)", file=sys.stderr)
    return 0


def record(catalogue: str, changed: float | None, graph: Path) -> float:
    """Sync the catalogue in a state folder of its own, under the profiler; seconds of the whole process."""
    folder = Path(tempfile.mkdtemp(prefix="profile-"))
    folder.chmod(0o711)  # as root, PostgreSQL runs as another user
    environment = {**os.environ, "EMBEDDINGS_STATE_DIR": str(folder), "DAGSTER_HOME": str(ROOT)}
    environment.pop("DATABASE_URL", None)
    environment.setdefault("EMBEDDINGS_DEFS_DIR", str(ROOT / "embeddings_pipeline" / "defs"))
    program = [sys.executable, "-m", "embeddings_pipeline"]
    sync = [*program, "sync", "--collection", "items"]

    def run(command: list[str]) -> None:
        subprocess.run(command, env=environment, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)

    try:
        run([*program, "load", catalogue, "--table", "movies"])
        if changed is not None:
            run(sync)
            change(folder, changed)
        spy = [str(Path(sys.executable).with_name("py-spy")), "record", "--rate", str(SAMPLES_PER_SECOND)]
        spy += ["--idle", "--threads", "--full-filenames", "--format", "flamegraph", "--output", str(graph), "--"]
        started = time.perf_counter()
        run([*spy, *sync])
        return time.perf_counter() - started
    except subprocess.CalledProcessError as error:
        raise SystemExit(
            f"error: {' '.join(error.cmd[:3])} … failed, for the reason above; a profiler needs the right to look at "
            "another process (in a container: --cap-add SYS_PTRACE)"
        ) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def change(folder: Path, percent: float) -> None:
    """Edit that share of the films."""
    database = open_database(Settings(database_url=None, embeddings_state_dir=folder))
    with database.connect() as connection:
        query = psycopg.sql.SQL("UPDATE movies SET overview = overview || ' Again.' WHERE mod(hashint8(id), 1000) < {}")
        connection.execute(query.format(psycopg.sql.Literal(round(10 * percent))))
    database.close()


def stacks(graph: Path) -> Iterator[tuple[list[str], int]]:
    """The stacks of a flame graph, each from the thread to its innermost frame, with how many samples end there."""
    boxes = []
    for group in ElementTree.parse(graph).iter("{http://www.w3.org/2000/svg}g"):
        title, rect = group.find("{*}title"), group.find("{*}rect")
        if title is not None and rect is not None and (named := FRAME.fullmatch(title.text or "")):
            boxes.append(
                Frame(named["name"], int(rect.get(X, "0")), int(rect.get(WIDTH, "0")), float(rect.get("y", "0")))
            )
    by_row: dict[float, list[Frame]] = {}
    for box in boxes:
        by_row.setdefault(box.y, []).append(box)
    levels = [by_row[y] for y in sorted(by_row)]
    if levels and len(levels[0]) > 1:  # the root is at the other end
        levels.reverse()
    yield from _walk(levels, 1, levels[0][0], []) if levels else ()


def _walk(levels: list[list[Frame]], depth: int, at: Frame, above: list[str]) -> Iterator[tuple[list[str], int]]:
    inside = [box for box in (levels[depth] if depth < len(levels) else ()) if at.x <= box.x < at.x + at.width]
    own = at.width - sum(box.width for box in inside)
    if own > 0:
        yield above, own
    for box in inside:
        yield from _walk(levels, depth + 1, box, [*above, box.name])


def attributed(samples: Iterator[tuple[list[str], int]]) -> Counter[str]:
    """How many samples each step has."""
    counted: Counter[str] = Counter()
    for frames, number in samples:
        if not frames:
            continue
        thread, *stack = frames
        main_thread = re.fullmatch(
            r"thread \(\d+\)(: MainThread)?", thread
        )  # it gets its name a moment after its start
        waits = bool(stack) and WAITS.search(shortened(stack[-1])) is not None
        if waits and not main_thread:
            continue
        step = step_of([shortened(frame) for frame in stack]) if stack else "the interpreter, before and after"
        counted["waiting for another step" if waits and step == "other" else step] += number
    return counted


def shortened(frame: str) -> str:
    """The frame with its file as a module would be named: without the folder that it is installed in."""
    return re.sub(r"\((?:[^()]*/(?:site-packages|lib/python3\.\d+)/|" + re.escape(str(ROOT)) + "/)", "(", frame)


def step_of(stack: list[str]) -> str:
    """Which step the innermost frame that belongs to one belongs to."""
    for frame in reversed(stack):
        for step, pattern in STEPS:
            if re.search(pattern, frame):
                return step
    return "other"


def rows(counted: Counter[str], seconds: float) -> Iterator[str]:
    """The table, the longest first."""
    yield "| step | seconds | of the whole |"
    yield "|---|---|---|"
    for step, number in counted.most_common():
        spent = number / SAMPLES_PER_SECOND
        yield f"| {step} | {spent:.2f} | {100 * spent / seconds:.0f} % |"
    yield f"| whole process, as the profiler slows it | {seconds:.2f} | |"
    yield "\nSteps overlap, each in a thread of its own: together they are more than the whole."


if __name__ == "__main__":
    sys.exit(main())
