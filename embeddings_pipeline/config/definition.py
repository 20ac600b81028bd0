"""What a collection is: the content of one `defs.yaml`, validated with errors that a user can act on."""

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError, available_timezones

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from embeddings_pipeline.config.settings import PACKAGE_DEFS
from embeddings_pipeline.config.templates import Template
from embeddings_pipeline.errors import ConfigurationError

COMPONENT_TYPE = "embeddings_pipeline.EmbeddingCollection"
DOCUMENT_KEYS = ("type", "attributes", "template_vars_module", "requirements", "post_processing")  # Dagster's
SHARED_TABLES = (
    "collection",
    "model",
    "batch",
    "scan",
    "backfill",
    "quarantine",
    "embedding_cache",
    "model_change",
    "canary",
)


def _collection_name(name: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,29}", name):
        raise ValueError(f"{name!r} is not a collection name: use up to 30 of a-z, 0-9 and _, a letter first")
    ours = r"_(item|text)(_|$)|_(vector|current|written|hash)_"
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


def _several(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _different(names: tuple[str, ...]) -> tuple[str, ...]:
    for n, name in enumerate(names):
        if not name.strip() or name in names[:n]:
            raise ValueError(f"{name!r} stands there twice" if name.strip() else "a column has a name")
    return names


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("it is blank: fill it in, or leave it out")
    return text


_Columns = Annotated[
    tuple[str, ...],
    BeforeValidator(_several, json_schema_input_type=str | list[str]),
    AfterValidator(_different),
]
_Text = Annotated[str, AfterValidator(_not_blank)]


def _whole_number(least: int, most: int) -> BeforeValidator:
    # A validator of our own: Dagster's YAML check passes a wrong type on, and Field(ge=…) then dies as a TypeError.
    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ValueError(f"{value!r} is not a whole number from {least} to {most}")
        return value

    return BeforeValidator(check, json_schema_input_type=int)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(_Strict):
    """The user's table or query. The other columns of the table are never read."""

    table: _Text | None = Field(default=None, description="A table or view: `movies`, or `schema.movies`.")
    query: _Text | None = Field(default=None, description="Instead of `table`: a SELECT that returns each item once.")
    key: _Columns = Field(description="The column, or columns, that identify an item.")
    updated_at: _Text | None = Field(default=None, description="A column that every insert and update sets to now.")
    where: str | None = Field(default=None, description="A condition in SQL; rows that do not meet it are gone.")
    url: _Text | None = Field(
        default=None, description="Another PostgreSQL database; `${NAME}` is taken from the environment."
    )

    def model_post_init(self, _: Any) -> None:
        if (self.table is None) == (self.query is None):
            raise ValueError("it needs `table:` or `query:`, and not both")
        if not self.key:
            raise ValueError("`key:` needs at least one column")


class DestinationDefinition(_Strict):
    """A column of a table that is yours already, in the pipeline's database: the vectors are kept there."""

    table: _Text = Field(description="The table: `segments`, or `schema.segments`.")
    key: _Columns = Field(default=(), description="Its columns that hold the source's `key`; left out: the same names.")
    column: _Text = Field(default="embedding", description="The column with the vectors: `vector(n)` or `halfvec(n)`.")
    profile: str | dict[str, Any] = Field(description="What made the vectors that are there, and makes those to come.")


class Chunking(_Strict):
    """Texts longer than `characters` are split at white space; neighbours share `overlap` characters."""

    characters: Annotated[int, _whole_number(50, 1_000_000)]
    overlap: Annotated[int, _whole_number(0, 1_000_000)] = 0

    def model_post_init(self, _: Any) -> None:
        if self.overlap * 2 > self.characters:
            raise ValueError("`overlap:` must be at most half of `characters:`")


class VectorIndex(_Strict):
    """The ANN index in PostgreSQL, one for each vector name."""

    method: Literal["hnsw", "ivfflat", "none"] = "hnsw"
    m: Annotated[int, _whole_number(2, 100)] = 16
    ef_construction: Annotated[int, _whole_number(4, 1000)] = 64

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


class Automation(_Strict):
    """What the sensor and the schedules do, once they are switched on in the UI."""

    timezone: Annotated[str, AfterValidator(_time_zone)] = Field(
        default="UTC", description="Of `daily_refresh`, and of the hours of the refresh of recent items."
    )
    daily_refresh: Annotated[str | None, BeforeValidator(_time_of_day, json_schema_input_type=str | int | None)] = (
        Field(default="04:00", description="When everything is scanned, audited and checked; null: never.")
    )
    recent_every_hours: Annotated[int, _whole_number(1, 24)] = Field(
        default=6, description="How often new items without vectors are embedded, beside the sensor."
    )
    recent_days: Annotated[int, _whole_number(1, 3650)] = Field(
        default=7, description="Which items count as recent: first seen in so many days."
    )
    recent_items: Annotated[int, _whole_number(1, 1_000_000)] = Field(
        default=100, description="Most recent items that one run embeds."
    )
    full_scan_minutes: Annotated[int, _whole_number(1, 525_600)] = Field(
        default=15, description="How often the sensor has the whole source read, which finds deleted rows too."
    )

    index_lag_minutes: Annotated[int, _whole_number(1, 525_600)] = Field(
        default=10, description="The indexes are brought up to date after so long, though batches are still dirty."
    )

    def model_post_init(self, _: Any) -> None:
        if 24 % self.recent_every_hours:
            raise ValueError("`recent_every_hours:` must divide a day: 1, 2, 3, 4, 6, 8, 12 or 24")


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{value!r} is not a number")
    return value


class ModelChangeRules(_Strict):
    """What a change of the model has to reach before it swaps, and how long it can be undone."""

    least_recall: float = Field(default=0.95, description="Recall@10 of the new ANN index against an exact search.")
    golden_tolerance: float = Field(default=0.02, description="How much nDCG@10 of golden_queries.jsonl may drop.")
    grace_hours: float = Field(default=24, description="From the swap until the former model may be dropped.")

    _are_numbers = field_validator("least_recall", "golden_tolerance", "grace_hours", mode="before")(_number)

    def model_post_init(self, _: Any) -> None:
        if not 0 <= self.least_recall <= 1 or not 0 <= self.golden_tolerance <= 1:
            raise ValueError("`least_recall:` and `golden_tolerance:` are shares, from 0 to 1")
        if self.grace_hours < 0:
            raise ValueError("`grace_hours:` is a number of hours, 0 or more")


class Quarantine(_Strict):
    """Texts that fail by themselves."""

    attempts: Annotated[int, _whole_number(1, 1000)] = Field(default=5, description="Tries before a text is given up.")
    error_percent: float = Field(default=1.0, description="Above this share of all texts the check is an error.")

    _is_number = field_validator("error_percent", mode="before")(_number)

    def model_post_init(self, _: Any) -> None:
        if not 0 <= self.error_percent <= 100:
            raise ValueError("`error_percent:` is a percentage, from 0 to 100")


class CollectionAttributes(_Strict):
    """The attributes of `type: embeddings_pipeline.EmbeddingCollection`."""

    name: Annotated[str, AfterValidator(_collection_name)] = Field(description="Names the tables, assets and view.")
    source: Source
    vectors: dict[Annotated[str, AfterValidator(_vector_name)], Annotated[str, AfterValidator(_template)]] = Field(
        description="Vector name → template. `{column}` is replaced; an empty column takes its separator with it."
    )
    columns: _Columns = Field(default=(), description="The payload: what searches return, filter and rank by.")
    profile: str | dict[str, Any] | None = Field(
        default=None, description="A profile's name, or one of your own. Left out: EMBEDDING_PROFILE, else minilm."
    )
    profiles: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="Profiles of your own by name, for `profile` here and `profile switch`."
    )
    items_per_batch: Annotated[int, _whole_number(1, 100_000)] = Field(
        default=1000, description="Items of one partition."
    )
    chunk: Chunking | None = Field(default=None, description="Split long texts. Left out: the model truncates them.")
    storage: Literal["halfvec", "vector"] = Field(default="halfvec", description="float16, or float32.")
    destination: DestinationDefinition | None = Field(
        default=None, description="A column of your own table. Left out: tables of our own."
    )
    index: VectorIndex = Field(default_factory=VectorIndex, description="The ANN index in PostgreSQL.")
    automation: Automation = Field(default_factory=Automation, description="The sensor's and the schedules' numbers.")
    quarantine: Quarantine = Field(default_factory=Quarantine, description="Texts that fail by themselves.")
    model_change: ModelChangeRules = Field(default_factory=ModelChangeRules, description="Changes of the model.")

    def model_post_init(self, _: Any) -> None:
        if not self.vectors:
            raise ValueError("`vectors:` needs at least one vector name with a template")
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


