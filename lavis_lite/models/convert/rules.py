"""Maps of names from one kind of checkpoint to ours and back, written once and applied tensor by tensor.

A template is a name with places: `{n}` is a block's number, `{rest}` anything, and `{weight|bias}` stands for one
template with each of the words (the same one on both sides of a rule).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lavis_lite.common.errors import CheckpointError
from lavis_lite.common.tensor_reader import TensorStore, first_of

# How a tensor comes from a rule's other side: a function of all its tensors, or the one of that number unchanged.
Make = Callable[..., Tensor] | int
Direction = Literal["read", "write"]  # theirs -> ours, ours -> theirs
_PLACES = {"n": r"(?P<n>\d+)", "rest": r"(?P<rest>.+)"}


@dataclass(frozen=True)
class Rule:
    """Tensors of theirs that are tensors of ours.

    theirs, ours: templates.
    read: how each of ours is made of theirs. Empty: nothing is read, theirs holds again what ours has once, and may
        be absent.
    write: how each of theirs is made of ours.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    read: tuple[Make, ...] = (0,)
    write: tuple[Make, ...] = (0,)

    @property
    def repeats(self) -> bool:
        """Whether theirs holds nothing that ours doesn't have from another rule."""
        return self.read == ()

    def side(self, direction: Direction) -> tuple[str, ...]:
        """The templates of what is read in this direction."""
        return self.theirs if direction == "read" else self.ours


@dataclass(frozen=True)
class Group:
    """Rules whose tensors are in a checkpoint all together, for every block, or not at all.

    name: for messages. required: whether a checkpoint must have them.
    every_block: numbers begin at 0 and leave none out; cross-attention is in some blocks only.
    marker: only if a tensor of this rule is there, the group is; needed where another group has the same names.
    """

    name: str
    rules: tuple[Rule, ...]
    required: bool = False
    every_block: bool = True
    marker: Rule | None = None


@dataclass(frozen=True)
class Layout:
    """How one kind of checkpoint names its tensors.

    name: for messages. family: what `lavis-lite convert --to` calls it.
    llm: the language model's family that its names tell, if they tell one.
    marker: a regular expression; a checkpoint is of this kind if it fully matches some name.
    dropped: regular expressions of names of theirs that have no place with us.
    unwritten: regular expressions of names of ours that have no place there.
    absent: regular expressions of names of ours that such a checkpoint never has: a model keeps its own.
    """

    name: str
    family: str
    llm: str | None
    marker: str
    groups: tuple[Group, ...]
    dropped: tuple[str, ...] = ()
    unwritten: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()


def renamed(theirs: str, ours: str) -> tuple[Rule, ...]:
    """The rules of a pair of templates, one for each choice of words."""
    return tuple(Rule((a,), (b,)) for a, b in _choices((theirs, ours)))


def _choices(templates: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    found = next((m for t in templates if (m := re.search(r"\{([^{}]*\|[^{}]*)\}", t))), None)
    if found is None:
        yield templates
        return
    for word in found[1].split("|"):
        yield from _choices(tuple(template.replace(found[0], word) for template in templates))


@dataclass(frozen=True)
class _Piece:
    """One tensor of the result and what it is made of."""

    sources: tuple[str, ...]
    make: Make

    def made(self, tensors: Callable[[str], Tensor]) -> Tensor:
        """The tensor from its sources, which `tensors` gives by name."""
        if isinstance(self.make, int):
            return tensors(self.sources[self.make])
        return self.make(*map(tensors, self.sources))


class Renamed(TensorStore):
    """A checkpoint under other names; nothing is read before it is asked for.

    left_out: names of the source that have no place in the result, by declaration.

    Raises CheckpointError naming the keys that the layout doesn't know or that are missing.
    """

    def __init__(self, source: TensorStore, layout: Layout, direction: Direction, *, where: str) -> None:
        self.source = source
        self.layout = layout
        self.metadata = source.metadata
        plan = _Plan(source, layout, direction)
        self.left_out = tuple(dict.fromkeys(plan.left_out))  # two rules may name the same
        self._pieces = plan.pieces
        if plan.problems:
            verb = "read as" if direction == "read" else "can't be written as"
            raise CheckpointError(f"{where}, {verb} {layout.name}: {'; '.join(plan.problems)}")

    def __getitem__(self, name: str) -> Tensor:
        return self._pieces[name].made(self.source.__getitem__)

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)

    def spec(self, name: str) -> Tensor:
        """Shape and element type, worked out on the meta device."""
        return self._pieces[name].made(self.source.spec)

    def owner(self, name: str) -> Hashable:
        """The source's owner of a tensor that is unchanged, else the name itself."""
        piece = self._pieces[name]
        return (
            self.source.owner(piece.sources[piece.make]) if isinstance(piece.make, int) else (id(self), name)
        )


