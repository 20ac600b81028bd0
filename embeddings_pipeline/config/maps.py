"""What `map:` may say: how the picture of a collection is made, and what it is coloured by."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from embeddings_pipeline.config.fields import Columns
from embeddings_pipeline.config.filters import FilterDefinition
from embeddings_pipeline.errors import did_you_mean

MapMethod = Literal["pca", "umap", "none"]
MOST_TELLING = ("texts", "boolean", "number", "timestamp", "text")  # types of filters, as colours


def _method(value: Any) -> Any:
    if value not in get_args(MapMethod):
        near = did_you_mean(str(value), get_args(MapMethod))
        raise ValueError(f"{value!r} is not a way to make a map: it is one of {', '.join(get_args(MapMethod))}{near}")
    return value


class MapDefinition(BaseModel):
    """The map: each item as a point, near to those that are like it. The service shows it, and Dagster."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Annotated[MapMethod, BeforeValidator(_method, json_schema_input_type=MapMethod)] = Field(
        default="pca",
        description="`pca`: the two directions in which vectors differ most; `umap`: neighbours stay neighbours, which "
        "takes longer and needs `umap-learn` (the extra `umap`); `none`: no map is made.",
    )
    colour: Columns | None = Field(
        default=None,
        description="Columns of `filters:` that points may be coloured by, the first one to begin with. Left out: all, "
        "lists of texts first.",
    )

    def columns(self, filters: Mapping[str, FilterDefinition]) -> tuple[str, ...]:
        """The columns that points may be coloured by."""
        if self.colour is not None:
            return self.colour
        return tuple(sorted(filters, key=lambda column: MOST_TELLING.index(filters[column].type)))


def check_map(rules: MapDefinition, filters: Mapping[str, FilterDefinition], columns: Sequence[str]) -> None:
    """ValueError if points could not be coloured by one of the columns."""
    for column in rules.colour or ():
        if column not in filters:
            near = did_you_mean(column, [*filters, *columns])
            raise ValueError(
                f"`map.colour:`: {column!r} is not among `filters:`{near}: declare it there, since its type says how "
                "it becomes colours"
            )
