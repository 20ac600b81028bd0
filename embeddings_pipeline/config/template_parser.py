"""From a template's text to its tree: columns, and the pairs of brackets, quotes, emphasis and tags around them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import takewhile

from embeddings_pipeline.config.template_literals import Literal, edges, label_end, literal, split
from embeddings_pipeline.config.template_tree import Column, Element, Group, Pair, Part, Sequence, Slot

_BRACKETS: dict[str, str] = {
    pair[0]: pair[1]
    for pair in [
        "()",
        "[]",
        "{}",
        "<>",
        "⟨⟩",
        "（）",
        "［］",
        "｛｝",
        "＜＞",
        "〔〕",
        "「」",
        "『』",
        "【】",
        "〈〉",
        "《》",
        "〖〗",
        "｢｣",
    ]
}
# Quotes as languages write them: what opens → what may close.
_QUOTES = {
    "„": '“”"',
    "‟": "”",
    "‚": "‘’'",
    "‛": "’",
    "“": "”",
    "‘": "’",
    "«": "»",
    "‹": "›",
    "〝": "〞〟",
    "¿": "?",
    "¡": "!",
}
# What opens may close as well, so that it opens only where a word may begin.
_EVEN = {"»": "«»", "›": "‹›", **{mark: mark for mark in "\"'”’״׳＂＇"}}
_CLOSING = {**_BRACKETS, **_QUOTES, **_EVEN}
_VOID_TAGS = {"area", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
_MODEL_SEPARATORS = {"[SEP]"}

_TAG_NAME = r"[A-Za-z][\w:.-]*"
_TOKEN = re.compile(
    rf"""(?P<brace>\{{\{{|\}}\}})
       | (?P<column>\{{[^{{}}]*\}})
       | (?P<end></{_TAG_NAME}\s*>)
       | (?P<tag><{_TAG_NAME}(?:\s(?:[^<>{{}}]|\{{[^{{}}]*\}})*)?/?>)
       | (?P<mark>\*+|_+|~~|`+|\|\||={{2,}})
       | (?P<char>.)""",
    re.VERBOSE | re.DOTALL,
)


def parse(template: str) -> Sequence:
    """The tree of a template. ValueError if a brace has no partner, or no column is named."""
    parser = _Parser(template)
    for token in parser.tokens():
        parser.take(token)
    sequence = parser.whole()
    if not sequence.slots:
        raise ValueError(f"template {template!r} needs at least one {{column}}, with a name in its braces")
    return sequence


@dataclass(frozen=True)
class _Token:
    kind: str  # a name of a group of _TOKEN
    text: str
    before: str  # the character before, "}" for a column; "" at the beginning
    after: str
    after_column: bool

    @property
    def after_word(self) -> bool:
        return self.after_column or self.before.isalnum()

    @property
    def after_space(self) -> bool:
        return self.before.isspace()

    @property
    def before_space(self) -> bool:
        return self.after.isspace() or not self.after

    @property
    def is_apostrophe(self) -> bool:
        return self.text in "'’" and self.after_word and self.after.isalpha()

    @property
    def opens(self) -> bool:
        """Whether a pair may begin here."""
        if self.text in _EVEN or self.kind == "mark":
            if self.after_word and not re.fullmatch(r"\*{2,}|_{2,}|~~", self.text):
                return False
            if self.kind == "mark" and not self.text.startswith("="):
                return not self.before_space
            return not self.before_space or (self.before in ("", "\n") and bool(self.after) and self.after != "\n")
        if self.text == "<":
            return not self.before_space
        return self.kind == "tag" or self.text in _CLOSING


@dataclass
class _Open:
    """What is not closed yet: what opened it, and what stands in it so far."""

    token: _Token | None = None
    items: list[Literal | Part] = field(default_factory=list)

    def closed_by(self, token: _Token) -> bool:
        if self.token is None or token.is_apostrophe:
            return False
        opening = self.token.text
        if self.token.kind == "tag":
            return token.kind == "end" and _tag_name(token.text) == _tag_name(opening)
        if self.token.kind == "mark" or opening in _EVEN:
            if not self.items:  # `""{title}""`: the second one opens, too
                return False
            closes = token.text == opening if self.token.kind == "mark" else token.text in _EVEN[opening]
            return closes and token.after_space == self.token.before_space
        if opening == "<":
            return token.text == ">" and not token.after_space and token.before not in "-="
        return token.kind in ("char", "brace") and token.text[0] in _CLOSING[opening]


class _Parser:
    def __init__(self, template: str) -> None:
        self.template = template
        self.stack = [_Open()]

    def tokens(self) -> Iterator[_Token]:
        after_column = False
        for match in _TOKEN.finditer(self.template):
            kind, text = str(match.lastgroup), match[0]
            if kind == "char" and text in "{}":
                raise ValueError(f"template {self.template!r} has a brace without its partner: write {{{{ for a brace")
            if text == "{}":
                raise ValueError(f"template {self.template!r} needs a name in the braces of each {{column}}")
            before = self.template[: match.start()][-1:]
            text = text[0] if kind == "brace" else text
            yield _Token(kind, text, before, self.template[match.end() : match.end() + 1], after_column)
            after_column = kind == "column"

    def take(self, token: _Token) -> None:
        """Add the next token to what is open."""
        if token.kind == "column":
            self.stack[-1].items.append(Column(token.text[1:-1]))
            return
        depth = next((n for n in reversed(range(len(self.stack))) if self.stack[n].closed_by(token)), None)
        if depth is not None:
            self._dissolve(depth + 1)
            self._close(self.stack.pop(), token.text)
        elif token.opens and not _is_alone(token):
            self.stack.append(_Open(token))
        else:
            self.stack[-1].items.append(_without_partner(token))

    def whole(self) -> Sequence:
        """All that was taken."""
        self._dissolve(1)
        return _sequence(self.stack[0].items)

    def _dissolve(self, depth: int) -> None:
        """What was opened from there on and never closed is no pair."""
        while len(self.stack) > depth:
            opened = self.stack.pop()
            assert opened.token is not None
            self.stack[-1].items += [_without_partner(opened.token), *opened.items]

    def _close(self, opened: _Open, closing: str) -> None:
        assert opened.token is not None
        items, opening = self.stack[-1].items, opened.token.text
        if opened.token.kind == "tag" and "{" in opening:
            items.append(Element(_tag_name(opening), _tag(opening), _sequence(opened.items), closing))
        elif all(isinstance(item, Literal) for item in opened.items):
            text = opening + "".join(item.text for item in opened.items if isinstance(item, Literal)) + closing
            items.append(literal(text, "\n" if text in _MODEL_SEPARATORS else "o"))
        elif opening == "[" and (group := _group(opened.items)):
            items.append(group)
        else:
            items.append(_pair(opening, opened.items, closing))


def _is_alone(token: _Token) -> bool:
    """A tag that nothing closes."""
    return token.kind == "tag" and (token.text.endswith("/>") or _tag_name(token.text) in _VOID_TAGS)


def _without_partner(token: _Token) -> Literal | Part:
    if token.kind in ("tag", "end"):
        return _tag(token.text) if "{" in token.text else literal(token.text, "\n")
    alone = token.after_space and token.before_space
    return literal(token.text, "-" if alone and token.text in "\"'»«›‹”’<>" else "")


def _tag_name(tag: str) -> str:
    return re.match(rf"</?({_TAG_NAME})", tag)[1].lower()  # type: ignore[index]


def _tag(tag: str) -> Pair:
    """A tag with columns in its attributes."""
    opening, attributes, closing = re.fullmatch(r"(<\S+\s+)(.*?)(\s*/?>)", tag, re.DOTALL).groups()  # type: ignore[union-attr]
    return Pair(opening, parse(attributes), closing)


def _pair(opening: str, items: list[Literal | Part], closing: str) -> Pair:
    """White space directly inside is the pair's own: `« {title} »`."""
    first, middle, last = _ends(items)
    left, right = len(first.text) - len(first.text.lstrip()), len(last.text.rstrip())
    inner = [first[left:], *middle, last[:right]]
    return Pair(opening + first.text[:left], _sequence(inner), last.text[right:] + closing)


def _group(items: list[Literal | Part]) -> Group | None:
    """A group, if white space is at one end within the brackets, or at both beside punctuation."""
    first, middle, last = _ends(items)
    left, right = edges(first)[0], len(last.text) - edges(last)[1]
    lead, trail = first.text[:left], last.text[right:]
    spaces = [any(map(str.isspace, end)) for end in (lead, trail)]
    if not any(spaces) or (all(spaces) and not (lead + trail).strip()):
        return None
    return Group(_sequence([first[left:], *middle, last[:right]]), lead, trail)


def _ends(items: list[Literal | Part]) -> tuple[Literal, list[Literal | Part], Literal]:
    """The literal before the first part, what is between, and the literal after the last part."""
    before = list(takewhile(lambda item: isinstance(item, Literal), items))
    after = list(takewhile(lambda item: isinstance(item, Literal), reversed(items)))[::-1]
    return _joined(before), items[len(before) : len(items) - len(after)], _joined(after)


def _joined(items: list[Literal | Part]) -> Literal:
    return sum((item for item in items if isinstance(item, Literal)), Literal())


def _sequence(items: list[Literal | Part]) -> Sequence:
    parts: list[Part] = []
    literals = [Literal()]
    for item in items:
        if isinstance(item, Literal):
            literals[-1] += item
        else:
            parts.append(item)
            literals.append(Literal())
    ending = label_end(literals[0])
    between = [
        _split(before, text, after, ending)
        for before, text, after in zip(parts[:-1], literals[1:-1], parts[1:], strict=True)
    ]
    separators = ["", *(separator for _, separator, _ in between)]
    labels = [literals[0].text, *(label for _, _, label in between)]
    units = [*(unit for unit, _, _ in between), literals[-1].text]
    return Sequence(tuple(map(Slot, parts, separators, labels, units)))


def _split(before: Part, text: Literal, after: Part, ending: str) -> tuple[str, str, str]:
    """A literal between two parts, of which a group separates itself at its ends: unit, separator, label."""
    lead, trail = edges(text)
    if isinstance(after, Group) and after.lead:
        end = len(text.text) - trail
        return text.text[:end], text.text[end:], ""
    if isinstance(before, Group) and before.trail:
        return "", text.text[:lead], text.text[lead:]
    return split(text, ending)
