"""The third step of a batch: each text gets its vector, kept for its content hash or made by the encoder."""

import logging
import time
from collections.abc import Container, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from embeddings_pipeline.config.prices import Api, is_hosted, is_paid
from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.encoders.base import Encoder, OnAnswer, tokens_read
from embeddings_pipeline.encoders.batch_api import MOST_TEXTS
from embeddings_pipeline.encoders.processor import is_cpu
from embeddings_pipeline.pipeline.attempts import each_batch, failure_noted
from embeddings_pipeline.pipeline.canaries import remember
from embeddings_pipeline.pipeline.collection import Collection
from embeddings_pipeline.pipeline.encode import Encoding, count_tokens, counts_while_encoding, encode, refused
from embeddings_pipeline.pipeline.figures import Embedded
from embeddings_pipeline.pipeline.paid import answers_of
from embeddings_pipeline.pipeline.submit import check_api, submit_texts
from embeddings_pipeline.pipeline.vectors import (
    Vectors,
    embeddings_table,
    hash_array,
    joined,
    no_vectors,
    vectors_adopted,
    vectors_there,
)
from embeddings_pipeline.progress import count

log = logging.getLogger(__name__)

TEXTS_TOGETHER = 1000  # of several batches in one call of `embed_texts`; a kill loses no more
FIRST_TEXTS, TEXTS_AT_ONCE = 128, 512  # in one call of the encoder, which sorts them by length
MANY_TEXTS = 8192  # instead, for a hosted model or a GPU: requests and passes are full, and many are under way at once


@dataclass(frozen=True)
class EmbedOptions:
    """What a run embeds, if not every text that lacks its vector."""

    force: bool = False  # every text anew, also those that the cache knows
    dry_run: bool = False  # count, and encode and write nothing
    limit: int | None = None  # texts, in all batches together
    items: Container[str] | None = None  # only texts of the items with these keys
    api: Api = "direct"  # batch: what no cache knows is submitted, and comes with a later run

    @property
    def everything(self) -> bool:
        """Whether each text of the run's batches has its vector afterwards."""
        return not self.dry_run and self.limit is None and self.items is None

    def chooses(self, item_key: str) -> bool:
        return self.items is None or item_key in self.items


DEFAULTS = EmbedOptions()


def embed_batches(
    collection: Collection, batches: Iterable[int], run: str, options: EmbedOptions = DEFAULTS
) -> Iterator[tuple[int, Embedded]]:
    """Give every text of these batches its vector: the one that is there for its content hash, else a new one.

    Yields each batch when its file is written. Batches with few texts to encode go to the encoder together. Raises
    OutageError if the encoder fails for a harmless text too.
    """
    check_api(collection.profile, options.api)
    encoded: dict[int, tuple[BatchPlan, Encoded]] = {}
    together = MANY_TEXTS if _takes_many(collection.profile) else TEXTS_TOGETHER
    if options.api == "batch":
        together = MOST_TEXTS

    def plan(collection: Collection, batch: int) -> BatchPlan:
        _, texts = collection.newest("item_texts", batch, run)
        return plan_texts(collection, batch, texts, options)

    def encode() -> Iterator[int]:
        for group in _groups(_chosen(each_batch(collection, batches, plan), options), together):
            made = _encode_group(collection, group, options)
            for plan_ in group:
                encoded[plan_.batch] = plan_, made
                yield plan_.batch

    def write(collection: Collection, batch: int) -> Embedded:
        plan_, made = encoded.pop(batch)
        if not options.dry_run:
            table = embeddings_table(collection, plan_.texts, made.vectors, plan_.have)
            collection.lake.write(table, collection.folder("embeddings"), batch, run)
        return plan_.result

    yield from each_batch(collection, encode(), write)


@dataclass
class BatchPlan:
    """What is to be done for one batch."""

    batch: int
    texts: pa.Table
    have: Vectors
    adopted: dict[bytes, str]  # content hash → text whose vector is the user's own
    wanted: dict[bytes, str]  # content hash → text to encode
    result: Embedded


