"""Queries with the items that answer them, from files: our JSON lines, a folder as BEIR has it, TREC topics and qrels.

| what | queries | judgements |
|---|---|---|
| JSON lines | `{"query": "…", "relevant": ["key", …]}`, or `"relevant": {"key": grade, …}` | in the same line |
| BEIR | `queries.jsonl`: `{"_id": "…", "text": "…"}` | `qrels/test.tsv`: query, item, grade, by tabs |
| TREC | `<top> <num> … <title> …`, or `id` and query by a tab | lines of query, anything, item, grade |

A grade is a whole number. An item whose grade is 0 or less is not relevant.
"""

import html
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from embeddings_pipeline.config.templates import visible
from embeddings_pipeline.errors import ConfigurationError
from embeddings_pipeline.search.arguments import key_text
from embeddings_pipeline.wording import counted, many

MOST_GRADE = 1000  # what counts relevant items counts them by grade
OUR_LINE = '{"query": "…", "relevant": ["item key", …]} or {"query": "…", "relevant": {"item key": grade, …}}'
BEIR_LINE = '{"_id": "…", "text": "…"}'
TOPIC = re.compile(r"<(top|topic)\b([^>]*)>(.*?)</\1\s*>", re.DOTALL | re.IGNORECASE)
TOPIC_FIELDS = ("title", "query", "question", "desc", "description")  # the first that says something is the query
SPLIT = "test"  # of a BEIR folder, if it has it

Read = TypeVar("Read")


@dataclass(frozen=True)
class JudgedQuery:
    """A query, and the keys of the items that answer it with their grades, 1 or more."""

    text: str
    relevant: Mapping[str, int]


@dataclass(frozen=True)
class Judgements:
    """The queries that have relevant items, and what a person should know of the others."""

    source: str  # where they are from, for people
    queries: tuple[JudgedQuery, ...]
    notes: tuple[str, ...] = ()

    @property
    def items(self) -> set[str]:
        """The keys of all relevant items."""
        return {key for query in self.queries for key in query.relevant}


def read_judgements(path: Path, qrels: Path | None = None) -> Judgements:
    """The judged queries of a file or folder. `qrels`: the judgements of TREC topics, or others than BEIR's of `test`.

    ConfigurationError names the file and line that is wrong, or says what is missing.
    """
    file = path / "queries.jsonl" if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        raise ConfigurationError(
            f"{path} has no queries.jsonl: name a folder as BEIR has it, or a file of queries (and `--qrels FILE`)"
        )
    text = _text(file)
    if not text.strip():
        return _whole(file.name, [], [])
    if not text.lstrip().startswith(("{", "[")):
        if qrels is None:
            raise ConfigurationError(
                f"{file} has TREC topics, if anything: name the judgements of its queries with `--qrels FILE`; our own "
                f"lines are {OUR_LINE}"
            )
        return _judged(file, _topics(file, text), qrels)
    first = next(line for line in text.split("\n") if line.strip())
    if '"_id"' in first and '"relevant"' not in first:
        return _judged(file, _beir_queries(file, text), qrels or _beir_qrels(file.parent))
    if qrels is not None:
        raise ConfigurationError(f"{file} has its judgements in it: leave `--qrels` out")
    return _whole(file.name, list(_each_line(file, text, _our_line, OUR_LINE)), [])


def _whole(source: str, queries: list[JudgedQuery], notes: list[str]) -> Judgements:
    """Without the queries that nothing answers. ConfigurationError if no other is left."""
    judged = tuple(query for query in queries if query.relevant)
    if not judged:
        counts = f"of its {counted(len(queries), 'query')} none has a relevant item" if queries else "it has no query"
        raise ConfigurationError(f"{source}: {counts}, so that nothing can be measured")
    if left := len(queries) - len(judged):
        notes = [f"{counted(left, 'query')} without a relevant item {many(left, 'is')} left out", *notes]
    return Judgements(source, judged, tuple(notes))


