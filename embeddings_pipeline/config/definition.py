"""What a collection is: the content of one `defs.yaml`, validated with errors that a user can act on."""

import json
import re
from dataclasses import asdict, dataclass, field
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError, available_timezones

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag

from embeddings_pipeline.config.evaluation import EvaluationRules
from embeddings_pipeline.config.fields import Columns, Number, Text, YesOrNo, whole_number
from embeddings_pipeline.config.filters import Filter, check_filters
from embeddings_pipeline.config.maps import MapDefinition, check_map
from embeddings_pipeline.config.profiles import Profile, ProfileSettings, resolve_profile
from embeddings_pipeline.config.recommending import InteractionsDefinition, RecommendRules, check_recommending
from embeddings_pipeline.config.reranking import RerankRules
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.config.templates import RENDERING_RULES, Template
from embeddings_pipeline.config.words import WordsDefinition
from embeddings_pipeline.errors import did_you_mean

COMPONENT_TYPE = "embeddings_pipeline.EmbeddingCollection"
SHARED_TABLES = (
    "collection",
    "model",
    "batch",
    "batch_job",
    "scan",
    "backfill",
    "quarantine",
    "cooccurrence",
    "embedding_cache",
    "embedding_claim",
    "embedding_spend",
    "model_change",
    "canary",
    "proposed_definition",
    "collection_stamp",
    "database_identity",
    "search_definition",
    "hybrid_search_hit",
)


def collection_name(name: str) -> str:
    """The name, if a collection may be called so. ValueError says why not."""
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,29}", name):
        raise ValueError(f"{name!r} is not a collection name: use up to 30 of a-z, 0-9 and _, a letter first")
    ours = r"_(item|text)(_|$)|_(vector|current|written|hash|lacking|filter)_|_(pkey|seq|open)$"
    if name in (*SHARED_TABLES, "schema_version") or re.search(ours, name):
        raise ValueError(f"{name!r} would collide with the pipeline's own tables: choose another name")
    return name


def _vector_name(name: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,19}", name):
        raise ValueError(f"{name!r} is not a vector name: use up to 20 of a-z, 0-9 and _, a letter first")
    return name


def _template(template: str) -> str:
    Template(template)
    return template


def _kind_of_profile(value: Any) -> str:
    return "mapping" if isinstance(value, dict | Profile) else "name"


# A profile's name, or one of the collection's own. Told apart beforehand, so that an error is of what was meant.
ProfileChoice = Annotated[
    Annotated[str, Tag("name")] | Annotated[Profile, Tag("mapping")], Discriminator(_kind_of_profile)
]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SourceDefinition(_Strict):
    """The user's table or query. The other columns of the table are never read."""

    table: Text | None = Field(default=None, description="A table or view: `movies`, or `schema.movies`.")
    query: Text | None = Field(default=None, description="Instead of `table`: a SELECT that returns each item once.")
    key: Columns = Field(description="The column, or columns, that identify an item.")
    updated_at: Text | None = Field(default=None, description="A column that every insert and update sets to now.")
    where: str | None = Field(default=None, description="A condition in SQL; rows that do not meet it are gone.")
    row_security: YesOrNo = Field(
        default=False,
        description="The rows that row-level security shows the pipeline's role are the collection. Left out: it is an "
        "error if it would hide any.",
    )
    url: Text | None = Field(
        default=None,
        repr=False,  # it may hold a password, though `${NAME}` is there for that
        description="Another PostgreSQL database; `${NAME}` is taken from the environment.",
    )

    def model_post_init(self, _: Any) -> None:
        if (self.table is None) == (self.query is None):
            raise ValueError("it needs `table:` or `query:`, and not both")
        if not self.key:
            raise ValueError("`key:` needs at least one column")


class DestinationDefinition(_Strict):
    """A column of a table that is yours already, in the pipeline's database: the vectors are kept there."""

    table: Text = Field(description="The table: `segments`, or `schema.segments`.")
    key: Columns = Field(default=(), description="Its columns that hold the source's `key`; left out: the same names.")
    column: Text = Field(default="embedding", description="The column with the vectors: `vector(n)` or `halfvec(n)`.")
    profile: ProfileChoice = Field(description="What made the vectors that are there, and makes those to come.")


