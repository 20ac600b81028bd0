"""What searches may filter by: payload columns with their types."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from embeddings_pipeline.errors import did_you_mean

FilterType = Literal["number", "text", "boolean", "timestamp", "texts"]
TYPES = get_args(FilterType)
WORDS = ("and", "or", "not")  # of a condition, beside the columns' names


def _known_type(value: Any) -> Any:
    if value not in TYPES:
        near = did_you_mean(str(value), TYPES)
        raise ValueError(f"{value!r} is not a type of a filter: it is one of {', '.join(TYPES)}{near}")
    return value


class FilterDefinition(BaseModel):
    """A payload column that searches may filter by. `COLUMN: number` is short for `COLUMN: {type: number}`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Annotated[FilterType, BeforeValidator(_known_type, json_schema_input_type=FilterType)] = Field(
        description="What the column's values are. Those that are not of the type count as missing."
    )
    separator: str = Field(
        default="", description="With `texts`: what parts the texts of a column that is one text; empty: nothing does."
    )

    def model_post_init(self, _: Any) -> None:
        if self.separator and self.type != "texts":
            raise ValueError(f"`separator:` parts a list of `texts`, and this is {self.type}: leave it out")


def _as_mapping(value: Any) -> Any:
    return {"type": value} if isinstance(value, str) else value


Filter = Annotated[FilterDefinition, BeforeValidator(_as_mapping, json_schema_input_type=FilterType | FilterDefinition)]


def check_filters(filters: Mapping[str, FilterDefinition], columns: Sequence[str]) -> None:
    """ValueError if searches could not filter by one of these."""
    for column in filters:
        if column in WORDS:
            raise ValueError(f"`filters:`: {column!r} is a word of conditions: give the column another name in a view")
        if column not in columns:
            raise ValueError(
                f"`filters:`: {column!r} is not among `columns:`{did_you_mean(column, columns)}: add it there, since "
                "what is filtered by is the payload"
            )
