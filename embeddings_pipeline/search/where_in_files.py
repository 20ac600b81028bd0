"""Whether an item of the published files meets a condition that was checked: as `search/where.py` has it, and as the
functions of sql/schema read a payload's values.
"""

import json
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

from embeddings_pipeline.config.filters import FilterDefinition
from embeddings_pipeline.search.where import LONGEST_TEXT, READERS, WHITE_SPACE

NUMBER = re.compile(r"[+-]?[0-9]+([.][0-9]+)?([eE][+-]?[0-9]{1,2})?")
# As PostgreSQL reads one; names of zones but UTC's, and times without colons, are not known here.
TIME = re.compile(
    r"([0-9]{4,6})-([0-9]{2})-([0-9]{2})(?:[Tt ]\s*([0-9]{2}):([0-9]{2})(?::([0-9]{2})(?:[.]([0-9]*))?)?)?"
    r"\s*(?:[Zz]|UTC|([+-])([0-9]{2})(?::?([0-9]{2})(?::?([0-9]{2}))?)?)?(\s+BC)?",
    re.ASCII,
)
EPOCH, MICROSECOND = datetime(2000, 1, 1, tzinfo=UTC), timedelta(microseconds=1)
CYCLE = timedelta(days=146_097)  # 400 years
MOST_DIGITS = 500
COMPARED: dict[str, Callable[[Any, Any], bool]] = {
    "eq": lambda value, operand: bool(value == operand),
    "gt": lambda value, operand: bool(value > operand),
    "gte": lambda value, operand: bool(value >= operand),
    "lt": lambda value, operand: bool(value < operand),
    "lte": lambda value, operand: bool(value <= operand),
}
Meets = Callable[[Mapping[str, Any]], bool]


def meets(filters: Mapping[str, FilterDefinition], where: Mapping[str, Any]) -> Meets:
    """Whether a payload meets the condition. KeyError if it lacks a column of it."""
    parts = [_part(filters, word, value) for word, value in where.items()]
    return lambda payload: all(part(payload) for part in parts)


def _part(filters: Mapping[str, FilterDefinition], word: str, value: Any) -> Meets:
    if word == "not":
        denied = meets(filters, value)
        return lambda payload: not denied(payload)
    if word in ("and", "or"):
        parts, joined = [meets(filters, each) for each in value], all if word == "and" else any
        return lambda payload: joined(part(payload) for part in parts)
    asked = value if isinstance(value, Mapping) else {"any" if isinstance(value, list | tuple) else "eq": value}
    comparisons = [_comparison(word, filters[word], operator, operand) for operator, operand in asked.items()]
    return lambda payload: all(comparison(payload) for comparison in comparisons)


def _comparison(column: str, kind: FilterDefinition, operator: str, operand: Any) -> Meets:
    value_of = _VALUES[kind.type]

    def read(given: Any) -> Any:
        operand = READERS[kind.type](given)
        return _microseconds(operand) if isinstance(operand, datetime) else operand

    if operator == "ne":
        equal = _comparison(column, kind, "eq", operand)
        return lambda payload: not equal(payload)
    if operator == "eq" and operand is None:
        return lambda payload: value_of(payload[column], kind.separator) is None
    if operator in ("any", "all") or kind.type == "texts":
        several = {read(each) for each in ([operand] if operator == "eq" else operand)}
        return lambda payload: _has(value_of(payload[column], kind.separator), several, operator)
    wanted, compared = read(operand), COMPARED[operator]

    def comparison(payload: Mapping[str, Any]) -> bool:
        value = value_of(payload[column], kind.separator)
        return value is not None and compared(value, wanted)

    return comparison


def _has(value: Any, several: set[Any], operator: str) -> bool:
    if value is None:
        return False
    if isinstance(value, frozenset):
        return bool(value & several) if operator == "any" else value >= several
    return value in several


# --- the values of a payload, read as `exact_json` does ---


def _number(value: Any, _: str) -> Decimal | None:
    if isinstance(value, bool) or not isinstance(value, int | Decimal | str):
        return None
    text = str(value)
    if len(text) > MOST_DIGITS or (isinstance(value, str) and not NUMBER.fullmatch(value)):
        return None
    return Decimal(text)


def _text(value: Any, _: str) -> str | None:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, str | int | Decimal) else None


def _boolean(value: Any, _: str) -> bool | None:
    return {"true": True, "false": False}.get(_text(value, "") or "")


def _texts(value: Any, separator: str) -> frozenset[str] | None:
    if isinstance(value, str):
        parts = value.split(separator) if separator else [value]
    elif isinstance(value, list):
        parts = [_text(each, "") or json.dumps(each, default=str) for each in value if each is not None]
    else:
        return None
    trimmed = (part.strip(WHITE_SPACE) for part in parts if len(part) <= LONGEST_TEXT)
    return frozenset(part for part in trimmed if part)


def _timestamp(value: Any, _: str) -> float | None:
    """Microseconds, since years that Python has none of are compared, too."""
    if not isinstance(value, str):
        return None
    if value in ("infinity", "-infinity"):
        return float(value)
    if (found := TIME.fullmatch(value.rstrip(WHITE_SPACE))) is None:
        return None
    year, month, day, hour, minute, second = (int(part or 0) for part in found.groups()[:6])
    sign, *zone = found.groups()[7:11]
    fraction = round(Decimal(f"0.{found[7] or 0}") * 1_000_000)
    if year == 0 or minute > 59 or second > 60 or (hour, minute, second, fraction) > (24, 0, 0, 0):
        return None
    cycles, within = divmod(1 - year if found[12] else year, 400)
    try:
        start = datetime(2000 + within, month, day, tzinfo=UTC)
    except ValueError:
        return None
    offset = sum(int(part or 0) * seconds for part, seconds in zip(zone, (3600, 60, 1), strict=True))
    seconds = 3600 * hour + 60 * minute + second - (-offset if sign == "-" else offset)
    return _microseconds(start) + (cycles - 5) * (CYCLE // MICROSECOND) + 1_000_000 * seconds + fraction


def _microseconds(moment: datetime) -> int:
    return (moment - EPOCH) // MICROSECOND


_VALUES: dict[str, Callable[[Any, str], Any]] = {
    "number": _number,
    "text": _text,
    "boolean": _boolean,
    "timestamp": _timestamp,
    "texts": _texts,
}
