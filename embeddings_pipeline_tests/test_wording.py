"""Words for people agree with their number."""

from embeddings_pipeline.wording import counted, many, texts_and_items


def test_a_word_agrees_with_its_number() -> None:
    assert [counted(number, "text") for number in (0, 1, 2, 1200)] == ["0 texts", "1 text", "2 texts", "1,200 texts"]
    assert (counted(1, "batch"), counted(3, "batch")) == ("1 batch", "3 batches")
    assert (many(1, "is"), many(2, "is")) == ("is", "are")
    assert (texts_and_items(1), texts_and_items(2)) == ("1 text or item", "2 texts and items")
