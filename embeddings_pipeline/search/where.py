"""What a search is filtered by: a condition as data, checked, and made a part of statements.

{"release_year": {"gte": 2000}, "genres": {"any": ["Drama", "Crime"]}, "not": {"director": "Michael Bay"}}

Each item meets a condition or does not: one on a column without a value is not met, and `not` is met by all the others.
"""

from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime
from decimal import Decimal
from itertools import count
from numbers import Integral, Rational, Real
from typing import Any, NoReturn

import numpy as np
from psycopg import sql

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.filters import WORDS, FilterDefinition
from embeddings_pipeline.errors import ConfigurationError, did_you_mean, shown
from embeddings_pipeline.index.filters import expression_of
from embeddings_pipeline.store.condition import Condition

MOST_VALUES = 100_000  # of a whole condition
DEEPEST = 20
LONGEST_TEXT = 500  # of a list's: see filter_texts in sql/schema
COMPARISONS = {"eq": "=", "gt": ">", "gte": ">=", "lt": "<", "lte": "<="}
OPERATORS = {
    "number": ("eq", "ne", "gt", "gte", "lt", "lte", "any"),
    "timestamp": ("eq", "ne", "gt", "gte", "lt", "lte", "any"),
    "text": ("eq", "ne", "any"),
    "boolean": ("eq", "ne"),
    "texts": ("eq", "ne", "any", "all"),
}
SQL_TYPES = {"number": "numeric", "timestamp": "timestamptz", "text": "text", "boolean": "boolean", "texts": "text"}
WHITE_SPACE = " \t\n\r\f\v"  # around a part of a list, as filter_texts of sql/schema takes it off
EXAMPLES = {
    "number": '{"gte": 2000}',
    "timestamp": '{"gte": "2026-01-31"}',
    "text": '"a text"',
    "boolean": "true",
    "texts": '{"any": ["one", "another"]}',
}


def condition_of(definition: CollectionDefinition, where: object) -> Condition | None:
    """The condition that `where` says; None if it says nothing. ConfigurationError names what it cannot say."""
    if where is None or where == {}:
        return None
    compiling = _Compiling(definition)
    statement = compiling.all_of(where, 0)
    return Condition(statement, compiling.parameters, frozenset(compiling.columns))


