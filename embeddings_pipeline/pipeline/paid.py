"""What a collection asks its model: on which terms, through which cache, and for how many tokens."""

from embeddings_pipeline.config.prices import Api, is_hosted, is_paid, usd_per_million_tokens
from embeddings_pipeline.encoders.answers import Answers
from embeddings_pipeline.encoders.base import Encoder
from embeddings_pipeline.encoders.budget import Terms
from embeddings_pipeline.encoders.cache import open_cache
from embeddings_pipeline.encoders.spend import token_ratio
from embeddings_pipeline.encoders.tokens import counts_exactly
from embeddings_pipeline.pipeline.collection import Collection

FIRST_RATIO = 1.3  # set aside, of what is estimated, before a server has said how many tokens it bills


def terms_of(collection: Collection, encoder: Encoder, api: Api = "direct") -> Terms:
    """On which terms the collection's model is asked."""
    profile, budget = collection.profile, collection.definition.attributes.budget
    ratio = token_ratio(collection.database, collection.fingerprint) if is_paid(profile) else None
    return Terms(
        collection.definition.name,
        collection.fingerprint,
        profile.dimensions,
        profile.model,
        getattr(encoder, "account", ""),
        paid=is_paid(collection.profile),
        usd_per_million=usd_per_million_tokens(profile, api),
        usd_per_day=budget.usd_per_day if budget else None,
        ratio=ratio or (FIRST_RATIO if is_hosted(profile) and not counts_exactly(profile) else 1.0),
    )


def answers_of(collection: Collection, encoder: Encoder, *, force: bool = False) -> Answers | None:
    """What the collection's model is asked through; None if nothing is to be kept or paid."""
    if not (collection.profile.cache or is_paid(collection.profile)):
        return None
    cache = open_cache(collection.database, collection.settings) if collection.profile.cache else None
    return Answers(collection.database, cache, terms_of(collection, encoder), force=force)
