"""What the pipeline costs, beside its peers, in one sitting on one machine: a table for BENCHMARKS.md.

    python benchmarks/bench.py movies.csv [--without-peers] [--rows N]

The first sync, a sync with nothing changed, one with 1 % changed, `status` and `search` are timed as whole processes,
as a user starts them, on a fresh state folder (the second, the fourth and the last: the shortest of five); peak memory
is the kernel's (`ru_maxrss`). The peers get a virtual environment of their own below the state folder, and the same
rows, texts, model and PostgreSQL.
"""

import argparse
import csv
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

HERE = Path(__file__).resolve().parent
PEERS = {"LangChain": "langchain_index.py", "LlamaIndex": "llamaindex_pipeline.py"}


@dataclass
class Timed:
    """One finished process."""

    seconds: float
    megabytes: float
    output: str


def run(command: list[str], environment: dict[str, str]) -> Timed:
    """Run a process to its end; seconds of wall time, peak resident megabytes of this process alone, its output."""
    began = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=HERE.parent)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    if status:
        sys.exit(f"{' '.join(command)} failed with {os.waitstatus_to_exitcode(status)}:\n{output}")
    return Timed(seconds, usage.ru_maxrss / 1024, output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("catalogue", type=Path, help="a CSV file with id, title, overview and genres")
    parser.add_argument("--rows", type=int, help="only the first rows of it")
    parser.add_argument("--without-peers", action="store_true", help="measure this project alone")
    parser.add_argument("--peers-python", type=Path, help="a Python that has benchmarks/peers/requirements.txt already")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    folder.chmod(0o711)  # as root, PostgreSQL runs as another user
    try:
        catalogue = first_rows(arguments.catalogue.resolve(), arguments.rows, folder)
        figures = ours(catalogue, folder)
        peers = (
            {}
            if arguments.without_peers
            else {name: peer(script, catalogue, folder, arguments.peers_python) for name, script in PEERS.items()}
        )
        report(figures, peers)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def first_rows(catalogue: Path, number: int | None, folder: Path) -> Path:
    with catalogue.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    path = folder / "catalogue.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows[: number + 1] if number else rows)
    return path


def ours(catalogue: Path, folder: Path) -> dict[str, object]:
    environment = {**os.environ, "EMBEDDINGS_STATE_DIR": str(folder / "state"), "DAGSTER_HOME": str(HERE.parent)}
    environment.pop("DATABASE_URL", None)
    program = [sys.executable, "-m", "embeddings_pipeline"]

    def sync() -> tuple[Timed, dict[str, int]]:
        done = run([*program, "sync", "--json"], environment)
        return done, json.loads(done.output)

    # Keeps the embedded server up between the commands, as the UI does; without a transaction, which would make every
    # concurrent index build wait.
    hold = (
        "from embeddings_pipeline.store.database import *; import time; open_database(load_settings()); time.sleep(1e5)"
    )
    hold = f"from embeddings_pipeline.config.settings import load_settings; {hold}"
    holder = subprocess.Popen([sys.executable, "-c", hold], env=environment, cwd=HERE.parent)
    try:
        run([*program, "load", str(catalogue), "--table", "movies"], environment)
        first, first_done = sync()
        nothing, nothing_done = min((sync() for _ in range(5)), key=lambda done: done[0].seconds)
        status = min((run([*program, "status", "--json"], environment) for _ in range(5)), key=lambda t: t.seconds)
        search = [*program, "search", "--json", "a man ages backwards"]
        found = min((run(search, environment) for _ in range(5)), key=lambda t: t.seconds)
        change = "UPDATE movies SET overview = coalesce(overview, '') || ' changed' WHERE id IN (SELECT id FROM (SELECT id, row_number() OVER (ORDER BY id) - 1 AS n FROM movies) AS numbered WHERE n % 100 = 0)"  # noqa: E501
        run([*program, "psql", "-q", "-c", change], environment)
        changed, changed_done = sync()
    finally:
        holder.terminate()
        holder.wait()
    encoder = run([sys.executable, str(HERE / "bench_encoder.py"), str(catalogue), "--rows", "2000"], environment)
    store = run([sys.executable, str(HERE / "bench_store.py")], environment)
    return {
        "rows": first_done["scanned"],
        "first": first,
        "first_embedded": first_done["embedded"],
        "nothing": nothing,
        "nothing_embedded": nothing_done["embedded"],
        "changed": changed,
        "changed_embedded": changed_done["embedded"],
        "status": status,
        "search": found,
        "encoder": json.loads(encoder.output.strip().splitlines()[-1]),
        "store": json.loads(store.output.strip().splitlines()[-1]),
    }


def peer(script: str, catalogue: Path, folder: Path, python: Path | None) -> dict[str, float]:
    """Seconds inside the peer's process for: first load, nothing changed, 1 % changed; and of the whole process."""
    python = python or folder / "peers-venv" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(python.parents[1])], check=True)
        requirements = str(HERE / "peers" / "requirements.txt")
        subprocess.run([str(python), "-m", "pip", "install", "-q", "-r", requirements], check=True, stdout=sys.stderr)
    command = [str(python), str(HERE / "peers" / script), str(catalogue), "--state", str(folder / f"{script}.postgres")]
    done = run(command, {**os.environ, "HF_HUB_OFFLINE": "1"})
    found = {
        name: float(seconds)
        for name, seconds in re.findall(r"(first load|nothing changed|1 % changed).*?: ([\d.]+) s", done.output)
    }
    return {**found, "megabytes": done.megabytes}


