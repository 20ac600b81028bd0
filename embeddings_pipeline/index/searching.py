"""How a collection is searched, as `embeddings.hybrid_search` of sql/schema finds it in the database."""

import json
from hashlib import blake2b
from typing import Any

from psycopg.types.json import Jsonb

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.index.words import configuration_of


def texts_per_item(definition: CollectionDefinition) -> int:
    """How many of an item's texts are expected among the nearest, of which one counts."""
    return 5 if definition.attributes.chunk else 1


def search_digest(definition: CollectionDefinition) -> str:
    """Hash of what `search_definition` is made from."""
    attributes = definition.attributes
    words = attributes.words.model_dump(mode="json") if attributes.words else None
    filters = {column: kind.model_dump(mode="json") for column, kind in attributes.filters.items()}
    parts = [list(attributes.vectors), filters, words, texts_per_item(definition)]
    return blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def search_definition(definition: CollectionDefinition) -> dict[str, Any]:
    """The row of embeddings.search_definition, without its collection."""
    from embeddings_pipeline.index.terms import stop_words_of

    attributes, words = definition.attributes, None
    if declared := attributes.words:
        weights = declared.fusion.weights
        words = Jsonb(
            {
                "configuration": configuration_of(declared),
                "stop_words": sorted(stop_words_of(declared)),
                "k": declared.fusion.k,
                "dense": weights.dense,
                "text": weights.text,
            }
        )
    return {
        "digest": search_digest(definition),
        "vectors": list(attributes.vectors),
        "filters": Jsonb({column: kind.model_dump(mode="json") for column, kind in attributes.filters.items()}),
        "words": words,
        "texts_per_item": texts_per_item(definition),
    }
