"""What hosted models cost, as their services' pages say. A profile's `price:` goes first."""

from datetime import date

from embeddings_pipeline.config.profiles import Profile

PRICES_OF = date(2026, 11, 1)
"""When the table was looked up."""
USD_PER_MILLION_TOKENS = {
    "text-embedding-3-small": 0.02,
    "text-embedding-3-large": 0.13,
    "text-embedding-ada-002": 0.10,
}
"""By model, of provider `openai`: https://platform.openai.com/docs/pricing"""


def is_hosted(profile: Profile) -> bool:
    """Whether a service, or a server of the user's own, computes the vectors."""
    return profile.provider == "openai"


def is_paid(profile: Profile) -> bool:
    """Whether somebody takes money for the model's answers, as far as is known."""
    return is_hosted(profile) or bool(profile.price)


def usd_per_million_tokens(profile: Profile) -> float | None:
    """The price of a profile's model in US dollars; None if it is not known. A local model costs nothing."""
    if profile.price is not None:
        return profile.price
    if not is_hosted(profile):
        return 0.0
    return USD_PER_MILLION_TOKENS.get(profile.model)


def price_in_words(profile: Profile) -> str:
    """Where the price of a profile's model comes from, for people."""
    price = usd_per_million_tokens(profile)
    if price is None:
        return f"no price is known for {profile.model}: give `price:` in the profile"
    source = "the profile" if profile.price is not None else f"the table of {PRICES_OF:%B %Y}"
    return f"${price:g} for a million tokens, from {source}"