@dataclass(frozen=True)
class CollectionDefinition:
    """One source table and everything derived from it."""

    attributes: CollectionAttributes
    path: Path | None = None

    @property
    def name(self) -> str:
        return self.attributes.name

    @property
    def declared_profile(self) -> str | dict[str, Any] | None:
        """`profile:`, or `destination.profile:`, as `resolve_profile` takes it."""
        declared = self._declared
        return self.profile_named(declared) if isinstance(declared, str) else declared

    @property
    def _declared(self) -> str | dict[str, Any] | None:
        return self.attributes.destination.profile if self.attributes.destination else self.attributes.profile

    def profile_named(self, name: str) -> str | dict[str, Any]:
        """One of the collection's own profiles, as a mapping; a built-in one's name as it is."""
        declared = self._declared
        own = {**self.attributes.profiles}
        if isinstance(declared, dict) and "name" in declared:
            own.setdefault(str(declared["name"]), declared)
        return {**own[name], "name": name} if name in own else name

    @cached_property
    def templates(self) -> dict[str, Template]:
        return {name: Template(template) for name, template in self.attributes.vectors.items()}

    @cached_property
    def template_columns(self) -> tuple[str, ...]:
        """The columns that any template names, each once, in order of first use."""
        return tuple(dict.fromkeys(column for template in self.templates.values() for column in template.columns))

    @cached_property
    def definition_hash(self) -> bytes:
        """Hash of what turns a row into texts: templates, chunking, key, columns."""
        chunk = self.attributes.chunk
        parts = [
            dict(self.attributes.vectors),
            [chunk.characters, chunk.overlap] if chunk else None,
            list(self.attributes.source.key),
            list(self.attributes.columns),
        ]
        return blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).digest()


