"""Long texts in pieces."""

import regex

_CHARACTER = regex.compile(r"\X")  # what readers take for one: Unicode's extended grapheme clusters
_CONTINUES = regex.compile(r"[\p{Grapheme_Extend}\p{Mc}\u200d]")


def split_chunks(text: str, characters: int | None, overlap: int = 0) -> list[str]:
    """Pieces of at most `characters`, cut at white space where there is some; one piece if `characters` is None.

    Neighbours share up to `overlap` characters, from the beginning of a word on. What a reader takes for one character
    is never cut: a piece is longer than `characters` if it is a single such one.
    """
    if characters is None or len(text) <= characters:
        return [text]
    chunks, start = [], 0
    while start < len(text):
        end = min(start + characters, len(text))
        at_space = False
        if end < len(text):
            # A cut before the middle would make many tiny chunks of a text with few spaces.
            space = _last_space(text, start + characters // 2 + 1, end)
            at_space = space is not None
            end = _cut(text, start, end) if space is None else space
        chunks.append(text[start:end].strip())
        if end >= len(text):
            break
        start = _next_start(text, start, end, overlap, at_space)
    return [chunk for chunk in chunks if chunk]


def _next_start(text: str, start: int, end: int, overlap: int, at_space: bool) -> int:
    """Where the chunk after the one from `start` to `end` begins."""
    back = max(end - overlap, start + 1)
    if back >= end:
        return end
    space = text.find(" ", back, end)
    if space < 0 or _CONTINUES.match(text, space + 1):
        space = next((n for n in range(back, end) if _is_space(text, n)), -1)
    if space >= 0:
        return space
    # No word begins in the overlap: either the last one is longer, or words are not written apart.
    return end if at_space else min(_cut(text, start, back, up=True), end)


def _last_space(text: str, first: int, last: int) -> int | None:
    """The last place of white space: of spaces and line ends if there are some, of any other if not."""
    places = [n for n in range(last, first - 1, -1) if _is_space(text, n)]
    return next((n for n in places if text[n] in " \n"), places[0] if places else None)


def _is_space(text: str, place: int) -> bool:
    return text[place].isspace() and not _CONTINUES.match(text, place + 1)


def _cut(text: str, start: int, place: int, *, up: bool = False) -> int:
    """The nearest end of a character at or before `place` (at or after it with `up`); `start` is one of a character."""
    if text[place - 1 : place + 1].isascii():
        return place
    end = start
    for character in _CHARACTER.finditer(text, start):
        if character.end() > place and not (up and end < place) and end > start:
            break
        end = character.end()
        if end >= place:
            break
    return end
