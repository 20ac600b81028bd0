"""The third step of a batch: each text gets its vector, kept for its content hash or made by the encoder."""

import logging
import time
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from embeddings_pipeline.encoders.base import HARMLESS, Encoder, PoisonTextsError, tokens_read
from embeddings_pipeline.errors import OutageError, OutOfMemoryError, PipelineError, ProfileError
from embeddings_pipeline.forks import compute
from embeddings_pipeline.pipeline.attempts import failure_noted
from embeddings_pipeline.pipeline.canaries import remember
from embeddings_pipeline.pipeline.collection import Collection
from embeddings_pipeline.pipeline.figures import Embedded
from embeddings_pipeline.pipeline.render import texts_table
from embeddings_pipeline.pipeline.vectors import embeddings_table, vectors_adopted, vectors_there
from embeddings_pipeline.progress import count
from embeddings_pipeline.store.vector_range import NOT_A_VECTOR, usable, why_not

log = logging.getLogger(__name__)

MOST_HELPLESS = 10  # texts without a vector, of which none has one alone either
TEXTS_TOGETHER = 1000  # of several batches in one call of `embed_texts`; a kill loses no more
FIRST_TEXTS, TEXTS_AT_ONCE = 128, 512  # in one call of the encoder, which sorts them by length
HOSTED_TEXTS = 8192  # instead, for a hosted model: so many that requests are full, and many are under way at once


@dataclass(frozen=True)
class EmbedOptions:
    """What a run embeds, if not every text that lacks its vector."""

    force: bool = False  # every text anew
    dry_run: bool = False  # count, and encode and write nothing
    limit: int | None = None  # texts, in all batches together
    items: Container[str] | None = None  # only texts of the items with these keys

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
    group: list[_Plan] = []
    limit = options.limit
    together = HOSTED_TEXTS if _is_hosted(collection) else TEXTS_TOGETHER
    for batch in batches:
        with failure_noted(collection, [batch]):
            _, texts = collection.newest("item_texts", batch, run)
            plan = _plan(collection, batch, texts, options)
            if not options.dry_run:
                note_lengths(collection, plan.adopted)
        chosen = dict(islice(plan.wanted.items(), 0 if options.dry_run else limit))
        plan.result.left_to_embed = len(plan.wanted) - len(chosen)
        plan.wanted = chosen
        if limit is not None:
            limit -= len(chosen)
        if group and sum(len(other.wanted) for other in group) + len(plan.wanted) > together:
            yield from _embed_group(collection, group, run, options.dry_run)
            group = []
        group.append(plan)
    yield from _embed_group(collection, group, run, options.dry_run)


@dataclass
class _Plan:
    """What is to be done for one batch."""

    batch: int
    texts: pa.Table
    have: dict[bytes, NDArray]  # content hash → vector
    adopted: dict[bytes, str]  # content hash → text whose vector is the user's own
    wanted: dict[bytes, str]  # content hash → text to encode
    result: Embedded


def _plan(collection: Collection, batch: int, texts: pa.Table, options: EmbedOptions) -> _Plan:
    """Which of the batch's texts are to be encoded."""
    started = time.perf_counter()
    texts = texts.filter(pc.invert(texts["blank"]))
    hashes, values = texts["content_hash"].to_pylist(), texts["text"].to_pylist()
    have: dict[bytes, NDArray] = {}
    adopted: dict[bytes, str] = {}
    excused: set[bytes] = set()
    if not options.force:
        vectors = vectors_adopted(collection, texts)
        adopted = {digest: text for digest, text in zip(hashes, values, strict=True) if digest in vectors}
        have = {**vectors, **vectors_there(collection, batch)}
        excused = collection.ledger.quarantined(collection.fingerprint, list(set(hashes)), waiting=True)
    wanting = [
        (digest, text)
        for digest, text, item_key in zip(hashes, values, texts["item_key"].to_pylist(), strict=True)
        if digest not in have and digest not in excused and options.chooses(item_key)
    ]
    wanted = dict(wanting)
    # Of equal texts one is encoded.
    reused = sum(digest in have for digest in hashes) + len(wanting) - len(wanted)
    result = Embedded(reused=reused, quarantined=len(excused))
    result.seconds = time.perf_counter() - started
    return _Plan(batch, texts, have, adopted, wanted, result)


