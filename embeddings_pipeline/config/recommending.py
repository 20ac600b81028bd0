"""How items are recommended to people, and where these people's histories are."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from embeddings_pipeline.config.fields import Columns, Number, Text
from embeddings_pipeline.config.filters import FilterDefinition
from embeddings_pipeline.errors import did_you_mean

Strategy = Literal["mean", "best"]
RANKABLE = ("number", "timestamp")


class InteractionsDefinition(BaseModel):
    """What people did with items: a table or query beside the source, one row for each time."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    table: Text | None = Field(default=None, description="A table or view in the source's database: `ratings`.")
    query: Text | None = Field(default=None, description="Instead of `table`: a SELECT.")
    user: Text = Field(description="The column that says who.")
    item: Columns = Field(description="The column, or columns, that hold the item's `source.key`.")
    weight: Text | None = Field(
        default=None,
        description="A column of numbers, such as a rating: above `neutral` the item was liked, below it disliked. "
        "Left out: each row counts 1.",
    )
    neutral: Number = Field(default=0, description="The `weight` that says nothing either way.")
    at: Text | None = Field(
        default=None, description="A column that says when: newer counts more, see `half_life_days`."
    )

    def model_post_init(self, _: Any) -> None:
        if (self.table is None) == (self.query is None):
            raise ValueError("`interactions:` needs `table:` or `query:`, and not both")
        if not self.item:
            raise ValueError("`interactions.item:` needs at least one column")


class RecommendRules(BaseModel):
    """How recommendations are ranked, unless the call says otherwise."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    strategy: Strategy = Field(
        default="mean",
        description="`mean`: near the middle of what was liked; `best`: near any one thing that was liked.",
    )
    half_life_days: Number | None = Field(
        default=None, description="After so many days an interaction counts half. Left out: its age does not matter."
    )
    diversity: Number = Field(
        default=0.2,
        description="From 0, the best whatever they have in common, to 1, the least alike of the good ones.",
    )
    blend: dict[Text, Number] = Field(
        default_factory=dict,
        description="Columns of `filters:` (numbers or timestamps) → their share of the score, such as "
        "`{popularity: 0.2, release_year: 0.1}`. A column counts by an item's place among those that come into "
        "question, and the highest value is the best. What is left of 1 is the likeness.",
    )

    def model_post_init(self, _: Any) -> None:
        if self.half_life_days is not None and not 0 < self.half_life_days <= 100_000:
            raise ValueError("`half_life_days:` is a number of days above 0")
        if not 0 <= self.diversity <= 1:
            raise ValueError("`diversity:` is a number from 0 to 1")
        if any(share < 0 for share in self.blend.values()) or sum(self.blend.values()) > 1:
            raise ValueError("`blend:` has shares of the score: none below 0, and together at most 1")


def check_recommending(
    rules: RecommendRules,
    interactions: InteractionsDefinition | None,
    filters: Mapping[str, FilterDefinition],
    key: Columns,
) -> None:
    """ValueError if `recommend:` or `interactions:` name what the collection does not have."""
    for column in rules.blend:
        if column not in filters or filters[column].type not in RANKABLE:
            why = f"is a filter of type {filters[column].type}" if column in filters else "is not among `filters:`"
            near = "" if column in filters else did_you_mean(column, filters)
            raise ValueError(f"`recommend.blend:`: {column!r} {why}{near}: declare it there as number or timestamp")
    if interactions is not None and len(interactions.item) != len(key):
        raise ValueError("`interactions.item:` needs a column for each of `source.key:`, in the same order")
