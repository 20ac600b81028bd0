"""The literals of a template: what of one belongs to the column before it, what to the column after it.

The rules are told in docs/reference/templates.md. They look at the shape of a literal, which has a letter for each of
its characters:

    w  word                      o  a pair without a column in it
    %  sign of a unit            #  another sign: of a currency, `#`, `@`
    h  hyphen                    :  what ends a label
    -  other punctuation         " " and "\\n"  white space, the end of a line
"""

import re
import unicodedata
from dataclasses import dataclass

_LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
_SHAPES = {
    **dict.fromkeys("-‐‑", "h"),
    **dict.fromkeys(":=：", ":"),
    **dict.fromkeys("%‰‱°℃℉′″", "%"),
    **dict.fromkeys("#@№§", "#"),
    **dict.fromkeys("\"'", "w"),  # one without its partner: inches, an apostrophe
}
_LABEL_DASHES = set("-–—>→")
# Alone between two columns, these only join them.
_JOINING = frozenset("and,or,und,oder,et,ou,y,e,o,og,och,en,of,и,или,i,x,×,vs,vs.".split(","))  # noqa: SIM905
# With a full stop, these are labels: `dir. {director}`.
_SHORT_LABELS = frozenset("no,nr,vol,bd,ed,eds,hg,hrsg,dir,feat,ft,fig,ch,chap,kap,tel,ca,approx".split(","))  # noqa: SIM905
# Punctuation that separates nothing: an address, `km/h`, `1,5`, `pre-{column}`, `{column}-based`, `{column}/10`.
_PUNCTUATED = re.compile(r"\w+://\S*|(?<=\w)[/.&+_‐‑-](?=\w)|(?<=\d)[,:](?=\d)|(?<= )\w+[‐‑-]$|^[‐‑/-](?=\w)")


@dataclass(frozen=True)
class Literal:
    """Text between columns, and its shape."""

    text: str = ""
    shape: str = ""

    def __add__(self, other: "Literal") -> "Literal":
        return Literal(self.text + other.text, self.shape + other.shape)

    def __getitem__(self, part: slice) -> "Literal":
        return Literal(self.text[part], self.shape[part])


def literal(text: str, shape: str = "") -> Literal:
    """A literal. `shape` is the letter for each of its characters, where that is known."""
    return Literal(text, shape * len(text) if shape else "".join(map(_shape, text)))


def _shape(character: str) -> str:
    if character in _SHAPES:
        return _SHAPES[character]
    if character.isspace():
        return "\n" if character in _LINE_ENDS else " "
    category = unicodedata.category(character)
    if category == "Sc":
        return "#"
    # Brackets and quotes without their partners belong to what they touch.
    return "w" if category[0] in "LMNC" or category in ("Ps", "Pe", "Pi", "Pf") else "-"


def split(between: Literal, ending: str) -> tuple[str, str, str]:
    """A literal between two parts: the unit of the first, what separates the two, the label of the second.

    `ending`: what ends the labels of this template, from `label_end`.
    """
    text, shape = between.text, between.shape
    if place := _break(between, ending):
        start, end = place
        if text[end:].strip().casefold() in _JOINING:
            end = len(text)
        return text[:start], text[start:end], text[end:]
    spaces = len(text) - len(text.lstrip())
    symmetric = bool(spaces) == (text.rstrip() != text)
    words = text.strip().casefold()
    if not words or (symmetric and (words in _JOINING or set(shape.strip()) == {"#"})):
        return "", text, ""
    if shape[spaces] == "%" or (not spaces and not _is_label(shape)):
        end = len(re.match(r" *[^ ]*", shape)[0])  # type: ignore[index]
        return text[:end], *split(between[end:], ending)[1:]
    return "", text[:spaces], text[spaces:]


def _is_label(shape: str) -> bool:
    """Whether a literal that begins right behind a column belongs to the next one all the same."""
    return bool(re.fullmatch(r"[^ ]*: *|o[^ ]*", shape))


def _break(between: Literal, ending: str) -> tuple[int, int] | None:
    """Where the first separator with punctuation, or with the end of a line, begins and ends."""
    shape = between.shape
    for word in _PUNCTUATED.finditer(between.text):
        shape = shape[: word.start()] + "w" * len(word[0]) + shape[word.end() :]
    for run in re.finditer(r"[-:h \n]+", shape):
        marks = run[0].strip(" ")
        after_word = run.start() > 0
        separator = between.text[slice(*run.span())].strip()
        ends_label = marks.startswith(":") or (ending and separator == ending)
        ends_label = ends_label or (
            separator == "." and run.end() == len(shape) and _is_short(between.text[: run.start()])
        )
        if marks and not (after_word and ends_label):
            return run.start(), run.start() + _without_list_mark(between[slice(*run.span())])
    return None


def _is_short(words: str) -> bool:
    """Whether `words` and a full stop are a label: the number of a list, `No.`, `Vol.`, `dir.`."""
    word = words.strip()
    if not words[:1].isspace() or " " in word:
        return False
    return word.isdecimal() or word.istitle() or word.casefold() in _SHORT_LABELS


def _without_list_mark(run: Literal) -> int:
    """The length of a separator: a mark at the beginning of a line, `- {column}`, is no part of it."""
    line = run.shape.rfind("\n") + 1
    return line if line and re.fullmatch(r"\s*[-*+>•‣–]+[ \t]+", run.text[line:]) else len(run.text)


def label_end(first: Literal) -> str:
    """What ends the first label, and so the others: `Title – {title} Genre – {genre}`, `a. {a} b. {b}`; or ""."""
    run = re.search(r"(?<=[wo])[-h ]+$", first.shape)
    mark = first.text[run.start() :].strip() if run else ""
    return mark if mark in _LABEL_DASHES or (mark == "." and len(first.text.strip()) == 2) else ""


def edges(text: Literal) -> tuple[int, int]:
    """The lengths of the separators at both ends of a literal."""
    lead = re.match(r"[-:h \n]*", text.shape)[0]  # type: ignore[index]
    trail = re.search(r"[-:h \n]*$", text.shape)[0]  # type: ignore[index]
    return _without_list_mark(text[: len(lead)]), len(trail)
