"""Where the readers of a stream are, as a checkpoint has it, and what is left of an epoch for other numbers of them."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from lavis_lite.common import dist

logger = logging.getLogger(__name__)

_KEY = re.compile(r"(\d+)/(\d+)(?:-(\d+))?")


class Position(NamedTuple):
    """How far a reader is: the block that begins at sample `sample` of the `shard`-th of its shards, of which `taken`
    samples are handed out.
    """

    epoch: int = 0
    shard: int = 0
    sample: int = 0
    taken: int = 0


# Of each earlier number of readers, the first one first: where all of them were when it changed.
Past = tuple[tuple[Position, ...], ...]


def left_of_epoch(order: Sequence[int], epoch: int, past: Past) -> list[int]:
    """The shards of an epoch, in its order, that no earlier reader was through with."""
    left = list(order)
    for places in past:
        done: set[int] = set()
        for reader, place in enumerate(places):
            own = left[reader :: len(places)]
            done.update(own if place.epoch > epoch else own[: place.shard] if place.epoch == epoch else ())
        left = [shard for shard in left if shard not in done]
    return left


class StreamStart(NamedTuple):
    """Where the readers of a stream begin. now: by reader; those not in it begin at the beginning."""

    name: str
    readers: int
    past: Past = ()
    now: Mapping[int, Position] = {}

    def key(self, reader: int) -> str:
        """What a reader's place is kept under."""
        return _key(self.name, reader, self.readers, len(self.past))

    def kept(self, own: Iterable[int]) -> dict[str, Position]:
        """What a checkpoint must have besides what other ranks keep: the past, and the places of one's own readers."""
        before = {
            _key(self.name, reader, len(places), number): place
            for number, places in enumerate(self.past)
            for reader, place in enumerate(places)
        }
        return {**before, **{self.key(reader): self.now[reader] for reader in own if reader in self.now}}


def stream_start(name: str, readers: int, kept: Mapping[str, Sequence[int]]) -> StreamStart:
    """Where a stream goes on, by what all ranks kept.

    With another number of readers than before, what is left of the earliest epoch that any of them was in is dealt out
    anew, in whole shards.
    """
    generations = _generations(name, kept)
    if not generations:
        return StreamStart(name, readers)
    count, now = len(generations[-1]), dict(enumerate(generations[-1]))
    epoch = min(place.epoch for place in now.values())
    past = generations[:-1]
    if count != readers:
        if dist.is_main():
            logger.warning(
                "stream '%s' was read by %d ranks x loader workers and now is by %d: the shards that are left of its "
                "epoch %d are dealt out anew, those in work from their beginning",
                *(name, count, readers, epoch),
            )
        past, now = generations, {reader: Position(epoch) for reader in range(readers)}
    # What lies before this epoch takes nothing from it or later ones.
    past = [places for places in past if any(place >= (epoch, 1) for place in places)]
    return StreamStart(name, readers, tuple(past), now)


def begin_epoch_again(
    name: str, kept: Mapping[str, Sequence[int]]
) -> tuple[int, dict[str, tuple[int, ...]]] | None:
    """The earliest epoch that a reader of a stream is in, and what to keep for all to begin it; None for no stream."""
    generations = _generations(name, kept)
    if not generations:
        return None
    epoch = min(place.epoch for place in generations[-1])
    others = {key: tuple(place) for key, place in kept.items() if _parsed(name, key) is None}
    count = len(generations[-1])
    return epoch, {**others, **{_key(name, reader, count, 0): (epoch, 0, 0, 0) for reader in range(count)}}


def _generations(name: str, kept: Mapping[str, Sequence[int]]) -> list[tuple[Position, ...]]:
    """Of each number of readers that the stream had, the last one last: the places of all of them."""
    found: dict[int, dict[int, Position]] = {}
    counts: dict[int, int] = {}
    for key, place in kept.items():
        if parsed := _parsed(name, key):
            reader, counts[parsed[2]], number = parsed
            found.setdefault(number, {})[reader] = Position(*place)
    return [
        tuple(found[number].get(reader, Position()) for reader in range(counts[number]))
        for number in sorted(found)
    ]


def _key(name: str, reader: int, readers: int, number: int) -> str:
    return f"{name} {reader}/{readers}" + (f"-{number}" if number else "")


def _parsed(name: str, key: str) -> tuple[int, int, int] | None:
    """(reader, readers, how often their number had changed) of a key of this stream."""
    match = _KEY.fullmatch(key.removeprefix(f"{name} ")) if key.startswith(f"{name} ") else None
    return (int(match[1]), int(match[2]), int(match[3] or 0)) if match else None