def plan_texts(collection: Collection, batch: int, texts: pa.Table, options: EmbedOptions) -> BatchPlan:
    """Which of the batch's texts are to be encoded."""
    started = time.perf_counter()
    texts = texts.filter(pc.invert(texts["blank"]))
    hashes = texts["content_hash"]
    have = no_vectors(collection.model.destination.dimension)
    adopted: dict[bytes, str] = {}
    excused: set[bytes] = set()
    if not options.force:
        vectors = vectors_adopted(collection, texts)
        adopted = texts_by_hash(texts.filter(vectors.has(hashes)))
        have = joined([vectors_there(collection, batch), vectors], have.matrix.shape[1])
        excused = collection.ledger.quarantined(collection.fingerprint, hashes.unique().to_pylist(), waiting=True)
    lacking = ~have.has(hashes)
    wanting = texts.filter(lacking)
    if excused:
        wanting = wanting.filter(pc.invert(pc.is_in(wanting["content_hash"], hash_array(list(excused)))))
    if options.items is not None:
        wanting = wanting.filter(pa.array(map(options.chooses, wanting["item_key"].to_pylist()), pa.bool_()))
    wanted = texts_by_hash(wanting)
    # Of equal texts one is encoded.
    reused = texts.num_rows - int(lacking.sum()) + wanting.num_rows - len(wanted)
    result = Embedded(reused=reused, quarantined=len(excused))
    result.seconds = time.perf_counter() - started
    return BatchPlan(batch, texts, have, adopted, wanted, result)


def texts_by_hash(texts: pa.Table) -> dict[bytes, str]:
    """Content hash → text, of a table that has both."""
    return dict(zip(texts["content_hash"].to_pylist(), texts["text"].to_pylist(), strict=True))


def _chosen(plans: Iterable[tuple[int, BatchPlan]], options: EmbedOptions) -> Iterator[BatchPlan]:
    """The plans, with what `limit` and `dry_run` leave of them."""
    left = 0 if options.dry_run else options.limit
    for _, plan in plans:
        chosen = dict(islice(plan.wanted.items(), left))
        plan.result.left_to_embed = len(plan.wanted) - len(chosen)
        plan.wanted = chosen
        if left is not None:
            left -= len(chosen)
        yield plan


def _groups(plans: Iterable[BatchPlan], together: int) -> Iterator[list[BatchPlan]]:
    """Plans whose texts, about so many, go to the encoder together; also those before one that fails."""
    group: list[BatchPlan] = []
    try:
        for plan in plans:
            if group and sum(len(other.wanted) for other in group) + len(plan.wanted) > together:
                yield group
                group = []
            group.append(plan)
    except Exception:
        yield group
        raise
    yield group


def _encode_group(collection: Collection, group: list[BatchPlan], options: EmbedOptions) -> "Encoded":
    texts = {digest: text for plan in group for digest, text in plan.wanted.items()}
    started = time.perf_counter()
    made = Encoded(no_vectors(collection.model.destination.dimension), {}, {})
    batches = [plan.batch for plan in group]
    with failure_noted(collection, batches):
        for plan in () if options.dry_run else group:
            note_lengths(collection, plan.adopted)
        if texts:
            collection.ledger.note_attempts(batches)
            if options.api == "batch":
                submit_texts(collection, texts, {plan.batch: plan.wanted for plan in group})
            made = embed_texts(collection, texts, force=options.force)
    seconds = time.perf_counter() - started
    not_asked = made.cached | made.in_jobs
    usd_per_token = made.usd / max(1, sum(made.tokens.values()) - sum(made.tokens[digest] for digest in not_asked))
    for plan in group:
        result = plan.result
        result.in_jobs = sum(digest in made.in_jobs for digest in plan.wanted) if made.in_jobs else 0
        tokens = [made.tokens[digest] for digest in plan.wanted if digest not in made.in_jobs]
        bad = sum(digest in made.bad for digest in plan.wanted) if made.bad else 0
        cached = {digest for digest in plan.wanted if digest in made.cached} if made.cached else set()
        result.embedded = len(plan.wanted) - bad - len(cached) - result.in_jobs
        result.cached = len(cached)
        result.quarantined += bad
        result.usd = usd_per_token * (sum(tokens) - sum(made.tokens[digest] for digest in cached))
        result.tokens = sum(tokens)
        result.truncated = sum(count > made.tokens_read for count in tokens) if made.tokens_read else 0
        result.seconds += seconds * len(plan.wanted) / max(1, len(texts))
    return made


class Encoded(NamedTuple):
    """What embedding some texts gave."""

    vectors: Vectors
    bad: dict[bytes, str]  # content hash → why the text is poison
    tokens: dict[bytes, int]  # content hash → number of tokens
    tokens_read: int | None = None  # of a text, by the model; None: all
    cached: Set[bytes] = frozenset()  # of the vectors, those that the cache knew
    usd: float = 0.0  # what was billed
    in_jobs: Set[bytes] = frozenset()  # texts that have no vector yet, since batch jobs have them


