"""Handing texts to the Batch API: which of them, in which files, and within which budget. See `batch_jobs.py`."""

import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from psycopg.types.json import Jsonb

from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.encoders.batch_api import MOST_BYTES, MOST_TEXTS, BatchApi, room_for_file
from embeddings_pipeline.encoders.batch_jobs import begin, end, noted
from embeddings_pipeline.encoders.budget import Terms, affordable, budget_spent, check_price, purse, spent_today
from embeddings_pipeline.encoders.cache import open_cache
from embeddings_pipeline.errors import BudgetError, OutageError, ProfileError
from embeddings_pipeline.failpoints import failpoint
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.locks import job_lock
from embeddings_pipeline.store.retry import outage_attempts
from embeddings_pipeline.store.sql import load_sql

OfBatches = Mapping[int, Iterable[bytes]]
"""Batch of a collection → the content hashes of its texts."""
LEAST_TOKENS = 100_000  # of a job that is to be smaller than one that was refused


@dataclass(frozen=True)
class Submission:
    """What was handed to the Batch API."""

    jobs: int = 0
    texts: int = 0
    usd: float = 0.0  # that it is expected to cost

    def __add__(self, other: "Submission") -> "Submission":
        return Submission(self.jobs + other.jobs, self.texts + other.texts, self.usd + other.usd)