def report(figures: dict, peers: dict[str, dict[str, float]]) -> None:
    names = list(peers)

    def row(what: str, goal: str, value: str, met: bool, key: str | None = None) -> None:
        cells = [f"{peers[name][key]:.1f} s" if key and key in peers[name] else "–" for name in names]
        print(f"| {what} | {goal} | {value} | {'yes' if met else '**no**'} |" + "".join(f" {cell} |" for cell in cells))

    processor = platform.processor() or platform.machine()
    print(f"\n{date.today()}, {processor}, {os.cpu_count()} cores, {figures['rows']:,} rows\n")
    print("| | goal | measured | met |" + "".join(f" {name} |" for name in names))
    print("|---|---|---|---|" + "---|" * len(names))
    first, encoder, store = figures["first"], figures["encoder"], figures["store"]
    row("first sync, whole process", "≤ 70 s", f"{first.seconds:.1f} s", first.seconds <= 70, "first load")
    if "LangChain" in peers:
        ratio = first.seconds / peers["LangChain"]["first load"]
        row("first sync against LangChain", "≤ 0.4 ×", f"{ratio:.2f} ×", ratio <= 0.4)
    nothing, changed = figures["nothing"], figures["changed"]
    row(
        "nothing changed, whole process",
        "0 texts, ≤ 1.5 s",
        f"{figures['nothing_embedded']} texts, {nothing.seconds:.2f} s",
        figures["nothing_embedded"] == 0 and nothing.seconds <= 1.5,
        "nothing changed",
    )
    expected = -(-figures["rows"] // 100)
    row(
        "1 % changed, whole process",
        f"{expected} texts, ≤ 10 s",
        f"{figures['changed_embedded']} texts, {changed.seconds:.1f} s",
        figures["changed_embedded"] == expected and changed.seconds <= 10,
        "1 % changed",
    )
    if "LangChain" in peers:
        ratio = changed.seconds / peers["LangChain"]["1 % changed"]
        row("1 % changed against LangChain", "≤ 0.6 ×", f"{ratio:.2f} ×", ratio <= 0.6)
    peak = max(figures[name].megabytes for name in ("first", "nothing", "changed"))
    row("peak memory of the process", "≤ 1.5 GB", f"{peak / 1000:.2f} GB", peak <= 1500)
    row(
        "encoder against SentenceTransformer.encode in fp32",
        "≥ 2.5 ×, cosine ≥ 0.9999",
        f"{encoder['ratio']:.2f} ×, {encoder['min_cosine']:.6f}",
        encoder["ratio"] >= 2.5 and encoder["min_cosine"] >= 0.9999,
    )
    seconds, rate = store["faiss_from_table_seconds"], store["copy_rows_per_second"]
    row("FAISS from the table, 100,000 vectors", "≤ 2 s", f"{seconds:.2f} s", seconds <= 2)
    row("COPY into the model table, 100,000 vectors", "≥ 80,000 rows/s", f"{rate:,.0f} rows/s", rate >= 80_000)
    row("status, whole process", "≤ 1 s", f"{figures['status'].seconds:.2f} s", figures["status"].seconds <= 1)
    seconds = figures["search"].seconds
    row("search from the terminal, whole process", "≤ 1 s", f"{seconds:.2f} s", seconds <= 1)
    for name in names:
        print(f"\n{name}: seconds inside its process; peak memory {peers[name]['megabytes'] / 1000:.2f} GB")


if __name__ == "__main__":
    main()