def embed_texts(collection: Collection, texts: dict[bytes, str], *, force: bool = False) -> Encoded:
    """Vectors of these texts (by content hash): those that the cache knows, unless `force`, and new ones, but for texts
    that batch jobs have; reasons of the poison ones; numbers of tokens (rules 7 and 14).

    Raises OutageError, and BudgetError.
    """
    encoder, hosted = collection.encoder(), is_hosted(collection.profile)
    digests, values = list(texts), list(texts.values())
    made = Encoding()
    if is_paid(collection.profile) or not counts_while_encoding(encoder):
        made.tokens = dict(zip(digests, count_tokens(encoder, values), strict=True))
    cached: set[bytes] = set()
    answers = answers_of(collection, encoder, force=force)

    def answer(wanted: Mapping[bytes, str], on_answer: OnAnswer) -> dict[bytes, NDArray[np.float32]]:
        vectors = zip(wanted, encode(encoder, wanted, made, on_answer if hosted else None), strict=True)
        return {digest: vector for digest, vector in vectors if digest not in made.bad}

    parts = []
    for part in _parts(len(values), MANY_TEXTS if _takes_many(collection.profile) else FIRST_TEXTS):
        wanted = dict(zip(digests[part], values[part], strict=True))
        if answers is None:
            parts.append(encode(encoder, wanted, made))
        else:
            vectors_of, known = answers.of(wanted, made.tokens, answer)
            nothing = np.zeros(encoder.dimensions, np.float32)
            parts.append(np.stack([vectors_of.get(digest, nothing) for digest in wanted]))
            cached |= known
        count(len(wanted))
    bad, tokens = made.bad, _counted(encoder, texts, made.tokens)
    _note_truncated(collection, encoder, tokens)
    matrix, in_jobs = np.concatenate(parts), answers.in_jobs if answers else set()
    if in_jobs:
        matrix = matrix[[digest not in in_jobs for digest in digests]]
        digests = [digest for digest in digests if digest not in in_jobs]
    not_kept = refused(collection, encoder, digests, matrix, bad)
    for step, reasons in (("encode", bad), ("store", not_kept)):
        poison = {digest: (texts[digest], reason) for digest, reason in reasons.items()}
        collection.ledger.quarantine(collection.fingerprint, poison, step=step)
    bad |= not_kept
    stored_as = np.float16 if collection.model.destination.storage == "halfvec" else np.float32
    with np.errstate(over="ignore"):  # of refused ones
        vectors = Vectors(hash_array(digests), matrix.astype(stored_as, copy=False))
    if bad:
        vectors = vectors.chosen(np.array([digest not in bad for digest in digests]))
    if len(vectors):
        try:
            remember(collection, encoder)
        except Exception as error:  # the check of model drift says so again; the texts are not to blame
            log.warning("collection %r: the canaries could not be encoded: %s", collection.definition.name, error)
    usd = answers.usd if answers else 0.0
    return Encoded(vectors, bad, tokens, tokens_read(encoder, collection.profile), cached - bad.keys(), usd, in_jobs)


def _counted(encoder: Encoder, texts: Mapping[bytes, str], tokens: Mapping[bytes, int]) -> dict[bytes, int]:
    """Numbers of tokens of all texts: `tokens`, and those of what was not encoded (it was in a cache, or it is bad)."""
    rest = {digest: text for digest, text in texts.items() if digest not in tokens}
    counts = dict(zip(rest, count_tokens(encoder, list(rest.values())), strict=True)) if rest else {}
    return {digest: tokens[digest] if digest in tokens else counts[digest] for digest in texts}


def _takes_many(profile: Profile) -> bool:
    """Whether the model is fast only if it is given many texts at once."""
    return is_hosted(profile) or (profile.provider == "local" and not is_cpu(profile))


def _parts(texts: int, first: int) -> Iterator[slice]:
    """The texts in parts, a first small one for a local model, so that the work is seen to go on."""
    start, size = 0, first
    while start < texts:
        yield slice(start, start + size)
        start, size = start + size, max(size, TEXTS_AT_ONCE)


def note_lengths(collection: Collection, texts: Mapping[bytes, str]) -> None:
    """Note which of these texts (by content hash) are longer than the model reads; none of them is encoded."""
    if texts and has_limit(collection):
        encoder = collection.encoder()
        tokens = count_tokens(encoder, list(texts.values()))
        _note_truncated(collection, encoder, dict(zip(texts, tokens, strict=True)))


def _note_truncated(collection: Collection, encoder: Encoder, tokens: Mapping[bytes, int]) -> None:
    most = tokens_read(encoder, collection.profile)
    if most is not None:
        longer = {digest: count for digest, count in tokens.items() if count > most}
        collection.ledger.note_truncated(collection.fingerprint, longer)


def has_limit(collection: Collection) -> bool:
    """Whether the model may read less than a whole text; only a local one knows more than its profile says, and a
    hosted one is given no longer text unless it may be cut."""
    if is_hosted(collection.profile):
        return collection.profile.truncate
    return collection.profile.provider == "local" or collection.profile.max_length is not None
