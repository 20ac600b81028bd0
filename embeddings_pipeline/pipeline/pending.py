"""What embedding would do and cost, for a dry run: nothing is encoded, and nothing is written."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from embeddings_pipeline.config.prices import Api, is_hosted, is_paid
from embeddings_pipeline.encoders.base import tokens_read
from embeddings_pipeline.encoders.limits import limits_of
from embeddings_pipeline.encoders.tokens import count_tokens as count_hosted
from embeddings_pipeline.pipeline.collection import Collection
from embeddings_pipeline.pipeline.embed import EmbedOptions, has_limit, plan_texts
from embeddings_pipeline.pipeline.encode import count_tokens
from embeddings_pipeline.pipeline.figures import Embedded
from embeddings_pipeline.pipeline.quote import Quote, Quoter
from embeddings_pipeline.pipeline.render import texts_table


@dataclass
class Pending:
    """What a sync would do, in texts."""

    texts: int = 0  # that have no vector yet
    reused: int = 0
    truncated: int = 0  # of those, longer than the model reads
    longest: int = 0  # in tokens, of the truncated ones
    quotes: dict[int, Quote] = field(default_factory=dict)  # batch → what its texts would cost
    total: Quote = field(default_factory=Quote)
    basis: str = ""  # what the quotes rest on, for people


def pending_texts(
    collection: Collection, batches: Mapping[int, list[str]], *, force: bool = False, api: Api = "direct"
) -> Pending:
    """How many texts of these batches (batch → item keys) a sync would embed, what that costs, and how many have their
    vector, as `embed_batches` counts them. Writes nothing.
    """
    pending, quoter = Pending(), Quoter(collection, api)
    with collection.source.connect() as reading, collection.database.connect(autocommit=True) as connection:
        # Before the first sync nothing is there that could be used again.
        options = EmbedOptions(force=force or not collection.model.destination.is_made(connection))
        for batch, item_keys in batches.items():
            items = collection.source.read(reading, item_keys).table
            adopted: set[str] = set()
            if collection.adopts and not force:
                adopted = collection.model.destination.adoptable_items(connection, items["item_key"].to_pylist())
                items = items.filter(pc.invert(pc.is_in(items["item_key"], pa.array(list(adopted), pa.string()))))
            texts, _ = texts_table(collection.definition, items)
            plan = plan_texts(collection, batch, texts, options)
            tokens = counted_tokens(collection, plan.wanted)
            lengths = _too_long(collection, tokens.values())
            pending.texts += len(plan.wanted)
            pending.reused += len(adopted) + plan.result.reused
            pending.truncated += len(lengths)
            pending.longest = max(pending.longest, *lengths, 0)
            if plan.wanted:
                pending.quotes[batch] = quoter.quote(tokens, force=force)
    pending.total, pending.basis = quoter.total(list(pending.quotes.values())), quoter.basis
    return pending


def quote_batches(
    quoter: Quoter, batches: Iterable[int], run: str, options: EmbedOptions
) -> Iterator[tuple[int, Embedded, Quote]]:
    """For a dry run of batches that are rendered: each with what embedding it would do, and cost."""
    collection = quoter.collection
    for batch in batches:
        _, texts = collection.newest("item_texts", batch, run)
        plan = plan_texts(collection, batch, texts, options)
        plan.result.left_to_embed = len(plan.wanted)
        yield batch, plan.result, quoter.quote(counted_tokens(collection, plan.wanted), force=options.force)


def counted_tokens(collection: Collection, texts: Mapping[bytes, str]) -> dict[bytes, int]:
    """The number of tokens of each text, by content hash; 0 where neither a price nor a limit depends on it."""
    if not texts or not (is_paid(collection.profile) or has_limit(collection)):
        return dict.fromkeys(texts, 0)
    if is_hosted(collection.profile):
        return dict(zip(texts, count_hosted(collection.profile, list(texts.values())).tolist(), strict=True))
    return dict(zip(texts, count_tokens(collection.encoder(), list(texts.values())), strict=True))


def _too_long(collection: Collection, tokens: Iterable[int]) -> list[int]:
    """Those numbers of tokens that are more than the model reads."""
    if not has_limit(collection):
        return []
    profile = collection.profile
    most = limits_of(profile).tokens_per_input if is_hosted(profile) else tokens_read(collection.encoder(), profile)
    return [count for count in tokens if most is not None and count > most]
