"""What a search returns."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial
from typing import Any, Literal

import psycopg
from psycopg.types.json import set_json_loads

MOST_DIGITS = 4000  # of an int: Python reads no longer ones


class ExactNumber(Decimal):
    """A number with every digit that the database has; its text has no exponent."""

    def __str__(self) -> str:
        return format(self, "f")


@dataclass(frozen=True)
class Hit:
    """One of the best items: `score` is the cosine of its nearest text, `item` its payload, `text` that text. Found by
    words, the score is what BM25 or ts_rank gives; by both, the sum of reciprocal ranks; reranked, the reranker's.

    Numbers of the payload are as the database has them: an int, or a Decimal with every digit. `vector_name` and
    `chunk` say which of the item's texts was nearest.
    """

    item_key: str
    score: float
    item: dict[str, Any]
    text: str
    vector_name: str
    chunk: int


@dataclass(frozen=True)
class Leg:
    """What one way of looking found."""

    vector_name: str  # empty if it asked no vectors; of words several, parted by commas
    answered_by: Literal["pgvector", "faiss", "bm25", "tsvector", "cooccurrence", "popularity"]
    how: str  # for people: what was compared, or which index was asked
    texts: int  # nearest texts that were looked at
    milliseconds: float
    fell_back: tuple[str, ...]  # why it did not go as it was begun, in order
    ranks: dict[str, tuple[int, float]]  # item key → rank from 1, score


@dataclass(frozen=True)
class Reranking:
    """What a reranker did."""

    model: str | None  # that scored hits; None: none did
    how: str  # for people: what ran it, or why hits were not reranked
    candidates: int  # hits that were given to it
    scored: int  # of these, the first so many were scored and put into order
    milliseconds: float
    fell_back: tuple[str, ...]  # why it did not go as it was begun, in order
    ranks: dict[str, tuple[int, float]]  # item key → rank from 1 and score before


@dataclass(frozen=True)
class Explanation:
    """What a search did, and for how long."""

    profile: str
    fingerprint: str
    legs: tuple[Leg, ...] = ()
    expected_matches: int | None = None  # items that meet the filter, as the planner estimates; None without one
    milliseconds: dict[str, float] = field(default_factory=dict)  # of encoding, and of searching
    mode: str = "dense"
    fell_back: tuple[str, ...] = ()  # why a leg that was wanted is not among `legs`
    rerank: Reranking | None = None  # None: it was not asked for

    def as_dict(self) -> dict[str, Any]:
        """For JSON: ranks with their names."""
        told = {**vars(self), "legs": [_told(leg) for leg in self.legs]}
        return {**told, "rerank": _told(self.rerank)} if self.rerank else told


def _told(step: Leg | Reranking) -> dict[str, Any]:
    ranks = {key: {"rank": rank, "score": score} for key, (rank, score) in step.ranks.items()}
    return {**vars(step), "ranks": ranks}


class Hits(list[Hit]):
    """The items found, best first; `explanation` says how."""

    def __init__(self, hits: Iterable[Hit], explanation: Explanation) -> None:
        super().__init__(hits)
        self.explanation = explanation


def best_of(hits: Iterable[Hit], k: int) -> list[Hit]:
    """The best `k` of these, each item once."""
    best: dict[str, Hit] = {}
    for hit in sorted(hits, key=lambda hit: (-hit.score, hit.item_key, hit.chunk)):
        best.setdefault(hit.item_key, hit)
    return list(best.values())[:k]


def _whole_number(digits: str) -> int | ExactNumber:
    return int(digits) if len(digits) < MOST_DIGITS else ExactNumber(digits)


exact_json = partial(json.loads, parse_float=ExactNumber, parse_int=_whole_number)
"""Reads JSON, the numbers with all their digits."""


def exact_cursor(connection: psycopg.Connection) -> psycopg.Cursor:
    """A cursor that reads JSON as `exact_json` does."""
    cursor = connection.cursor()
    set_json_loads(exact_json, context=cursor)
    return cursor