class _Compiling:
    """One condition on its way into SQL."""

    def __init__(self, definition: CollectionDefinition) -> None:
        self.definition, self.filters = definition, definition.attributes.filters
        self.parameters: dict[str, Any] = {}
        self.columns: set[str] = set()
        self._numbers, self._values = count(), 0

    def all_of(self, where: object, depth: int) -> sql.Composable:
        if depth > DEEPEST:
            self._refuse(f"there are conditions within conditions, more than {DEEPEST} deep")
        if not isinstance(where, Mapping):
            self._refuse(f'{shown(where)} is no condition: write {{"column": {{"operator": value}}}}')
        parts = [self._part(word, value, depth) for word, value in where.items()]
        return sql.SQL(" AND ").join(parts) if parts else sql.SQL("true")

    def _part(self, word: object, value: object, depth: int) -> sql.Composable:
        if word == "not":
            return sql.SQL("(({}) IS NOT TRUE)").format(self.all_of(value, depth + 1))
        if word in ("and", "or"):
            if not isinstance(value, list | tuple):
                self._refuse(f"`{word}` takes a list of conditions, and not {shown(value)}")
            parts = [sql.SQL("({})").format(self.all_of(each, depth + 1)) for each in value]
            nothing = sql.SQL("true" if word == "and" else "false")
            return sql.SQL("({})").format(sql.SQL(f" {word} ").join(parts) if parts else nothing)
        column, kind = self._filter(word)
        asked = value if isinstance(value, Mapping) else {"any" if isinstance(value, list | tuple) else "eq": value}
        if not asked:
            self._refuse(f"{column!r} is compared with nothing: write {{{column!r}: {EXAMPLES[kind.type]}}}")
        conditions = [self._comparison(column, kind, operator, operand) for operator, operand in asked.items()]
        return sql.SQL(" AND ").join(conditions)

    def _filter(self, word: object) -> tuple[str, FilterDefinition]:
        if isinstance(word, str) and word in self.filters:
            self.columns.add(word)
            return word, self.filters[word]
        named, path = shown(word), self.definition.path or "defs.yaml"
        if word in self.definition.attributes.columns:
            self._refuse(f"{named} is not declared: add `filters: {{{word}: TYPE}}` in {path}, and sync")
        known = ", ".join(self.filters) or "none"
        near = did_you_mean(str(word), [*self.filters, *WORDS])
        self._refuse(f"there is no filter {named}{near}; declared in {path}: {known}")

    def _comparison(self, column: str, kind: FilterDefinition, operator: object, operand: object) -> sql.Composable:
        if operator not in OPERATORS[kind.type]:
            known = ", ".join(OPERATORS[kind.type])
            self._refuse(
                f"{column!r} is {_called(kind)}, which has no operator {shown(operator)}"
                f"{did_you_mean(str(operator), OPERATORS[kind.type])}; it has {known}"
            )
        if operator == "ne":
            return sql.SQL("(({}) IS NOT TRUE)").format(self._comparison(column, kind, "eq", operand))
        payload, separator = sql.Identifier("item", "payload"), self._parameter(kind.separator, "text")
        expression = expression_of(kind, payload, self._parameter(column, "text"), separator)
        if operand is None and operator == "eq":
            return sql.SQL("({} IS NULL)").format(expression)
        if operator in ("any", "all") or kind.type == "texts":
            return self._of_several(column, kind, operator, operand, expression)
        value = self._parameter(self._value(column, kind, operand), SQL_TYPES[kind.type])
        return sql.SQL("({} {} {})").format(expression, sql.SQL(COMPARISONS[str(operator)]), value)

    def _of_several(
        self, column: str, kind: FilterDefinition, operator: object, operand: object, expression: sql.Composable
    ) -> sql.Composable:
        operands = [operand] if operator == "eq" else operand
        if not isinstance(operands, list | tuple | set | frozenset):
            self._refuse(f"`{operator}` of {column!r} takes a list, and not {shown(operands)}")
        values = [self._value(column, kind, each) for each in operands]
        array = self._parameter(values, f"{SQL_TYPES[kind.type]}[]")
        if kind.type == "texts":
            return sql.SQL("({} {} {})").format(expression, sql.SQL("&&" if operator == "any" else "@>"), array)
        return sql.SQL("({} = ANY ({}))").format(expression, array)

    def _parameter(self, value: Any, type_name: str) -> sql.Composable:
        name = f"where_{next(self._numbers)}"
        self.parameters[name] = value
        return sql.SQL("{}::{}").format(sql.Placeholder(name), sql.SQL(type_name))

    def _value(self, column: str, kind: FilterDefinition, value: object) -> Any:
        self._values += 1
        if self._values > MOST_VALUES:
            self._refuse(f"it has more than {MOST_VALUES:,} values: ask in several searches")
        try:
            return READERS[kind.type](value)
        except (ValueError, TypeError, OverflowError) as error:
            self._refuse(
                f"{column!r} is {_called(kind)}, and {shown(value)} is {error}: write "
                f'{{"{column}": {EXAMPLES[kind.type]}}}'
            )

    def _refuse(self, why: str) -> NoReturn:
        raise ConfigurationError(f"collection {self.definition.name!r}: where: {' '.join(why.split())}")


def _called(kind: FilterDefinition) -> str:
    return "a list of texts" if kind.type == "texts" else f"a {kind.type}"


def _number(value: object) -> Decimal:
    if isinstance(value, bool) or not isinstance(value, Real | Decimal):
        raise ValueError("none")
    if isinstance(value, Integral):
        number = Decimal(int(value))
    elif isinstance(value, Rational):
        number = Decimal(int(value.numerator)) / int(value.denominator)
    else:
        number = Decimal(str(value))
    if not number.is_finite():
        raise ValueError("not finite")
    if abs(number.adjusted()) > 400:
        raise ValueError("longer than any that is filtered by")
    return number


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("none")
    if "\0" in value or any(0xD800 <= ord(character) <= 0xDFFF for character in value):
        raise ValueError("none that a database can hold")
    return value


def _part_of_list(value: object) -> str:
    text = _text(value).strip(WHITE_SPACE)
    if len(text) > LONGEST_TEXT:
        raise ValueError(f"longer than {LONGEST_TEXT} characters")
    return text


def _boolean(value: object) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise ValueError("none")
    return bool(value)


def _timestamp(value: object) -> datetime:
    """A time; without a zone it is UTC's."""
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value.strip())
        except ValueError:
            raise ValueError("none") from None
    elif isinstance(value, date) and not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)
    if not isinstance(value, datetime):
        raise ValueError("none")
    return value if value.tzinfo else value.replace(tzinfo=UTC)


READERS: dict[str, Callable[[object], Any]] = {
    "number": _number,
    "text": _text,
    "boolean": _boolean,
    "timestamp": _timestamp,
    "texts": _part_of_list,
}
