"""What `words:` may say: how the words of texts are looked for beside their meaning, and how both are joined."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from embeddings_pipeline.config.fields import Number, Texts, YesOrNo
from embeddings_pipeline.errors import did_you_mean

SIMPLE = "simple"  # no language: neither stems nor stop words
# Those that both PyStemmer and PostgreSQL have stems of.
LANGUAGES = (
    *("arabic", "armenian", "basque", "catalan", "danish", "dutch", "english", "estonian", "finnish", "french"),
    *("german", "greek", "hindi", "hungarian", "indonesian", "irish", "italian", "lithuanian", "nepali", "norwegian"),
    *("portuguese", "romanian", "russian", "serbian", "spanish", "swedish", "tamil", "turkish", "yiddish"),
)


def _language(value: Any) -> str:
    if value not in (SIMPLE, *LANGUAGES):
        near, known = did_you_mean(str(value), (SIMPLE, *LANGUAGES)), ", ".join(LANGUAGES)
        raise ValueError(f"{value!r} is not a language of words{near}: it is {SIMPLE}, or one of {known}")
    return str(value)


class FusionWeights(BaseModel):
    """What the rank in each leg counts for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dense: Number = Field(default=1.0, description="Of the rank by vectors.")
    text: Number = Field(default=1.0, description="Of the rank by words.")

    def model_post_init(self, _: Any) -> None:
        if min(self.dense, self.text) < 0 or self.dense + self.text == 0:
            raise ValueError("`dense:` and `text:` are 0 or more, and not both 0")


class FusionDefinition(BaseModel):
    """Reciprocal rank fusion: an item's score is the sum of weight / (k + rank) over both legs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    k: Number = Field(default=20.0, description="The higher, the less the first ranks count before the later ones.")
    weights: FusionWeights = Field(default_factory=FusionWeights, description="`dense` and `text`.")

    def model_post_init(self, _: Any) -> None:
        if not 0 <= self.k <= 10_000:
            raise ValueError("`k:` is a number from 0 to 10000")


class WordsDefinition(BaseModel):
    """A lexical index beside the vectors: searches look for the words of a query too. `words: {}` is English."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    language: Annotated[str, BeforeValidator(_language, json_schema_input_type=str)] = Field(
        default="english",
        description="What the texts are written in, which says the stemmer and the stop words; `simple`: any language, "
        "without either.",
    )
    stemmer: YesOrNo = Field(
        default=True, description="Look for the stems of words: `running` finds `runs`. `simple` has none."
    )
    stop_words: Texts | None = Field(
        default=None,
        description="Words of a query that are not looked for, unless it has no others. Left out: the language's; "
        "`[]`: none.",
    )
    fusion: FusionDefinition = Field(
        default_factory=FusionDefinition, description="How both ranks of a hybrid search become one."
    )

    @property
    def stem(self) -> str | None:
        """The language whose stemmer is used; None for none."""
        return self.language if self.stemmer and self.language != SIMPLE else None