def _text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as error:
        raise ConfigurationError(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigurationError(f"{file}, line {line}: it is not UTF-8; convert it") from error


def _each_line(file: Path, text: str, read: Callable[[str], Read], wanted: str) -> Iterator[Read]:
    """What each line says that is not blank. ConfigurationError names the line that cannot be read."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield read(line)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError, ConfigurationError) as error:
            why = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise ConfigurationError(f"{file}, line {number}: a line is {wanted} in UTF-8 ({why})") from error


def _our_line(line: str) -> JudgedQuery:
    said = json.loads(line)
    query, relevant = said["query"], said["relevant"]
    if not isinstance(relevant, list | dict) or not relevant:
        raise ValueError("relevant: a list of at least one key, or a mapping of keys to grades")
    pairs = relevant.items() if isinstance(relevant, dict) else [(key, 1) for key in relevant]
    return JudgedQuery(_query(query), _relevant((key_text(key), _grade(grade)) for key, grade in pairs))


def _query(text: Any) -> str:
    if not isinstance(text, str) or not visible(text):
        raise ValueError("the query is a text, and not blank")
    return text


def _grade(value: Any) -> int:
    """A whole number, also as text or as `1.0`."""
    number = float(value) if not isinstance(value, bool) and isinstance(value, int | float | str) else float("nan")
    if not number.is_integer() or number > MOST_GRADE:
        raise ValueError(f"a grade is a whole number up to {MOST_GRADE}, and not {value!r}")
    return int(number)


def _relevant(pairs: Iterator[tuple[str, int]]) -> dict[str, int]:
    """Each item once, with its highest grade."""
    grades: dict[str, int] = {}
    for key, grade in pairs:
        if grade > 0:
            grades[key] = max(grade, grades.get(key, 0))
    return grades


# --- BEIR -----------------------------------------------------------------------------------------------------------


def _beir_queries(file: Path, text: str) -> dict[str, str]:
    def read(line: str) -> tuple[str, str]:
        said = json.loads(line)
        return str(said["_id"]), _query(said["text"])

    return _by_id(file, _each_line(file, text, read, BEIR_LINE))


def _beir_qrels(folder: Path) -> Path:
    files = sorted((folder / "qrels").glob("*.tsv"))
    chosen = next((file for file in files if file.stem == SPLIT), files[0] if len(files) == 1 else None)
    if chosen is None:
        there = f"has {', '.join(file.name for file in files)}" if files else "is not there, or has no .tsv"
        raise ConfigurationError(f"{folder / 'qrels'} {there}: name a file of judgements with `--qrels FILE`")
    return chosen


# --- TREC -----------------------------------------------------------------------------------------------------------


def _topics(file: Path, text: str) -> dict[str, str]:
    if not re.search(r"<top(ic)?\b", text, re.IGNORECASE):
        return _by_id(file, _each_line(file, text, _topic_line, "a query's id and the query, with a tab between them"))
    found = list(TOPIC.finditer(text))
    begun = len(re.findall(r"<top(ic)?\b", text, re.IGNORECASE))
    if begun != len(found):
        raise ConfigurationError(f"{file}: {counted(begun, 'topic')} begun by <top>, {len(found):,} ended by </top>")
    return _by_id(file, (_topic(file, number, *topic.group(2, 3)) for number, topic in enumerate(found, 1)))


def _topic_line(line: str) -> tuple[str, str]:
    if re.fullmatch(r"\S+\s+(0|Q0)\s+\S+\s+-?\d+\s*", line) or (line.count("\t") > 1 and _judgement_fields(line)):
        raise ValueError("this is a line of judgements, which `--qrels` takes")
    identifier, _, query = line.strip().partition("\t")
    return identifier.strip(), _query(query.strip())


def _topic(file: Path, number: int, attributes: str, content: str) -> tuple[str, str]:
    given = re.search(r"\b(?:number|id|num)\s*=\s*[\"']?([^\"'\s>]+)", attributes, re.IGNORECASE)
    identifier = given[1] if given else _field(content, "num").removeprefix("Number:").strip()
    query = next(filter(visible, (_field(content, name) for name in TOPIC_FIELDS)), None)
    if not identifier or query is None:
        lacks = "<num>" if not identifier else " or ".join(f"<{name}>" for name in TOPIC_FIELDS[:3])
        raise ConfigurationError(f"{file}: topic {number:,} ({identifier or 'without number'}) has no {lacks}")
    return identifier, query


def _field(content: str, name: str) -> str:
    """What stands in a field, on one line, without the label that old topics repeat in it."""
    found = re.search(rf"<{name}\b[^>]*>([^<]*)", content, re.IGNORECASE)
    words = " ".join(html.unescape(found[1]).split()) if found else ""
    return re.sub(r"^(Topic|Description):\s*", "", words)


# --- both -----------------------------------------------------------------------------------------------------------


def _by_id(file: Path, pairs: Iterator[tuple[str, str]]) -> dict[str, str]:
    queries: dict[str, str] = {}
    for identifier, query in pairs:
        if identifier in queries:
            raise ConfigurationError(f"{file}: two queries have the id {identifier!r}, which names one")
        queries[identifier] = query
    return queries


def _judgement_fields(line: str) -> tuple[str, str, str] | None:
    """Query, item and grade, of three fields (BEIR) or four (TREC), by tabs or, without them, by spaces."""
    for fields in (line.strip().split("\t"), line.split()):
        if len(fields) in (3, 4):
            query, item, grade = (fields[place].strip() for place in (0, -2, -1))
            if query and item and re.fullmatch(r"[+-]?\d+(\.0*)?", grade):
                return query, item, grade
    return None


def _judged(file: Path, queries: Mapping[str, str], qrels: Path) -> Judgements:
    """The queries with what a file of judgements says of them."""
    wanted = "query, item and grade (BEIR), or query, anything, item and grade (TREC), by tabs or spaces,"

    def read(line: str) -> tuple[str, str, int]:
        if (fields := _judgement_fields(line)) is None:
            raise ValueError(f"and not {line[:80]!r}")
        return fields[0], key_text(fields[1]), _grade(fields[2])

    text = _text(qrels)
    head, _, rest = text.partition("\n")
    if re.match(r"(query|qid|topic)", head, re.IGNORECASE) and _judgement_fields(head) is None:  # names of columns
        text = f"\n{rest}"
    grades: dict[str, dict[str, int]] = {}
    strangers, differing = set(), 0
    for identifier, item, grade in _each_line(qrels, text, read, wanted):
        if identifier not in queries:
            strangers.add(identifier)
            continue
        known = grades.setdefault(identifier, {})
        differing += known.get(item, grade) != grade
        known[item] = max(grade, known.get(item, grade))
    notes = []
    if strangers:
        notes.append(
            f"{qrels.name} judges {counted(len(strangers), 'query')} that {many(len(strangers), 'is')} not in "
            f"{file.name}, such as {min(strangers)!r}"
        )
    if differing:
        gives = many(differing, "gives")
        notes.append(f"{counted(differing, 'judgement')} of {qrels.name} {gives} another grade: the higher counts")
    judged = [JudgedQuery(query, _relevant(iter(grades.get(key, {}).items()))) for key, query in queries.items()]
    return _whole(f"{file.name} with {qrels.name}", judged, notes)
