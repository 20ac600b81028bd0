"""What somebody likes, from what is given with a call and from the interactions of a collection."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from numbers import Real
from typing import Any

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.errors import ConfigurationError, shown, unusable
from embeddings_pipeline.search.arguments import key_text
from embeddings_pipeline.store.interactions import Interaction, Interactions
from embeddings_pipeline.store.source import Source

MOST_OF_TASTE = 1000  # items, the newest, that say what somebody likes
MOST_SEEN = 10_000  # that are left out
FIELDS = ("item", "weight", "at")


@dataclass(frozen=True)
class Taste:
    """Item key → weight, 1 for what was liked now, below 0 for what was disliked; and what was seen."""

    weights: Mapping[str, float] = field(default_factory=dict)
    seen: frozenset[str] = frozenset()

    @property
    def liked(self) -> dict[str, float]:
        return {key: weight for key, weight in self.weights.items() if weight > 0}

    @property
    def disliked(self) -> dict[str, float]:
        return {key: -weight for key, weight in self.weights.items() if weight < 0}


def taste_of(
    definition: CollectionDefinition,
    source: Source,
    *,
    liked: object = (),
    disliked: object = (),
    history: object = (),
    user: object = None,
    half_life_days: float | None = None,
) -> Taste:
    """What all of it says together. ConfigurationError names what cannot be; SourceError."""
    given = [Interaction(key_text(key), 1.0, None) for key in _listed("liked", liked)]
    given += [Interaction(key_text(key), -1.0, None) for key in _listed("disliked", disliked)]
    given += [_interaction(each) for each in _listed("history", history)]
    if user is not None:
        if not isinstance(user, str | int) or isinstance(user, bool) or "\0" in str(user):
            raise unusable("user", user, "a text or a number, as `interactions.user:` has it")
        given += Interactions(source).of_user(user, MOST_SEEN)
    newest = sorted(given, key=lambda each: each.at or datetime.max.replace(tzinfo=UTC), reverse=True)
    now, weights = datetime.now(UTC), dict[str, float]()
    heaviest = max((abs(each.weight) for each in given), default=0.0) or 1.0
    for each in newest:
        if each.item_key in weights or len(weights) < MOST_OF_TASTE:
            decayed = each.weight / heaviest * _decay(each.at, now, half_life_days)
            weights[each.item_key] = weights.get(each.item_key, 0.0) + decayed
    return Taste(weights, frozenset(each.item_key for each in newest[:MOST_SEEN]))


def _decay(at: datetime | None, now: datetime, half_life_days: float | None) -> float:
    """1 for what is of now, or whose time is not known or yet to come."""
    if at is None or half_life_days is None:
        return 1.0
    days = max(0.0, (now - at).total_seconds() / 86_400)
    return float(0.5 ** min(days / half_life_days, 1000))


def _listed(name: str, given: object) -> Sequence[Any]:
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
        raise unusable(name, given, "a list of items' keys" + (", or of mappings" if name == "history" else ""))
    return list(given)


def _interaction(each: object) -> Interaction:
    if not isinstance(each, Mapping):
        return Interaction(key_text(each), 1.0, None)
    if "item" not in each or not set(each) <= set(FIELDS):
        raise ConfigurationError(
            f'history: {shown(each)} is none of its entries: write {{"item": KEY, "weight": 1.0, "at": "2026-01-31"}}, '
            "of which weight and at may be left out"
        )
    item_key, weight = key_text(each["item"]), each.get("weight", 1.0)
    if not isinstance(weight, Real) or isinstance(weight, bool) or not math.isfinite(float(weight)):
        raise ConfigurationError(
            f"history: the weight of item {item_key!r} cannot be {shown(weight)}: it is a finite number, above 0 for "
            "what was liked"
        )
    return Interaction(item_key, float(weight), _time(item_key, each.get("at")))


def _time(item_key: str, at: object) -> datetime | None:
    """A time; without a zone it is UTC's."""
    moment = at
    if isinstance(at, str):
        try:
            moment = datetime.fromisoformat(at.strip())
        except ValueError:
            moment = at
    if isinstance(moment, date) and not isinstance(moment, datetime):
        moment = datetime(moment.year, moment.month, moment.day)
    if moment is None or isinstance(moment, datetime):
        return moment.replace(tzinfo=UTC) if moment is not None and moment.tzinfo is None else moment
    raise ConfigurationError(f"history: `at` of item {item_key!r} cannot be {shown(at)}: it is a time, or left out")