def _embed_group(collection: Collection, group: list[_Plan], run: str, dry_run: bool) -> Iterator[tuple[int, Embedded]]:
    texts = {digest: text for plan in group for digest, text in plan.wanted.items()}
    started = time.perf_counter()
    encoded: dict[bytes, NDArray] = {}
    bad: dict[bytes, str] = {}
    tokens: dict[bytes, int] = {}
    if texts:
        batches = [plan.batch for plan in group]
        collection.ledger.note_attempts(batches)
        with failure_noted(collection, batches):
            encoded, bad, tokens = embed_texts(collection, texts)
    seconds = time.perf_counter() - started
    longest = tokens_read(collection.encoder(), collection.profile) if texts else None
    for plan in group:
        result = plan.result
        result.embedded = sum(digest in encoded for digest in plan.wanted)
        result.quarantined += sum(digest in bad for digest in plan.wanted)
        result.tokens = sum(tokens[digest] for digest in plan.wanted)
        result.truncated = sum(tokens[digest] > longest for digest in plan.wanted) if longest else 0
        result.seconds += seconds * len(plan.wanted) / max(1, len(texts))
        if not dry_run:
            with failure_noted(collection, [plan.batch]):
                table = embeddings_table(collection, plan.texts, {**plan.have, **encoded}, encoded)
                collection.lake.write(table, collection.folder("embeddings"), plan.batch, run)
        yield plan.batch, result


def embed_texts(
    collection: Collection, texts: dict[bytes, str]
) -> tuple[dict[bytes, NDArray], dict[bytes, str], dict[bytes, int]]:
    """Vectors, reasons of the poison texts, and numbers of tokens, by content hash (rule 7). OutageError."""
    encoder = collection.encoder()
    digests, values = list(texts), list(texts.values())
    tokens = dict(zip(digests, _count_tokens(encoder, values), strict=True))
    _note_truncated(collection, encoder, tokens)
    bad: dict[bytes, str] = {}
    parts = []
    for part in _parts(len(values), HOSTED_TEXTS if _is_hosted(collection) else FIRST_TEXTS):
        parts.append(_encode(encoder, digests[part], values[part], bad))
        count(len(parts[-1]))
    vectors = np.concatenate(parts)
    _encode_alone(encoder, digests, values, vectors, bad)
    refused = _refused(collection, encoder, digests, vectors, bad)
    good = {digest: vector for digest, vector in zip(digests, vectors, strict=True) if digest not in bad | refused}
    for step, reasons in (("encode", bad), ("store", refused)):
        poison = {digest: (texts[digest], reason) for digest, reason in reasons.items()}
        collection.ledger.quarantine(collection.fingerprint, poison, step=step)
    if good:
        try:
            remember(collection, encoder)
        except Exception as error:  # the check of model drift says so again; the texts are not to blame
            log.warning("collection %r: the canaries could not be encoded: %s", collection.definition.name, error)
    return good, bad | refused, tokens


def _parts(texts: int, first: int) -> Iterator[slice]:
    """The texts in parts, a first small one for a local model, so that the work is seen to go on."""
    start, size = 0, first
    while start < texts:
        yield slice(start, start + size)
        start, size = start + size, max(size, TEXTS_AT_ONCE)


def _is_hosted(collection: Collection) -> bool:
    return collection.profile.provider == "openai"


def note_lengths(collection: Collection, texts: Mapping[bytes, str]) -> None:
    """Note which of these texts (by content hash) are longer than the model reads; none of them is encoded."""
    if texts and _has_limit(collection):
        encoder = collection.encoder()
        tokens = _count_tokens(encoder, list(texts.values()))
        _note_truncated(collection, encoder, dict(zip(texts, tokens, strict=True)))


def _note_truncated(collection: Collection, encoder: Encoder, tokens: Mapping[bytes, int]) -> None:
    most = tokens_read(encoder, collection.profile)
    if most is not None:
        longer = {digest: count for digest, count in tokens.items() if count > most}
        collection.ledger.note_truncated(collection.fingerprint, longer)


def _encode(encoder: Encoder, digests: list[bytes], texts: list[str], bad: dict[bytes, str]) -> NDArray[np.float32]:
    """Vectors of `texts`; those that fail by themselves get zeros and a reason in `bad` (rule 7)."""
    try:
        return compute(encoder.encode_documents, texts)
    except PoisonTextsError as error:
        bad |= {digests[place]: reason for place, reason in error.reasons.items()}
        return np.where(np.isnan(error.vectors), np.float32(0), error.vectors)
    except Exception as error:
        if _no_texts_fault(error):
            raise
        if len(texts) == 1:
            if not _works(encoder):
                raise
            bad[digests[0]] = _reason(error, texts[0])
            return np.zeros((1, encoder.dimensions), np.float32)
        half = len(texts) // 2
        first = _encode(encoder, digests[:half], texts[:half], bad)
        return np.concatenate([first, _encode(encoder, digests[half:], texts[half:], bad)])


def _count_tokens(encoder: Encoder, texts: list[str]) -> list[int]:
    """As the encoder counts them; 0 for a text that it cannot count."""
    try:
        counts: list[int] = encoder.count_tokens(texts).tolist()
    except Exception as error:
        if _no_texts_fault(error):
            raise
        half = len(texts) // 2
        return [0] if half == 0 else _count_tokens(encoder, texts[:half]) + _count_tokens(encoder, texts[half:])
    return counts