class Submitter:
    """Hands texts of a collection to the Batch API, from `with` on."""

    def __init__(self, database: Database, settings: Settings, profile: Profile, terms: Terms) -> None:
        """ProfileError if the profile keeps no answers."""
        if not profile.cache:
            raise ProfileError(
                f"Profile {profile.name}: `api: batch` keeps its answers in the embedding cache: leave `cache: false` "
                "out of the profile"
            )
        self._database, self._profile, self._purse = database, profile, purse()
        self._cache = open_cache(database, settings)
        self._api = BatchApi(profile, settings)
        self.terms = replace(terms, account=self._api.account)

    def __enter__(self) -> "Submitter":
        check_price(self.terms, self._purse)
        self._api.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._api.__exit__(*error)

    def submit(self, texts: Mapping[bytes, str], tokens: Mapping[bytes, int], batches: OfBatches) -> Submission:
        """Submit those of the texts (by content hash) that the cache does not know and that nobody is asking about,
        with so many tokens each as counted here. `batches`: which texts the collection's batches have.

        Raises BudgetError when the budget is spent: what it sufficed for is submitted. Else ProfileError, OutageError:
        then the jobs before are submitted, and that of the error may be.
        """
        submitted, known = Submission(), self._known(list(texts))
        hashes = [digest for digest in texts if digest not in known]
        most_tokens = self._most_tokens()
        while hashes:
            job = uuid.uuid4().hex
            part = self._part(job, hashes, texts, tokens, most_tokens)
            done, spent = self._submit(job, part, texts, tokens, batches)
            submitted += done
            if spent is not None:
                raise self._purse.refuse(spent)
            hashes = hashes[len(part) :]
        return submitted

    def _known(self, hashes: list[bytes]) -> set[bytes]:
        """Those that the cache knows, that another job has, or was refused."""
        known = self._cache.known_hashes(self.terms.fingerprint, self.terms.dimensions, hashes)
        parameters = {"fingerprint": self.terms.fingerprint, "hashes": hashes}
        with self._database.session() as connection:
            return known | {row[0] for row in connection.execute(load_sql("cache/not_for_jobs"), parameters)}

    def _most_tokens(self) -> float:
        """Of a job: half of one that the server refused for its tokens while nothing else of ours waited there."""
        parameters = {"account": self.terms.account, "model": self.terms.model}
        with self._database.session() as connection:
            row = connection.execute(load_sql("batch_job/refused_tokens"), parameters).fetchone()
        return float("inf") if row is None or row[0] is None else max(LEAST_TOKENS, row[0] / 2)

    def _part(
        self,
        job: str,
        hashes: Sequence[bytes],
        texts: Mapping[bytes, str],
        tokens: Mapping[bytes, int],
        most_tokens: float,
    ) -> list[bytes]:
        """The first texts, as many as a file may have."""
        size, counted, number = 0, 0.0, 0
        for digest in hashes[:MOST_TEXTS]:
            size += len(self._line(job, digest, texts[digest]))
            counted += tokens.get(digest, 0) * self.terms.ratio
            if (size > MOST_BYTES or counted > most_tokens) and number:
                break
            number += 1
        return list(hashes[:number])

    def _line(self, job: str, digest: bytes, text: str) -> bytes:
        return self._api.line(job, digest, (self._profile.document_prompt or "") + text)

    def _submit(
        self,
        job: str,
        hashes: list[bytes],
        texts: Mapping[bytes, str],
        tokens: Mapping[bytes, int],
        batches: OfBatches,
    ) -> tuple[Submission, BudgetError | None]:
        """One job; and that the budget did not suffice for all."""
        prices = [self.terms.expected_usd(tokens.get(digest, 0)) for digest in hashes]
        number = self._purse.hold(prices)
        spent = self._purse.empty(prices[number]) if number < len(hashes) else None
        if not number:
            return Submission(), spent
        held = sum(prices[:number])
        try:
            with job_lock(self._database, job) as ours:
                assert ours
                claimed, no_budget = self._prepare(job, hashes[:number], prices[:number], tokens, batches)
                usd = sum(self.terms.expected_usd(tokens.get(digest, 0)) for digest in claimed)
                if claimed:
                    self._hand_over(job, claimed, texts)
                    self._purse.spend(usd)
        finally:
            self._purse.let_go(held)
        return Submission(bool(claimed), len(claimed), usd), no_budget or spent

    def _prepare(
        self, job: str, hashes: list[bytes], prices: list[float], tokens: Mapping[bytes, int], batches: OfBatches
    ) -> tuple[list[bytes], BudgetError | None]:
        """Before anything is sent: the job and its claims, in one transaction. Which texts it has."""
        terms, spent = self.terms, None
        row = {
            "id": job,
            "collection": terms.collection,
            "fingerprint": terms.fingerprint,
            "profile": Jsonb(asdict(self._profile)),
            "account": terms.account,
            "usd_per_million": terms.usd_per_million,
        }
        with self._database.session() as connection, connection.transaction():
            if terms.usd_per_day is not None:
                used, held = spent_today(connection, terms.collection)
                number = affordable(prices, terms.usd_per_day - used - held)
                spent = budget_spent(terms, used, prices[number]) if number < len(hashes) else None
                hashes = hashes[:number]
            connection.execute(load_sql("batch_job/insert"), row)
            wanted = {**row, "hashes": hashes, "tokens": [tokens.get(digest, 0) for digest in hashes]}
            claimed = {bytes(row[0]) for row in connection.execute(load_sql("batch_job/claim"), wanted)}
            # What was answered while we looked is not asked about again.
            answered = self._cache.known_hashes(terms.fingerprint, terms.dimensions, list(claimed))
            released = {"holder": job, "fingerprint": terms.fingerprint, "hashes": list(answered)}
            connection.execute(load_sql("cache/release"), released)
            ours = [digest for digest in hashes if digest in claimed - answered]
            counted, has = sum(tokens.get(digest, 0) for digest in ours), set(ours)
            told = {
                "texts": len(ours),
                "tokens": round(counted * terms.ratio),
                "usd": terms.expected_usd(counted),
                # What a limit left of the others is not followed up.
                "batches": sorted(batch for batch, of_batch in batches.items() if not has.isdisjoint(of_batch)),
            }
            statement = "batch_job/claimed" if ours else "batch_job/drop"
            connection.execute(load_sql(statement), {"id": job, **told})
        failpoint("batch_job.prepared")
        return ours, spent

    def _hand_over(self, job: str, hashes: list[bytes], texts: Mapping[bytes, str]) -> None:
        """Upload the file, then have the server begin; each is noted before the next."""
        try:
            with room_for_file(self.terms.collection) as folder:
                path = folder / f"{job}.jsonl"
                with path.open("wb") as file:
                    file.writelines(self._line(job, digest, texts[digest]) for digest in hashes)
                for attempt in outage_attempts(self.terms.collection, OutageError):
                    with attempt:
                        input_file = self._api.upload(path)
        except Exception as error:
            end(self._database, job, "failed", str(error))
            raise
        failpoint("batch_job.sent")
        if not noted(self._database, "uploaded", job, input_file=input_file):
            raise OutageError("the connection to the database was lost while a batch was uploaded; nothing was begun")
        failpoint("batch_job.uploaded")
        begin(self._database, self._api, job, input_file)
