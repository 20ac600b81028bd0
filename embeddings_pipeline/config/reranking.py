"""What a reranker is: a cross-encoder that reads a query and a text together, and which one puts hits into order."""

from pydantic import BaseModel, ConfigDict, Field
from pydantic.dataclasses import dataclass

from embeddings_pipeline.config.fields import Number
from embeddings_pipeline.config.profiles import Profile

RERANKER = "BAAI/bge-reranker-large"
SMALLER_RERANKER = "BAAI/bge-reranker-base"  # takes over where the memory does not suffice
RERANKED, RETURNED = 200, 20  # hits that are scored, and that are returned


class RerankRules(BaseModel):
    """When a search is not reranked, though it is asked for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sure_margin: Number | None = Field(
        default=None,
        description="A search whose first hit's score is above the second's by this share of it (`0.2`) is sure, and "
        "is not reranked. Left out: every search that asks for it is.",
    )

    def model_post_init(self, _: object) -> None:
        if self.sure_margin is not None and not 0 < self.sure_margin <= 1:
            raise ValueError("`sure_margin:` is a share of the first score, above 0 and at most 1")


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Reranker(Profile):
    """A cross-encoder as a profile of its own, which makes one number of each pair of texts."""


def reranker_profile(model: str, *, device: str | None = None, batch_size: int | None = None) -> Reranker:
    """The profile of a cross-encoder by its Hugging Face name or folder; batch_size: most pairs in one pass."""
    return Reranker(
        name="reranker",
        provider="local",
        model=model,
        dimensions=1,
        normalize=False,
        query_prompt="",
        document_prompt="",
        device=device,
        batch_size=batch_size,
    )
