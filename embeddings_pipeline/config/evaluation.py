"""What a `defs.yaml` says of how good searches have to be."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from embeddings_pipeline.config.fields import Number, Text


class EvaluationRules(BaseModel):
    """How good searches are, measured with judged queries."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    queries: Text = Field(
        description="Judged queries, in a file or folder beside the `defs.yaml`: JSON lines, BEIR, TREC topics."
    )
    qrels: Text | None = Field(
        default=None, description="Judgements of TREC topics, or others than BEIR's `qrels/test.tsv`."
    )
    least_ndcg: Number | None = Field(
        default=None, description="The check `search_quality` fails below this nDCG@10. Left out: no such check."
    )

    def model_post_init(self, _: Any) -> None:
        if self.least_ndcg is not None and not 0 <= self.least_ndcg <= 1:
            raise ValueError("`least_ndcg:` is from 0 to 1")
