"""Kinds of values that the sections of a `defs.yaml` are made of, each with a check that says what would be right."""

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator


def whole_number(least: int, most: int) -> BeforeValidator:
    """A whole number within these bounds, and neither `true` nor text."""

    # A validator of our own: Dagster's YAML check passes a wrong type on, and Field(ge=…) then dies as a TypeError.
    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ValueError(f"{value!r} is not a whole number from {least} to {most}")
        return value

    return BeforeValidator(check, json_schema_input_type=int)


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{value!r} is not a number")
    if not math.isfinite(value):
        raise ValueError(f"{value!r} is not a finite number")
    return value


def _yes_or_no(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} is neither true nor false")
    return value


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("it is blank: fill it in, or leave it out")
    return text


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def variable_name(text: str) -> str:
    """The name of a variable of the environment; never shown, since it may be the secret itself."""
    if not re.fullmatch(r"[A-Za-z_]\w*", text, re.ASCII):
        raise ValueError("this is the name of a variable of the environment, never the secret itself")
    return text


def _as_pairs(value: Any) -> Any:
    return tuple(value.items()) if isinstance(value, Mapping) else value


def _different(names: tuple[str, ...]) -> tuple[str, ...]:
    for n, name in enumerate(names):
        if not name.strip() or name in names[:n]:
            raise ValueError(f"{name!r} stands there twice" if name.strip() else "a column has a name")
    return names


Number = Annotated[float, BeforeValidator(_number, json_schema_input_type=float)]
YesOrNo = Annotated[bool, BeforeValidator(_yes_or_no, json_schema_input_type=bool)]
Text = Annotated[str, AfterValidator(_not_blank)]
Texts = Annotated[tuple[Text, ...], BeforeValidator(_as_list, json_schema_input_type=str | list[str])]
Columns = Annotated[
    tuple[str, ...],
    BeforeValidator(_as_list, json_schema_input_type=str | list[str]),
    AfterValidator(_different),
]
# A mapping of texts, as pairs: a profile can be the key of a dictionary.
Headers = Annotated[
    tuple[tuple[Text, str], ...],
    BeforeValidator(_as_pairs, json_schema_input_type=dict[str, str]),
]