def batch_key(batch: int) -> str:
    """The partition key of a batch: `000042`."""
    return f"{batch:06d}"


def find_collection(collections: Mapping[str, CollectionDefinition], name: str | None) -> CollectionDefinition:
    """The collection of that name; without a name, the only one or `items`. ConfigurationError if there is none."""
    if name is None:
        if len(collections) == 1:
            return next(iter(collections.values()))
        name = "items"
    if name in collections:
        return collections[name]
    known = ", ".join(sorted(collections)) or "none"
    raise ConfigurationError(f"there is no collection {name!r}; defined are: {known}{did_you_mean(name, collections)}")


def did_you_mean(word: str, known: Any) -> str:
    """` (did you mean 'x'?)`, or nothing where no known word is near."""
    by_lower = {str(name).lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), list(by_lower), n=1)
    return f" (did you mean {by_lower[near[0]]!r}?)" if near else ""


def load_collections(folder: Path = PACKAGE_DEFS) -> dict[str, CollectionDefinition]:
    """Every collection defined below `folder`, by name, without Dagster.

    Raises ConfigurationError naming file and line.
    """
    if not folder.is_dir():
        raise ConfigurationError(f"{folder}: there is no such folder; correct EMBEDDINGS_DEFS_DIR, or make it")
    collections: dict[str, CollectionDefinition] = {}
    for path in sorted(folder.rglob("defs.yaml")):
        for collection in _read(path):
            if collection.name in collections:
                other = collections[collection.name].path
                raise ConfigurationError(
                    f"{path}: collection {collection.name!r} is also defined in {other}; rename one"
                )
            collections[collection.name] = collection
    return collections


def _read(path: Path) -> Iterator[CollectionDefinition]:
    try:
        documents = list(yaml.compose_all(path.read_text(encoding="utf-8-sig"), Loader=yaml.SafeLoader))
        contents = [yaml.SafeLoader("").construct_document(node) for node in documents]
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        remedy = "; indent with spaces" if "\\t" in problem else ""
        raise ConfigurationError(f"{path}{line}: not valid YAML: {problem}{remedy}") from error
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror}") from error
    if not contents:
        raise ConfigurationError(f"{path}:1: the file is empty; `dg scaffold defs {COMPONENT_TYPE}` writes one")
    for node, content in zip(documents, contents, strict=True):
        if mistake := _outline_mistake(node, content):
            raise ConfigurationError(f"{path}:{mistake}")
        if content["type"] != COMPONENT_TYPE:
            continue
        try:
            yield CollectionDefinition(CollectionAttributes.model_validate(content.get("attributes") or {}), path)
        except ValidationError as error:
            raise ConfigurationError(f"{path}:{describe_validation_error(error, node)}") from error


