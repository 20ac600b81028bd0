"""Batch jobs: texts that a server answers within a day, at half the price. Nothing is submitted twice, and nothing that
was paid for is thrown away, wherever a process ends (rule 14).

A job is a row of `embeddings.batch_job`, and its texts are claims, which nobody else asks about while it lives:

| state | what is certain | who ends here leaves |
|---|---|---|
| preparing | nothing was submitted | a job that is given up: its texts are free |
| uploaded | it may have been submitted | one that is looked for by its metadata, and begun if it is not there |
| submitted | the server has it | one that is looked at until it ends there |
| ended | its answers are files at the server | files that are read again; a text is noted and paid for once |
| done, failed, lost | the cache has what was answered; the rest is free | |

Whoever works on a job holds its lock. What was refused is asked about directly, where it is told from an outage.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import psycopg
from numpy.typing import NDArray
from psycopg.rows import class_row, dict_row

from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.encoders.batch_api import BatchApi, Line, NoSuchBatchError, RemoteBatch, room_for_file
from embeddings_pipeline.encoders.budget import Terms
from embeddings_pipeline.encoders.cache import EmbeddingCache, PostgresCache, open_cache, pack
from embeddings_pipeline.encoders.spend import record
from embeddings_pipeline.errors import ConfigurationError, OutageError, PipelineError, ProfileError
from embeddings_pipeline.failpoints import failpoint
from embeddings_pipeline.store.database import Database
from embeddings_pipeline.store.locks import job_lock
from embeddings_pipeline.store.models import stored_profile
from embeddings_pipeline.store.sql import load_sql
from embeddings_pipeline.wording import counted

log = logging.getLogger(__name__)

LOOK_SECONDS = 60.0  # between two looks at a job
GRACE_SECONDS = 180.0  # after which a batch that the server was asked to begin, and does not list, was not begun
LOST_SECONDS = 900.0  # for which a server says that it has no such batch, before that is believed …
LOST_LOOK_SECONDS = 3600.0  # … and it is looked at less often
FIND_HOURS = 48.0  # by how much the server's clock may be behind the database's
FIRST_WAIT, LONGEST_WAIT = timedelta(minutes=1), timedelta(minutes=64)  # after jobs that answered nothing
FOLLOWED_DAYS = 30
LIVING = ("preparing", "uploaded", "submitted", "ended")


@dataclass(frozen=True)
class Job:
    """A job, as `get` of sql/batch_job.sql gives it."""

    id: str
    collection: str
    fingerprint: str
    profile: Mapping[str, Any]
    account: str
    state: str
    texts: int
    usd_per_million: float | None
    input_file: str | None
    remote: str | None
    remote_state: str | None
    remote_done: int
    output_file: str | None
    error_file: str | None
    reason: str | None
    asked_seconds: float | None
    made_at: datetime

    @property
    def terms(self) -> Terms:
        """On which it was submitted."""
        profile = stored_profile(self.profile)
        return Terms(
            self.collection,
            self.fingerprint,
            profile.dimensions,
            profile.model,
            self.account,
            paid=True,
            usd_per_million=self.usd_per_million,
        )


def begin(database: Database, api: BatchApi, job: str, input_file: str) -> None:
    """Have the server begin a job that is noted as uploaded. After an outage it may have begun: whoever looks at the
    job later finds it. Anything else ends the job.
    """
    try:
        remote = api.create(input_file, job)
    except OutageError as error:
        log.warning("warning: a batch job may have been begun, which is looked at again: %s", error)
        _execute(database, "not_looked", id=job, reason=str(error))
        return
    except PipelineError as error:
        end(database, job, "failed", str(error))
        raise
    failpoint("batch_job.begun")
    _execute(database, "submitted", id=job, remote=remote.name, remote_state=remote.state)
    failpoint("batch_job.submitted")


class BatchJobs:
    """The jobs of a collection, or of all (None)."""

    def __init__(self, database: Database, settings: Settings, collection: str | None = None) -> None:
        self._database, self._settings, self._collection = database, settings, collection

    def due(self, *, now: bool = False) -> list[str]:
        """The jobs that are to be looked at; `now`: all that live."""
        seconds = 0.0 if now else LOOK_SECONDS
        parameters = {"collection": self._collection, "seconds": seconds, "lost_seconds": LOST_LOOK_SECONDS}
        with self._database.session() as connection:
            return [row[0] for row in connection.execute(load_sql("batch_job/due"), parameters)]

    def get(self, job: str) -> Job | None:
        with self._database.session() as connection, connection.cursor(row_factory=class_row(Job)) as cursor:
            return cursor.execute(load_sql("batch_job/get"), {"id": job}).fetchone()

    def to_follow_up(self) -> dict[str, dict[int, datetime]]:
        """By fingerprint, the batches whose jobs have ended lately, with when the last of them was made. After jobs
        that answered nothing they wait, longer each time.
        """
        waits = {"first": FIRST_WAIT, "longest": LONGEST_WAIT}
        parameters = {"collection": self._collection, "days": FOLLOWED_DAYS, **waits}
        by_model: dict[str, dict[int, datetime]] = {}
        with self._database.session() as connection:
            for fingerprint, batch, made_at in connection.execute(load_sql("batch_job/to_follow_up"), parameters):
                by_model.setdefault(fingerprint, {})[batch] = made_at
        return by_model

    def listed(self, days: int = 7) -> list[dict[str, Any]]:
        """Jobs that live, and those that ended in the last days, the newest first."""
        with self._database.session() as connection, connection.cursor(row_factory=dict_row) as cursor:
            return cursor.execute(
                load_sql("batch_job/listed"), {"collection": self._collection, "days": days}
            ).fetchall()

    def look(self, job: str, *, fetch: bool = True) -> str | None:
        """Do what there is to do for a job, and say its state; None if another process is at it, or it is gone.

        Without `fetch`, what it has answered stays at the server, and its state is `ended`. OutageError, ProfileError.
        """
        with job_lock(self._database, job) as ours:
            row = self.get(job) if ours else None
            if row is None:
                return None
            if row.state == "preparing":  # who made it has ended
                end(self._database, job, "failed", "its process ended before it was submitted")
            elif row.state in (*LIVING, "lost"):
                try:
                    with BatchApi(stored_profile(row.profile), self._settings) as api:
                        self._go_on(row, api, fetch=fetch)
                except PipelineError as error:
                    _execute(self._database, "not_looked", id=job, reason=str(error))
                    raise
            row = self.get(job)
            return row.state if row else None

    def cancel(self, job: str) -> str:
        """Have the server end a job, and what it says of it then. What it has answered until then is fetched once it
        has ended.
        """
        row = self.get(job)
        if row is None or row.remote is None or row.state != "submitted":
            raise ConfigurationError(
                f"batch job {job} is not at work at a server: see `embeddings-pipeline batch-job list`"
            )
        with BatchApi(stored_profile(row.profile), self._settings) as api:
            try:
                remote = api.cancel(row.remote)
            except NoSuchBatchError as error:
                raise self._gone(row, api, str(error)) from None
            except PipelineError:  # as it says of a batch that has ended, too
                remote = api.look(row.remote)
                if not remote.has_ended:
                    raise
            self._note(row, remote)
        return remote.state

    def forget(self, job: str) -> None:
        """End a job without its server, which may not answer ever again. If it does, what it has answered is kept."""
        with job_lock(self._database, job) as ours:
            row = self.get(job) if ours else None
            if row is None or row.state not in LIVING:
                reason = "somebody works on it" if not ours else "it has ended"
                raise ConfigurationError(
                    f"batch job {job} cannot be forgotten now, since {reason}: see `embeddings-pipeline batch-job list`"
                )
            end(self._database, job, "lost" if row.remote else "failed", "it was forgotten by hand")

    def _go_on(self, job: Job, api: BatchApi, *, fetch: bool) -> None:
        if job.state == "uploaded":
            self._find_or_begin(job, api)
            job = self.get(job.id) or job
        if job.state in ("submitted", "lost"):
            assert job.remote is not None
            try:
                remote = api.look(job.remote)
                if job.state == "lost" and not remote.has_ended:  # it stays so until there is something to fetch
                    _execute(self._database, "not_looked", id=job.id, reason=job.reason)
                else:
                    self._note(job, remote)
            except NoSuchBatchError as error:
                self._missing(job, api, error)
            failpoint("batch_job.looked")
            job = self.get(job.id) or job
        if job.state == "ended" and fetch:
            self._fetch(job, api)

    def _find_or_begin(self, job: Job, api: BatchApi) -> None:
        """A job of which it is not known whether the server began it."""
        since = datetime.fromtimestamp(job.made_at.timestamp() - FIND_HOURS * 3600, job.made_at.tzinfo)
        if remote := api.find(job.id, job.input_file, since):
            _execute(self._database, "submitted", id=job.id, remote=remote.name, remote_state=remote.state)
        elif api.account != job.account:
            raise self._gone(job, api, f"{api.place} lists no such batch")
        elif (job.asked_seconds or 0.0) > GRACE_SECONDS and noted(self._database, "asked", job.id):
            assert job.input_file is not None
            begin(self._database, api, job.id, job.input_file)
        else:
            _execute(self._database, "not_looked", id=job.id, reason="whether it was begun is not known yet")

    def _note(self, job: Job, remote: RemoteBatch) -> None:
        _execute(
            self._database,
            "looked",
            id=job.id,
            state="ended" if remote.has_ended else "submitted",
            remote_state=remote.state,
            remote_done=remote.done,
            output_file=remote.output_file,
            error_file=remote.error_file,
            reason=remote.errors,
        )

    def _missing(self, job: Job, api: BatchApi, error: NoSuchBatchError) -> None:
        """The server has no such batch, or file: lost, if it says so for a while, to whoever submitted it."""
        if api.account != job.account:
            raise self._gone(job, api, str(error))
        self._lost(job, f"the server lost it: {error}")

    @staticmethod
    def _gone(job: Job, api: BatchApi, said: str) -> ProfileError:
        """That a server does not know a job that it should."""
        other = f"job {job.id} was submitted with another key or address: bring that back, or "
        return ProfileError(
            f"{said}: {other if api.account != job.account else ''}give it up with `embeddings-pipeline "
            f"batch-job forget {job.id[:8]}`"
        )

    def _lost(self, job: Job, reason: str) -> bool:
        """Note that something of a job is not there. After a while it counts as lost, and its texts are free; what
        comes back within weeks is kept all the same.
        """
        [(seconds,)] = _execute(self._database, "missing", id=job.id, reason=reason)
        is_lost = job.state == "lost" or seconds > LOST_SECONDS
        if is_lost and job.state != "lost":
            end(self._database, job.id, "lost", reason)
        return is_lost

    def _fetch(self, job: Job, api: BatchApi) -> None:
        """Bring what was answered into the cache, and end the job."""
        cache, told = open_cache(self._database, self._settings), dict[bytes, str | None]()
        unreadable: str | None = None
        with room_for_file(job.collection) as folder:
            path = folder / "answers.jsonl"
            for name in filter(None, (job.output_file, job.error_file)):
                try:
                    api.download(name, path)
                except NoSuchBatchError as error:
                    self._missing(job, api, error)
                    return
                read = 0
                for lines in api.read(path, job.id):
                    told |= {line.digest: line.why for line in lines if told.get(line.digest, "") is not None}
                    self._keep(job, cache, lines)
                    read += len(lines)
                if not read and path.stat().st_size:
                    unreadable = name
        failpoint("batch_job.fetched")
        expected = job.remote_done or (job.texts if job.remote_state == "completed" else 0)
        if unreadable and len(told) < max(expected, 1):  # the server has it yet
            raise OutageError(
                f"batch job {job.id}: what {api.place} gave as its file {unreadable} has no answer to it, and is read "
                "again"
            )
        if len(told) < expected:
            missing = f"its files have {len(told):,} of the {expected:,} answers that are due"
            if not self._lost(job, missing):
                raise OutageError(f"batch job {job.id}: {missing}; they are read again")
            return
        state, reason = ("failed", job.reason) if job.remote_state == "failed" else ("done", _why(told.values()))
        end(self._database, job.id, state, reason)
        failpoint("batch_job.done")

    def _keep(self, job: Job, cache: EmbeddingCache, lines: Sequence[Line]) -> None:
        """Keep some answers, note what they cost, and let go of their texts: all or nothing, and each once."""
        terms = job.terms
        answered = {line.digest: line for line in reversed(lines) if line.vector is not None}
        vectors = {digest: line.vector for digest, line in answered.items() if line.vector is not None}
        fits = pack(vectors).keys()
        refused = {line.digest: line for line in lines if line.refused and line.digest not in answered}
        refused |= {digest: line for digest, line in answered.items() if digest not in fits}
        with self._database.session() as connection, connection.transaction():
            asked = {"id": job.id, "hashes": [*vectors, *refused]}
            claims = dict(connection.execute(load_sql("batch_job/open_claims"), asked).fetchall())
            known = cache.known_hashes(terms.fingerprint, terms.dimensions, list(vectors))
            new = {digest: vectors[digest] for digest in fits if digest in claims or digest not in known}
            spoilt = [line for digest, line in refused.items() if line.tokens and digest in claims]
            if new:
                self._put(cache, terms, new, connection)
            if new or spoilt:
                billed = self._bill(connection, job, [*(answered[digest] for digest in new), *spoilt], claims)
                told = {"id": job.id, "hashes": list(new), "texts": len(new), "billed_tokens": billed}
                connection.execute(load_sql("batch_job/answered"), {**told, "billed_usd": terms.usd(billed)})
            if refused:
                connection.execute(load_sql("batch_job/refused"), {"id": job.id, "hashes": list(refused)})
        failpoint("batch_job.kept")

    @staticmethod
    def _bill(connection: psycopg.Connection, job: Job, lines: Sequence[Line], counted: Mapping[bytes, int]) -> int:
        """Note what answers cost, on the day of the job; the tokens billed, as counted here where it is not told."""
        told = [line for line in lines if line.tokens is not None]
        tokens = sum(line.tokens or 0 for line in told)
        of_told = sum(counted.get(line.digest, 0) for line in told)
        billed = tokens + sum(counted.get(line.digest, 0) for line in lines if line.tokens is None)
        record(connection, job.terms, len(lines), billed, told=tokens, counted=of_told, moment=job.made_at)
        return billed

    @staticmethod
    def _put(
        cache: EmbeddingCache, terms: Terms, vectors: Mapping[bytes, NDArray], connection: psycopg.Connection
    ) -> None:
        """OutageError if the cache does not keep them: the server does, until another try."""
        cache.put(terms.fingerprint, vectors, connection)
        if isinstance(cache, PostgresCache):
            return
        if cache.known_hashes(terms.fingerprint, terms.dimensions, list(vectors)) < vectors.keys():
            raise OutageError(
                f"collection {terms.collection!r}: the embedding cache does not keep what batch jobs have answered; "
                "mend EMBEDDING_CACHE_URL, or unset it: the answers stay with the server meanwhile, for 30 days"
            )


def _why(whys: Iterable[str | None]) -> str | None:
    """Why texts have no answer, in the words that most of them have."""
    words = Counter(why for why in whys if why)
    if not words:
        return None
    [(most, number)] = words.most_common(1)
    others = words.total() - number
    return f"{counted(number, 'text')} without an answer: {most}" + (f" (and {others:,} for others)" if others else "")


def noted(database: Database, statement: str, job: str, **parameters: Any) -> bool:
    """Whether the job was still in the state that the statement asks for."""
    return bool(_execute(database, statement, id=job, **parameters))


def end(database: Database, job: str, state: str, reason: str | None) -> None:
    """A job has ended: its texts are free."""
    _execute(database, "end", id=job, state=state, reason=reason)


def _execute(database: Database, statement: str, **parameters: Any) -> list[tuple[Any, ...]]:
    with database.session() as connection, connection.transaction():
        cursor = connection.execute(load_sql(f"batch_job/{statement}"), parameters)
        return cursor.fetchall() if cursor.description else []
