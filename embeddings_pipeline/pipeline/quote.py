"""What texts would cost, before anything is asked: less what the cache knows, at the profile's prices and limits."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from embeddings_pipeline.config.prices import Api, is_hosted, is_paid, price_in_words, usd_per_million_tokens
from embeddings_pipeline.encoders.batch_api import HOURS, MOST_TEXTS
from embeddings_pipeline.encoders.cache import in_batch_jobs, open_cache
from embeddings_pipeline.encoders.limits import limits_of
from embeddings_pipeline.encoders.rate import rates, tokens_a_request
from embeddings_pipeline.encoders.spend import token_ratio
from embeddings_pipeline.encoders.tokens import counts_exactly
from embeddings_pipeline.pipeline.collection import Collection
from embeddings_pipeline.pipeline.submit import check_api
from embeddings_pipeline.store.schema import has_schema
from embeddings_pipeline.wording import counted, many


@dataclass(frozen=True)
class Quote:
    """What asking a hosted model about some texts would take."""

    texts: int = 0  # that the model is asked about
    cached: int = 0  # that the embedding cache knows
    in_jobs: int = 0  # that batch jobs have already
    tokens: int = 0
    requests: int = 0
    usd: float | None = 0.0  # None: no price is known
    minutes: float = 0.0  # at the limits that are set; 0 without any
    jobs: int = 0  # in which they are submitted, if it is by batch jobs

    def in_words(self) -> str:
        """For people."""
        parts = [
            f"{counted(self.texts, 'text')} to encode ({self.cached:,} more {many(self.cached, 'is')} in the cache)"
        ]
        parts += [f"{self.in_jobs:,} more {many(self.in_jobs, 'is')} in batch jobs"] if self.in_jobs else []
        parts += [counted(self.tokens, "token")] if self.tokens else []
        parts += [counted(self.requests, "request")] if self.requests else []
        parts.append("price unknown" if self.usd is None else f"${self.usd:,.4f}")
        if self.minutes:
            minutes = f"{self.minutes:,.1f} minutes" if self.minutes < 120 else f"{self.minutes / 60:,.1f} hours"
            parts.append(f"{minutes} at the limits that are set")
        if self.jobs:
            parts.append(f"{counted(self.jobs, 'batch job')}, within {HOURS} hours")
        return ", ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class Quoter:
    """Says what a collection's texts would cost. Asks no service, needs no key, and writes nothing."""

    def __init__(self, collection: Collection, api: Api = "direct") -> None:
        """ConfigurationError if the model cannot be asked so."""
        self.collection, profile, self._api = collection, collection.profile, api
        check_api(profile, api)
        self.paid = is_paid(profile)
        self._known_schema = has_schema(collection.database)
        self._ratio = (
            token_ratio(collection.database, collection.fingerprint) if self.paid and self._known_schema else None
        )
        self._price = usd_per_million_tokens(profile, api)
        self._limits = limits_of(profile)
        keeps = profile.cache and (self._known_schema or collection.settings.embedding_cache_url)
        self._cache = open_cache(collection.database, collection.settings) if keeps else None

    def quote(self, tokens: Mapping[bytes, int], *, force: bool = False) -> Quote:
        """Of texts, by content hash, with so many tokens each; `force`: the cache is not looked at."""
        known: set[bytes] = set()
        in_jobs: set[bytes] = set()
        if self._cache is not None and not force:
            fingerprint, dimensions = self.collection.fingerprint, self.collection.profile.dimensions
            known = self._cache.known_hashes(fingerprint, dimensions, list(tokens))
        if self.paid and self._known_schema:
            left = list(tokens.keys() - known)
            in_jobs = in_batch_jobs(self.collection.database, self.collection.fingerprint, left)
        asked = [tokens[digest] for digest in tokens.keys() - known - in_jobs]
        return self._priced(len(asked), len(known), len(in_jobs), round(sum(asked) * (self._ratio or 1.0)))

    def total(self, quotes: list[Quote]) -> Quote:
        """Of all together: requests are filled from texts of several batches."""
        sums = {f.name: sum(getattr(quote, f.name) or 0 for quote in quotes) for f in fields(Quote)}
        return self._priced(*(int(sums[name]) for name in ("texts", "cached", "in_jobs", "tokens")))

    def _priced(self, texts: int, cached: int, in_jobs: int, tokens: int) -> Quote:
        usd = None if self._price is None else round(self._price * tokens / 1e6, 8)
        quote = Quote(texts, cached, in_jobs, tokens, 0, usd)
        if not is_hosted(self.collection.profile):
            return quote
        if self._api == "batch":
            return replace(quote, jobs=math.ceil(texts / MOST_TEXTS))
        requests_a_minute, tokens_a_minute = rates(self.collection.profile, self.collection.settings)
        most = min(self._limits.tokens or math.inf, tokens_a_request(requests_a_minute, tokens_a_minute))
        requests = math.ceil(max(texts / self._limits.inputs, tokens / most))
        minutes = max(requests / (requests_a_minute or math.inf), tokens / (tokens_a_minute or math.inf))
        return replace(quote, requests=requests, minutes=round(minutes, 2))

    @property
    def basis(self) -> str:
        """What the numbers rest on, for people."""
        profile = self.collection.profile
        times = f", times {self._ratio:.2f}, as servers have billed lately" if self._ratio else ""
        if not is_hosted(profile) or counts_exactly(profile):
            basis = f"tokens are counted by the model's own tokenizer{times}"
        elif self._ratio:
            basis = f"tokens are estimated at four bytes each{times}"
        else:
            basis = "tokens are estimated at four bytes each; the first answers say how many are billed"
        return f"{basis}; {price_in_words(profile, self._api)}"