class ChunkDefinition(_Strict):
    """Texts longer than `characters` are split at white space; neighbours share `overlap` characters."""

    characters: Annotated[int, whole_number(50, 1_000_000)]
    overlap: Annotated[int, whole_number(0, 1_000_000)] = 0

    def model_post_init(self, _: Any) -> None:
        if self.overlap * 2 > self.characters:
            raise ValueError("`overlap:` must be at most half of `characters:`")


class IndexDefinition(_Strict):
    """The ANN index in PostgreSQL, one for each vector name."""

    method: Literal["hnsw", "ivfflat", "none"] = "hnsw"
    m: Annotated[int, whole_number(2, 100)] = 16
    ef_construction: Annotated[int, whole_number(4, 1000)] = 64

    def model_post_init(self, _: Any) -> None:
        if self.ef_construction < 2 * self.m:
            raise ValueError("`ef_construction:` must be at least twice `m:`")


def _time_of_day(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool) and 60 <= value < 24 * 60:
        return f"{value // 60:02d}:{value % 60:02d}"  # YAML 1.1 reads an unquoted 14:30 as 870
    if value is not None and not (isinstance(value, str) and re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d", value)):
        raise ValueError(f"{value!r} is not a time of day: write it as '04:00'")
    return value


def _time_zone(name: str) -> str:
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        near = did_you_mean(name, available_timezones())
        raise ValueError(f"{name!r} is not a time zone: write it as 'Europe/Berlin'{near}") from None
    return name


class AutomationDefinition(_Strict):
    """What the sensor and the schedules do, once they are switched on in the UI."""

    timezone: Annotated[str, AfterValidator(_time_zone)] = Field(
        default="UTC", description="Of `daily_refresh`, and of the hours of the refresh of recent items."
    )
    daily_refresh: Annotated[str | None, BeforeValidator(_time_of_day, json_schema_input_type=str | int | None)] = (
        Field(default="04:00", description="When everything is scanned, audited and checked; null: never.")
    )
    recent_every_hours: Annotated[int, whole_number(1, 24)] = Field(
        default=6, description="How often new items without vectors are embedded, beside the sensor."
    )
    recent_days: Annotated[int, whole_number(1, 3650)] = Field(
        default=7, description="Which items count as recent: first seen in so many days."
    )
    recent_items: Annotated[int, whole_number(1, 1_000_000)] = Field(
        default=100, description="Most recent items that one run embeds."
    )
    full_scan_minutes: Annotated[int, whole_number(1, 525_600)] = Field(
        default=15, description="How often the sensor has the whole source read, which finds deleted rows too."
    )

    index_lag_minutes: Annotated[int, whole_number(1, 525_600)] = Field(
        default=10, description="The indexes are brought up to date after so long, though batches are still dirty."
    )

    def model_post_init(self, _: Any) -> None:
        if 24 % self.recent_every_hours:
            raise ValueError("`recent_every_hours:` must divide a day: 1, 2, 3, 4, 6, 8, 12 or 24")


class ModelChangeRules(_Strict):
    """What a change of the model has to reach before it swaps, and how long it can be undone."""

    least_recall: Number = Field(default=0.95, description="Recall@10 of the new ANN index against an exact search.")
    golden_tolerance: Number = Field(default=0.02, description="How much nDCG@10 of the golden queries may drop.")
    grace_hours: Number = Field(default=24, description="From the swap until the previous model may be dropped.")

    def model_post_init(self, _: Any) -> None:
        if not 0 <= self.least_recall <= 1 or not 0 <= self.golden_tolerance <= 1:
            raise ValueError("`least_recall:` and `golden_tolerance:` are shares, from 0 to 1")
        if self.grace_hours < 0:
            raise ValueError("`grace_hours:` is a number of hours, 0 or more")


class QuarantineRules(_Strict):
    """Texts that fail by themselves."""

    attempts: Annotated[int, whole_number(1, 1000)] = Field(default=5, description="Tries before a text is given up.")
    error_percent: Number = Field(
        default=1.0,
        description="The check is an error above this share of all texts and above 10 of them; 0: with the first one.",
    )

    def model_post_init(self, _: Any) -> None:
        if not 0 <= self.error_percent <= 100:
            raise ValueError("`error_percent:` is a percentage, from 0 to 100")


class BudgetRules(_Strict):
    """What a hosted model may cost."""

    usd_per_day: Number = Field(description="US dollars a day (UTC). What would cost more waits for the next day.")

    def model_post_init(self, _: Any) -> None:
        if self.usd_per_day < 0:
            raise ValueError("`usd_per_day:` is a number of dollars, 0 or more")


class CollectionAttributes(_Strict):
    """The attributes of `type: embeddings_pipeline.EmbeddingCollection`."""

    name: Annotated[str, AfterValidator(collection_name)] = Field(description="Names the tables, assets and view.")
    source: SourceDefinition
    vectors: dict[Annotated[str, AfterValidator(_vector_name)], Annotated[str, AfterValidator(_template)]] = Field(
        description="Vector name → template. `{column}` is replaced; an empty column takes its label, unit, brackets, "
        "quotes and separator with it; `[ … {column}]` is a group. The rules are in docs/reference/templates.md."
    )
    columns: Columns = Field(default=(), description="The payload: what searches return, filter and rank by.")
    filters: dict[str, Filter] = Field(
        default_factory=dict,
        description="Columns of the payload that searches may filter by → `number`, `text`, `boolean`, `timestamp`, "
        "`texts`, or a mapping with that as `type`. Adding or removing one embeds nothing.",
    )
    words: WordsDefinition | None = Field(
        default=None, description="A lexical index, so that searches find words as well as meaning. Left out: none."
    )
    rerank: RerankRules = Field(default_factory=RerankRules, description="When searches are not reranked.")
    profile: ProfileChoice | None = Field(
        default=None, description="A profile's name, or one of your own. Left out: EMBEDDING_PROFILE, else minilm."
    )
    profiles: dict[Text, ProfileSettings] = Field(
        default_factory=dict, description="Profiles of your own by name, for `profile` here and `profile switch`."
    )
    items_per_batch: Annotated[int, whole_number(1, 100_000)] = Field(
        default=1000, description="Items of one partition."
    )
    chunk: ChunkDefinition | None = Field(default=None, description="Split long texts. Left out: they are truncated.")
    storage: Literal["halfvec", "vector"] = Field(default="halfvec", description="float16, or float32.")
    destination: DestinationDefinition | None = Field(
        default=None, description="A column of your own table. Left out: tables of our own."
    )
    index: IndexDefinition = Field(default_factory=IndexDefinition, description="The ANN index in PostgreSQL.")
    map: MapDefinition = Field(default_factory=MapDefinition, description="A picture of all items.")
    automation: AutomationDefinition = Field(
        default_factory=AutomationDefinition, description="The sensor's and the schedules' numbers."
    )
    quarantine: QuarantineRules = Field(default_factory=QuarantineRules, description="Texts that fail by themselves.")
    budget: BudgetRules | None = Field(default=None, description="What a hosted model may cost. Left out: no limit.")
    recommend: RecommendRules = Field(default_factory=RecommendRules, description="How recommendations are ranked.")
    interactions: InteractionsDefinition | None = Field(
        default=None, description="What people did with items: `recommend` reads a person's history there."
    )
    evaluation: EvaluationRules | None = Field(
        default=None, description="How good searches are, measured with judged queries. Left out: it is not measured."
    )
    model_change: ModelChangeRules = Field(default_factory=ModelChangeRules, description="Changes of the model.")

    def model_post_init(self, _: Any) -> None:
        if not self.vectors:
            raise ValueError("`vectors:` needs at least one vector name with a template")
        check_filters(self.filters, self.columns)
        check_map(self.map, self.filters, self.columns)
        check_recommending(self.recommend, self.interactions, self.filters, self.source.key)
        if self.destination is not None:
            self._check_destination(self.destination)

    def _check_destination(self, destination: DestinationDefinition) -> None:
        if len(self.vectors) > 1 or self.chunk:
            raise ValueError("`destination:` is one column: it takes one vector name, and no `chunk:`")
        if self.profile is not None:
            raise ValueError("`destination.profile:` says the profile: leave `profile:` out")
        if "storage" in self.model_fields_set:
            raise ValueError("the type of the column that `destination:` names says the storage: leave `storage:` out")
        if self.source.url is not None:
            raise ValueError(
                "`destination:` is in the pipeline's database, so that a batch is committed whole: no `source.url:`"
            )
        if destination.key and len(destination.key) != len(self.source.key):
            raise ValueError("`destination.key:` needs a column for each of `source.key:`, in the same order")


@dataclass
class Reading:
    """What a process remembers of having read a definition: the file's bytes, and whether the database knows of it."""

    content: bytes | None = None
    proposed: bool = False


@dataclass(frozen=True)
class CollectionDefinition:
    """One source table and everything derived from it."""

    attributes: CollectionAttributes
    path: Path | None = None
    reading: Reading = field(default_factory=Reading, compare=False, repr=False)

    @property
    def name(self) -> str:
        return self.attributes.name

    @property
    def declared_profile(self) -> str | Profile | None:
        """`profile:`, or `destination.profile:`, as `resolve_profile` takes it."""
        declared = self.declared
        return self.profile_named(declared) if isinstance(declared, str) else declared

    @property
    def declared(self) -> str | Profile | None:
        """`profile:`, or `destination.profile:`, as it is written there."""
        return self.attributes.destination.profile if self.attributes.destination else self.attributes.profile

    def profile_named(self, name: str) -> str | Profile:
        """One of the collection's own profiles; a built-in one's name as it is."""
        if name in self.attributes.profiles:
            return Profile(name=name, **asdict(self.attributes.profiles[name]))
        declared = self.declared
        return declared if isinstance(declared, Profile) and declared.name == name else name

    @cached_property
    def templates(self) -> dict[str, Template]:
        return {name: Template(template) for name, template in self.attributes.vectors.items()}

    @cached_property
    def template_columns(self) -> tuple[str, ...]:
        """The columns that any template names, each once, in order of first use."""
        return tuple(dict.fromkeys(column for template in self.templates.values() for column in template.columns))

    @cached_property
    def definition_hash(self) -> bytes:
        """Hash of what turns a row into texts: templates and the rules of rendering, chunking, key, columns."""
        chunk = self.attributes.chunk
        parts = [
            RENDERING_RULES,
            dict(self.attributes.vectors),
            [chunk.characters, chunk.overlap] if chunk else None,
            list(self.attributes.source.key),
            list(self.attributes.columns),
        ]
        return blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).digest()

    @cached_property
    def outcome_hash(self) -> bytes:
        """Hash of all that decides what is stored: the definition hash, and from where, to where and how indexed. Two
        that differ in it would undo each other's work. The model is not among it: the database says which (rule 5).
        """
        parts = self.attributes.model_dump(
            mode="json",
            include={
                "source": True,
                "storage": True,
                "destination": {"table", "key", "column"},
                "index": True,
                "filters": True,
                "words": {"language", "stemmer"},
                "map": True,
            },
            exclude_defaults=True,
        )
        text = json.dumps([self.definition_hash.hex(), parts], sort_keys=True)
        return blake2b(text.encode(), digest_size=16).digest()


def named_profile(definition: CollectionDefinition, name: str, settings: Settings) -> Profile:
    """The profile of that name: the collection's own, a built-in one, or what the environment makes of one if the
    definition leaves it open. ProfileError if there is none.
    """
    if definition.declared is None and name not in definition.attributes.profiles:
        declared = resolve_profile(None, settings)
        if declared.name == name:
            return declared
    return resolve_profile(definition.profile_named(name), settings)


def batch_key(batch: int) -> str:
    """The partition key of a batch: `000042`."""
    return f"{batch:06d}"
