"""What hosted models cost, as their services' pages say. A profile's `price:` goes first."""

from datetime import date
from typing import Literal

from embeddings_pipeline.config.profiles import Profile

PRICES_OF = date(2026, 11, 1)
"""When the table was looked up."""
USD_PER_MILLION_TOKENS = {
    "text-embedding-3-small": 0.02,
    "text-embedding-3-large": 0.13,
    "text-embedding-ada-002": 0.10,
}
"""By model, of provider `openai`: https://platform.openai.com/docs/pricing"""
BATCH_SHARE = 0.5
"""Of the price, if a model is asked by batch jobs: https://platform.openai.com/docs/guides/batch"""
Api = Literal["direct", "batch"]
"""How a hosted model is asked: at once, or by batch jobs, within a day."""


def is_hosted(profile: Profile) -> bool:
    """Whether a service, or a server of the user's own, computes the vectors."""
    return profile.provider == "openai"


def is_paid(profile: Profile) -> bool:
    """Whether somebody takes money for the model's answers, as far as is known."""
    return is_hosted(profile) or bool(profile.price)


def usd_per_million_tokens(profile: Profile, api: Api = "direct") -> float | None:
    """The price of a profile's model in US dollars; None if it is not known. A local model costs nothing."""
    if profile.price is None and not is_hosted(profile):
        return 0.0
    price = USD_PER_MILLION_TOKENS.get(profile.model) if profile.price is None else profile.price
    return price * BATCH_SHARE if price is not None and api == "batch" else price


def price_in_words(profile: Profile, api: Api = "direct") -> str:
    """Where the price of a profile's model comes from, for people."""
    price = usd_per_million_tokens(profile, api)
    if price is None:
        return f"no price is known for {profile.model}: give `price:` in the profile"
    source = "the profile" if profile.price is not None else f"the table of {PRICES_OF:%B %Y}"
    half = ", half of which batch jobs cost" if api == "batch" else ""
    return f"${price:g} for a million tokens, from {source}{half}"