def _outline_mistake(node: yaml.Node, content: Any) -> str | None:
    """What is wrong with a document before its attributes are looked at; nothing in another component's document."""
    if not isinstance(content, dict) or "type" not in content:
        mistyped = did_you_mean("type", content) if isinstance(content, dict) else ""
        return f"{_line_of(node, [])}: type: this key is missing{mistyped}; a collection has `type: {COMPONENT_TYPE}`"
    kind = str(content["type"])
    if kind != COMPONENT_TYPE:
        near = kind.startswith("embeddings_pipeline") or difflib.get_close_matches(kind, [COMPONENT_TYPE], cutoff=0.8)
        return (
            f"{_line_of(node, ['type'])}: type: {kind!r} is not known; did you mean {COMPONENT_TYPE!r}?"
            if near
            else None
        )
    for key in content:
        if key not in DOCUMENT_KEYS:
            return f"{_line_of(node, [key])}: {key}: this key is not known{did_you_mean(str(key), DOCUMENT_KEYS)}"
    if twice := _key_twice(node):
        return f"{twice.start_mark.line + 1}: {twice.value}: this key stands there twice; YAML would take the last one"
    return None


def _key_twice(node: yaml.Node) -> yaml.Node | None:
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if key.value in seen:
                return key
            seen.add(key.value)
            if (found := _key_twice(value)) is not None:
                return found
    return None


def describe_validation_error(error: ValidationError, document: yaml.Node | None = None) -> str:
    """One mistake in one line: `12: source.table: …`; with the document's YAML node, its line is named."""
    # A mistyped key is also a missing one: the key that is there says more.
    first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    where = [part for part in first["loc"] if part != "[key]"]
    if where[:1] == ["profile"]:
        where = where[:1]
    if where[:2] == ["destination", "profile"]:
        where = where[:2]
    line = f"{_line_of(document, ['attributes', *where])}: " if document is not None else " "
    path = ".".join(str(part) for part in where) or "attributes"
    return f"{line}{path}: {' '.join(_explained(first, where).split())}"


def _explained(error: Mapping[str, Any], where: list[Any]) -> str:
    value, expected = error["input"], error.get("ctx", {}).get("expected", "")
    if where[-1:] == ["profile"] and error["type"] != "missing":
        return f"{value!r} is not a profile's name, nor a mapping that describes one"
    match error["type"]:
        case "extra_forbidden":
            known = _fields(where[:-1])
            return f"this key is not known{did_you_mean(str(where[-1]), known) or '; known are: ' + ', '.join(known)}"
        case "missing":
            return f"this key is missing. {_fields(where[:-1])[where[-1]].description or ''}"
        case "literal_error":
            return f"{value!r} is not {expected}"
        case "string_type":
            return f"{value!r} is not text; put it in quotes if it is meant so"
        case "tuple_type":
            return f"{value!r} is not a list; write it as [a, b]"
        case "dict_type" | "model_type" | "model_attributes_type":
            return f"{value!r} is not a mapping; write `key: value` lines below it"
    return str(error["msg"]).removeprefix("Value error, ")


def _fields(where: list[Any]) -> dict[str, Any]:
    models: dict[tuple[Any, ...], type[BaseModel]] = {
        (): CollectionAttributes,
        ("source",): Source,
        ("destination",): DestinationDefinition,
        ("chunk",): Chunking,
        ("index",): VectorIndex,
        ("automation",): Automation,
        ("quarantine",): Quarantine,
        ("model_change",): ModelChangeRules,
    }
    model = models.get(tuple(where))
    return dict(model.model_fields) if model else {}


def _line_of(node: yaml.Node, where: list[Any]) -> int:
    line = node.start_mark.line + 1
    for part in where:
        if isinstance(node, yaml.MappingNode):
            found = [(key, value) for key, value in node.value if key.value == str(part)]
            if not found:
                break
            line, node = found[0][0].start_mark.line + 1, found[0][1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
    return line
