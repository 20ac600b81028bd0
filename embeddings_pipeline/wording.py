"""Words for people that depend on a number."""

IRREGULAR = {
    "batch": "batches",
    "is": "are",
    "counts": "count",
    "gives": "give",
    "has": "have",
    "lacks": "lack",
    "query": "queries",
    "was": "were",
}


def many(number: float, word: str) -> str:
    """A word as it is said of so many: `text` or `texts`, `is` or `are`."""
    return word if number == 1 else IRREGULAR.get(word, f"{word}s")


def counted(number: int, word: str) -> str:
    """`1 text`, `1,200 texts`."""
    return f"{number:,} {many(number, word)}"


def texts_and_items(number: int) -> str:
    """`1 text or item`, `1,200 texts and items`."""
    return "1 text or item" if number == 1 else f"{number:,} texts and items"
