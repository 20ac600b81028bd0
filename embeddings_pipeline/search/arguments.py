"""What searches are asked with: programs without types pass anything."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal, get_args

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.config.templates import visible
from embeddings_pipeline.errors import ConfigurationError, did_you_mean, unusable
from embeddings_pipeline.search.where import condition_of
from embeddings_pipeline.store.condition import Condition

MOST_HITS = 1000
HITS = 10  # if nobody says how many
Mode = Literal["dense", "text", "hybrid"]


@dataclass(frozen=True)
class Request:
    """What is asked for, once it can be."""

    k: int
    vectors: tuple[str, ...]
    index: str  # pgvector, or faiss
    profile: str | None
    condition: Condition | None
    where: Mapping[str, Any] | None  # what the condition was made of
    mode: Mode = "dense"


def checked_query(query: object) -> str:
    """The text. ConfigurationError if it is none, or blank."""
    if not isinstance(query, str):
        raise unusable("query", query, "a text")
    if not visible(query):
        raise ConfigurationError("the query is blank: say what to search for")
    return query


def checked_rerank(rerank: object, settings: Settings) -> bool:
    """Whether hits are reranked; None is for what the environment says."""
    if rerank is None:
        return bool(settings.enable_reranker)
    if not isinstance(rerank, bool):
        raise unusable("rerank", rerank, "True, False, or None for what ENABLE_RERANKER says")
    return rerank


def checked_request(
    definition: CollectionDefinition,
    k: object,
    where: object,
    vectors: object,
    index: object,
    profile: object,
    mode: object = "dense",
) -> Request:
    """The request. ConfigurationError names an argument that has a value that it cannot have."""
    if not isinstance(k, Integral) or isinstance(k, bool) or not 1 <= int(k) <= MOST_HITS:
        raise unusable("k", k, f"a whole number from 1 to {MOST_HITS}")
    if index not in ("pgvector", "faiss"):
        raise unusable("index", index, "'pgvector' or 'faiss'")
    if profile is not None and not (isinstance(profile, str) and profile.strip()):
        raise unusable("profile", profile, "the name of a profile, or None for the current model's")
    condition = condition_of(definition, where)
    names = _vector_names(definition, vectors)
    given: Any = where if condition else None  # which is a mapping, since there is a condition
    return Request(int(k), names, str(index), profile, condition, given, _mode(definition, mode))


def _mode(definition: CollectionDefinition, mode: object) -> Mode:
    """How to look; None is for what the definition has indexes for."""
    has_words = definition.attributes.words is not None
    if mode is None:
        return "hybrid" if has_words else "dense"
    if mode not in get_args(Mode):
        raise unusable("mode", mode, "'dense', 'text' or 'hybrid', or None for what the collection has indexes for")
    if why_not := why_no_mode(definition, mode):
        raise ConfigurationError(why_not)
    return mode  # type: ignore[return-value]


def why_no_mode(definition: CollectionDefinition, mode: object) -> str | None:
    """Why the collection cannot be searched in that mode; None if it can."""
    if mode == "dense" or definition.attributes.words is not None:
        return None
    return (
        f"collection {definition.name!r} has no lexical index, which mode {mode!r} needs: add `words: {{}}` in "
        f"{definition.path or 'defs.yaml'}, and sync"
    )


def _vector_names(definition: CollectionDefinition, vectors: object) -> tuple[str, ...]:
    known = list(definition.attributes.vectors)
    if vectors is None:
        return (known[0],)
    names = [vectors] if isinstance(vectors, str) else vectors
    if not isinstance(names, list | tuple) or not names or not all(isinstance(n, str) and n.strip() for n in names):
        of = ", ".join(repr(name) for name in known)
        raise unusable("vectors", vectors, f"one of {of}, a list of them, or None for the first")
    for name in names:
        if name not in known:
            raise ConfigurationError(
                f"collection {definition.name!r} has no vector {name!r}; it has {', '.join(known)}"
                f"{did_you_mean(name, known)}"
            )
    return tuple(dict.fromkeys(names))


def key_text(item_key: Any) -> str:
    """An item's key as the ledger has it: as text, several columns as a JSON array of texts."""
    if isinstance(item_key, str) and item_key and "\0" not in item_key:
        return item_key
    if isinstance(item_key, Integral) and not isinstance(item_key, bool):
        return str(int(item_key))
    if isinstance(item_key, list | tuple) and item_key and all(isinstance(part, str | int) for part in item_key):
        return json.dumps([str(part) for part in item_key], ensure_ascii=False)
    raise unusable("item_key", item_key, "the key of an item as text or number, or a list of its key columns' values")
