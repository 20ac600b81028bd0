"""Texts that are longer than the model reads: their ends count for nothing, in no search."""

from embeddings_pipeline.ledger.truncated import Truncation
from embeddings_pipeline.pipeline.collection import Collection
from embeddings_pipeline.pipeline.embed import note_lengths
from embeddings_pipeline.wording import counted


def truncation(collection: Collection) -> Truncation:
    """How many texts are too long for the current model. Texts that were embedded before that was noted are looked at
    the first time, which loads the model.
    """
    ledger, fingerprint = collection.ledger, collection.fingerprint
    counted = ledger.truncation(fingerprint)
    if counted.known:
        return counted
    for texts in ledger.all_texts():
        note_lengths(collection, texts)
    ledger.lengths_known(fingerprint)
    return ledger.truncation(fingerprint)


def in_words(found: Truncation) -> str:
    """`3 of 8 texts (37.50 %) longer than the model reads, the longest 361 tokens …`, for a person."""
    if not found.truncated:
        return f"none of {counted(found.texts, 'text')} is longer than the model reads"
    return (
        f"{found.truncated:,} of {counted(found.texts, 'text')} ({100 * found.share:.2f} %) longer than the model "
        f"reads, the longest {counted(found.longest, 'token')}; their ends are cut off"
    )