def _no_texts_fault(error: Exception) -> bool:
    return isinstance(error, OutageError | ProfileError) and not isinstance(error, OutOfMemoryError)


def _encode_alone(
    encoder: Encoder, digests: list[bytes], texts: list[str], vectors: NDArray, bad: dict[bytes, str]
) -> None:
    """Put what the model gives for a text alone in the place of what is no vector: with some models and processors that
    is because of the longer texts beside it. Ends after the first few for which that does not help.
    """
    helpless = 0
    for row in np.flatnonzero(~usable(vectors)) if len(texts) > 1 else ():
        if digests[row] in bad:
            continue
        vectors[row] = _encode(encoder, [digests[row]], [texts[row]], bad)[0]
        helpless += not usable(vectors[row : row + 1])[0]
        if helpless == MOST_HELPLESS:
            break


def _refused(
    collection: Collection, encoder: Encoder, digests: list[bytes], vectors: NDArray, bad: dict[bytes, str]
) -> dict[bytes, str]:
    """Why vectors of texts that are not bad cannot be stored. Those that are none at all become `bad`.

    ProfileError if a harmless text's vector cannot be stored either: then it is the model that does not fit.
    """
    storage = collection.model.destination.storage
    reasons = {digests[row]: reason for row, reason in why_not(vectors, storage).items() if digests[row] not in bad}
    bad |= {digest: reason for digest, reason in reasons.items() if reason == NOT_A_VECTOR}
    refused = {digest: reason for digest, reason in reasons.items() if reason != NOT_A_VECTOR}
    if refused and len(refused) + len(bad) == len(digests):
        for reason in why_not(encoder.encode_documents([HARMLESS]), storage).values():
            if reason != NOT_A_VECTOR:
                raise ProfileError(
                    f"Profile {collection.profile.name}: no vector of {collection.profile.model} can be stored: of "
                    f"{HARMLESS!r} {reason}"
                )
    return refused


def _reason(error: BaseException, text: str) -> str:
    if isinstance(error, MemoryError | OutOfMemoryError):
        return f"memory ran out for this text of {len(text):,} characters alone: `chunk:` splits long texts"
    if type(error) is PipelineError and error.__cause__ is not None:  # of the model, or of a class of the user's own
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}"


def _works(encoder: Encoder) -> bool:
    """Whether the encoder takes a harmless text: if not, the texts are not to blame."""
    try:
        encoder.encode_documents([HARMLESS])
    except Exception:
        return False
    return True


class Pending(NamedTuple):
    """What a sync would do, in texts."""

    texts: int = 0  # to encode
    reused: int = 0
    truncated: int = 0  # of those to encode, longer than the model reads
    longest: int = 0  # in tokens, of the truncated ones


def pending_texts(collection: Collection, batches: Mapping[int, list[str]], *, force: bool = False) -> Pending:
    """How many texts of these batches (batch → item keys) a sync would encode, and how many have their vector, as
    `embed_batches` counts them. Writes nothing.
    """
    pending = Pending()
    with collection.source.connect() as reading, collection.database.connect(autocommit=True) as connection:
        # Before the first sync nothing is there that could be used again.
        options = EmbedOptions(force=force or not collection.model.destination.is_made(connection))
        for batch, item_keys in batches.items():
            rows = collection.source.read(reading, item_keys)
            adopted: set[str] = set()
            if collection.adopts and not force:
                adopted = collection.model.destination.adoptable_items(connection, [row.item_key for row in rows])
            others = [row for row in rows if row.item_key not in adopted]
            readable = [row[:4] for row in others if row.reason is None]
            texts, _ = texts_table(collection.definition, readable)
            plan = _plan(collection, batch, texts, options)
            lengths = _lengths(collection, list(plan.wanted.values()))
            pending = Pending(
                pending.texts + len(plan.wanted),
                pending.reused + len(adopted) + plan.result.reused,
                pending.truncated + len(lengths),
                max(pending.longest, *lengths, 0),
            )
    return pending


def _lengths(collection: Collection, texts: list[str]) -> list[int]:
    """The numbers of tokens of those texts that are longer than the model reads."""
    if not texts or not _has_limit(collection):
        return []
    encoder = collection.encoder()
    most = tokens_read(encoder, collection.profile)
    return [count for count in _count_tokens(encoder, texts) if most is not None and count > most]


def _has_limit(collection: Collection) -> bool:
    """Whether the model may read less than a whole text; only a local one knows more than its profile says, and a
    hosted one is given no longer text unless it may be cut."""
    if _is_hosted(collection):
        return collection.profile.truncate
    return collection.profile.provider == "local" or collection.profile.max_length is not None