class _Plan:
    """Which names become which, worked out from the names alone."""

    def __init__(self, names: Iterable[str], layout: Layout, direction: Direction) -> None:
        self.direction = direction
        self.names = list(names)
        self.pieces: dict[str, _Piece] = {}
        self.left_out: list[str] = []
        self.problems: list[str] = []
        known: set[str] = set()
        for group in layout.groups:
            known |= self._add(group)
        dropped = layout.dropped if direction == "read" else layout.unwritten
        others = [name for name in self.names if name not in known]
        self.left_out += [name for name in others if any(re.fullmatch(p, name) for p in dropped)]
        unknown = [name for name in others if name not in self.left_out]
        if unknown:
            what = "unknown keys" if direction == "read" else "keys without a place there"
            self.problems.append(f"{len(unknown)} {what}: {first_of(unknown)}")

    def _add(self, group: Group) -> set[str]:
        """Take up a group's tensors; the names that it accounts for."""
        if group.marker and not any(self._found(t) for t in group.marker.side(self.direction)):
            return set()
        carried = [rule for rule in group.rules if not rule.repeats]
        found = {t: self._found(t) for rule in group.rules for t in rule.side(self.direction)}
        missing = self._missing(group, {t: found[t] for r in carried for t in r.side(self.direction)})
        if missing:
            self.problems.append(f"{len(missing)} missing keys of {group.name}: {first_of(missing)}")
        for rule in group.rules:
            sides = [found[template] for template in rule.side(self.direction)]
            for place in sides[0]:
                if all(place in side for side in sides):
                    self._apply(rule, place)
        return {name for places in found.values() for name in places.values()}

    def _apply(self, rule: Rule, place: str) -> None:
        sources, targets, makes = rule.theirs, rule.ours, rule.read
        if self.direction == "write":
            sources, targets, makes = rule.ours, rule.theirs, rule.write
        names = tuple(_fill(template, place) for template in sources)
        for target, make in zip(targets, makes, strict=not rule.repeats):
            # Of two rules for one name the first holds.
            self.pieces.setdefault(_fill(target, place), _Piece(names, make))
        if rule.repeats and self.direction == "read":
            self.left_out += names

    def _found(self, template: str) -> dict[str, str]:
        """The names of a template by what stands in its place."""
        pattern = _pattern(template)
        matches = ((pattern.fullmatch(name), name) for name in self.names)
        return {(match[1] if pattern.groups else ""): name for match, name in matches if match}

    @staticmethod
    def _missing(group: Group, found: dict[str, dict[str, str]]) -> list[str]:
        if not group.required and not any(found.values()):
            return []
        numbers = {int(n) for template, at in found.items() if "{n}" in template for n in at}
        if group.every_block:
            numbers = set(range(max(numbers, default=0) + 1))
        missing = []
        for template, at in found.items():
            if "{n}" in template:
                absent = [str(n) for n in sorted(numbers) if str(n) not in at]
            else:
                absent = [""] if not at and "{rest}" not in template else []
            missing += [_fill(template, place) for place in absent]
        return missing


def _pattern(template: str) -> re.Pattern[str]:
    parts = re.split(r"\{(n|rest)\}", template)
    return re.compile("".join(_PLACES[x] if i % 2 else re.escape(x) for i, x in enumerate(parts)))


def _fill(template: str, place: str) -> str:
    return template.replace("{n}", place).replace("{rest}", place)
