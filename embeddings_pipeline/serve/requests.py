"""What may be asked, and what is answered: pydantic models, which are the OpenAPI documents too."""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.search.arguments import MOST_HITS, Mode
from embeddings_pipeline.search.history import MOST_SEEN
from embeddings_pipeline.search.hits import Hits
from embeddings_pipeline.search.query import search, similar
from embeddings_pipeline.search.recommend import recommend
from embeddings_pipeline.serve.served import Served

LONGEST_QUERY = 10_000  # characters; a model reads no more of a query than of a text


def _whole(text: str) -> str:
    if any(0xD800 <= ord(character) <= 0xDFFF for character in text):
        raise ValueError("it has half a character (a lone surrogate), which is no text")
    return text


Text = Annotated[StrictStr, AfterValidator(_whole)]


def _key(given: Any, checked: ValidatorFunctionWrapHandler) -> Any:
    """In one line, where pydantic has one for each of the alternatives."""
    try:
        return checked(given)
    except ValidationError:
        raise ValueError(
            "it is an item's key, a text or a whole number, or a list of its key columns' values"
        ) from None


ItemKey = Annotated[Text | StrictInt | list[Text | StrictInt], WrapValidator(_key)]


class _Request(BaseModel):
    """What all have in common. Each field but `collection` and `explain` is search's own."""

    model_config = ConfigDict(extra="forbid")

    collection: Text | None = Field(None, description="Which collection; left out: the only one, or `items`.")
    k: StrictInt = Field(10, ge=1, le=MOST_HITS, description="How many items.")
    where: dict[str, Any] | None = Field(
        None,
        description="A condition on the columns of `filters:`, which /collections names.",
        examples=[{"release_year": {"gte": 2000}, "genres": ["Drama"]}],
    )
    vectors: Text | list[Text] | None = Field(None, description="Which of the items' vectors; left out: the first.")
    index: Literal["pgvector", "faiss"] = Field("pgvector", description="Where to look.")
    profile: Text | None = Field(None, description="A shadow model's; left out: the current model.")
    explain: StrictBool = Field(False, description="Say what was asked, what fell back and why, ranks and scores.")

    def _arguments(self) -> dict[str, Any]:
        return self.model_dump(exclude={"collection", "explain", "query", "item_key"})


class SearchRequest(_Request):
    """The items nearest in meaning to a text."""

    k: StrictInt | None = Field(  # type: ignore[assignment]
        None, ge=1, le=MOST_HITS, description="How many items; left out: 10, or RETURN_TOP_K if they are reranked."
    )
    query: Text = Field(max_length=LONGEST_QUERY, description="What to look for, in words.")
    mode: Mode | None = Field(
        None, description="By meaning (`dense`), by words (`text`), or by both; left out: as the collection has it."
    )
    rerank: StrictBool | None = Field(
        None, description="Have a cross-encoder put the first hits into order; left out: if ENABLE_RERANKER says so."
    )

    def answer(self, served: Served, settings: Settings) -> dict[str, Any]:
        definition = served.find(self.collection)
        return _answer(definition, search(definition, settings, self.query, **self._arguments()), self.explain)


class SimilarRequest(_Request):
    """The items nearest in meaning to an item, itself left out."""

    item_key: ItemKey = Field(description="The item's key, as a hit has it; or the values of several key columns.")

    def answer(self, served: Served, settings: Settings) -> dict[str, Any]:
        definition = served.find(self.collection)
        return _answer(definition, similar(definition, settings, self.item_key, **self._arguments()), self.explain)


class PastInteraction(BaseModel):
    """What somebody thought of an item."""

    model_config = ConfigDict(extra="forbid")

    item: ItemKey
    weight: float = Field(1.0, description="Below 0 for what was disliked.")
    at: Text | None = Field(None, description="When; without a zone UTC's.", examples=["2026-01-31"])


class RecommendRequest(_Request):
    """Items for somebody: near what they liked, new to them, and not all alike."""

    liked: list[ItemKey] = Field([], max_length=MOST_SEEN, description="Keys of items.")
    disliked: list[ItemKey] = Field([], max_length=MOST_SEEN, description="Keys of items.")
    history: list[ItemKey | PastInteraction] = Field([], max_length=MOST_SEEN)
    user: Text | StrictInt | None = Field(None, description="Whose history to read from `interactions:`.")
    strategy: Literal["mean", "best"] | None = Field(
        None, description="`mean`: near the middle of what was liked; `best`: near any one of it."
    )
    diversity: float | None = Field(None, description="From 0, the best whatever they have in common, to 1.")
    half_life_days: float | None = Field(None, description="After so many days an interaction counts half.")

    def answer(self, served: Served, settings: Settings) -> dict[str, Any]:
        definition = served.find(self.collection)
        return _answer(definition, recommend(definition, settings, **self._arguments()), self.explain)


class HitAnswer(BaseModel):
    """One of the nearest items."""

    item_key: str
    score: float = Field(description="The cosine of its nearest text.")
    item: dict[str, Any] = Field(description="Its payload, numbers with every digit that the database has.")
    text: str = Field(description="That text.")
    vector_name: str
    chunk: int


class HitsAnswer(BaseModel):
    """The items found, best first."""

    collection: str
    profile: str
    fingerprint: str
    hits: list[HitAnswer]
    milliseconds: dict[str, float]
    explanation: dict[str, Any] | None = Field(None, description="Only with `explain`.")


class Way(BaseModel):
    """One of the ways to search a collection."""

    label: str
    fields: dict[str, Any] = Field(description="What a request has besides to be answered in that way.")


class ModeAnswer(Way):
    """A way of looking."""

    why_not: str | None = Field(description="Why the collection cannot be searched in that way; null if it can.")


class CollectionAnswer(BaseModel):
    """A collection that may be searched."""

    name: str
    columns: list[str] = Field(description="What hits have as `item`.")
    filters: dict[str, dict[str, str]] = Field(
        description="What `where` may name: the `type` of each, and of texts in one text the `separator` of them."
    )
    vectors: list[str]
    profile: str | None = Field(description="The current model's; null without vectors.")
    fingerprint: str | None
    modes: list[ModeAnswer] = Field(description="By meaning, by words, by both; reranked, if a reranker is set.")
    models: list[Way] = Field(description="The current model by PostgreSQL, by FAISS, and each shadow model.")


class CollectionsAnswer(BaseModel):
    collections: list[CollectionAnswer]


class ErrorAnswer(BaseModel):
    """What was wrong, and what to do, in one line."""

    error: str


def _answer(definition: CollectionDefinition, hits: Hits, explain: bool) -> dict[str, Any]:
    explanation = hits.explanation
    answer = {
        "collection": definition.name,
        "profile": explanation.profile,
        "fingerprint": explanation.fingerprint,
        "hits": [vars(hit) for hit in hits],
        "milliseconds": explanation.milliseconds,
    }
    return {**answer, "explanation": explanation.as_dict()} if explain else answer
