"""A parsed template: columns, and what is there or not together with them."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain


@dataclass(frozen=True)
class Column:
    """The value of a column."""

    name: str

    def render(self, values: Mapping[str, str]) -> str:
        """The value; "" if it is empty."""
        return values[self.name]

    def needed(self) -> list[str]:
        """The columns without which a group around this is left out."""
        return [self.name]


@dataclass(frozen=True)
class Slot:
    """A part with what belongs to it."""

    part: "Part"
    separator: str  # stands between this part and an earlier one, if both are there
    label: str  # before the part
    unit: str  # after it


@dataclass(frozen=True)
class Sequence:
    """Parts one after the other."""

    slots: tuple[Slot, ...]

    @cached_property
    def _columns(self) -> tuple[str, ...]:
        """The columns, if there is nothing else."""
        names = [slot.part.name for slot in self.slots if isinstance(slot.part, Column)]
        return tuple(names) if len(names) == len(self.slots) else ()

    @cached_property
    def _literals(self) -> tuple[str, ...]:
        """What stands before each of those columns, and after the last, if all are there."""
        literals = [""]
        for number, slot in enumerate(self.slots):
            literals[-1] += (slot.separator if number else "") + slot.label
            literals.append(slot.unit)
        return tuple(literals)

    def render(self, values: Mapping[str, str]) -> str:
        """The parts that are there, with what belongs to them; "" if none is."""
        own = [values[name] for name in self._columns]
        if own and all(own):  # as most rows are
            first, *others = self._literals
            return first + "".join(chain.from_iterable(zip(own, others, strict=True)))
        text = separator = trail = ""
        beside = True  # the part before is there
        for slot in self.slots:
            separator = slot.separator or separator  # of those beside parts that are left out, the last one counts
            value = slot.part.render(values)
            if value:
                lead, next_trail = (slot.part.lead, slot.part.trail) if isinstance(slot.part, Group) else ("", "")
                between = trail + separator + lead if beside else lead or separator or trail
                text += (between if text else "") + slot.label + value + slot.unit
                separator, trail = "", next_trail
            beside = bool(value)
        return text

    def needed(self) -> list[str]:
        """The columns of all parts that are not groups themselves."""
        return [name for slot in self.slots for name in slot.part.needed()]


@dataclass(frozen=True)
class Pair:
    """Brackets, quotes, emphasis or a tag around columns: there if anything within is."""

    opening: str
    within: Sequence
    closing: str

    def render(self, values: Mapping[str, str]) -> str:
        """The whole pair, or ""."""
        text = self.within.render(values)
        return self.opening + text + self.closing if text else ""

    def needed(self) -> list[str]:
        """The columns in the pair."""
        return self.within.needed()


@dataclass(frozen=True)
class Element:
    """A pair of tags with columns in the attributes of the first: there if any attribute or anything within is."""

    name: str
    tag: Pair
    within: Sequence
    closing: str

    def render(self, values: Mapping[str, str]) -> str:
        """The whole element, or ""."""
        tag, text = self.tag.render(values), self.within.render(values)
        return (tag or f"<{self.name}>") + text + self.closing if tag or text else ""

    def needed(self) -> list[str]:
        """The columns of the attributes, and those within."""
        return self.tag.needed() + self.within.needed()


@dataclass(frozen=True)
class Group:
    """What the author grouped: there as a whole if each column in it has a value."""

    within: Sequence
    lead: str  # its separators at both ends
    trail: str

    def render(self, values: Mapping[str, str]) -> str:
        """The group without the separators at its ends, or ""."""
        return self.within.render(values) if all(values[name] for name in self.within.needed()) else ""

    def needed(self) -> list[str]:
        """None: a group within a group may be left out alone."""
        return []


Part = Column | Pair | Element | Group
