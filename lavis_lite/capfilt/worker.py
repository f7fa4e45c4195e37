"""One process of CapFilt: takes pieces of the input that nobody else works on, until all are done."""

from __future__ import annotations

import itertools
import json
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO

import torch
from PIL import Image
from torch import Tensor

from lavis_lite.capfilt.captioners import Captioner
from lavis_lite.capfilt.claims import Claim, Claims
from lavis_lite.capfilt.inputs import Inputs, Item
from lavis_lite.capfilt.output import ATTEMPTS, Output, PieceWriter, refused
from lavis_lite.capfilt.rankers import Ranker
from lavis_lite.capfilt.selection import candidates, ranked
from lavis_lite.capfilt.settings import Settings
from lavis_lite.capfilt.tally import Tally, added
from lavis_lite.common.errors import DataError
from lavis_lite.common.logging import duration, get_logger
from lavis_lite.common.signals import StopSignals
from lavis_lite.datasets.base import UnreadableSample
from lavis_lite.datasets.images import decode_image
from lavis_lite.datasets.order import seed_of

logger = get_logger(__name__)

DECODERS = 4  # threads, a batch ahead of the models
POLL_SECONDS = 1.0
# A piece that couldn't be read rests so long before anybody tries again: what was away may be back.
RETRY_SECONDS = 10.0
LINE_SECONDS = 10.0


class Stopped(Exception):
    """A signal asked this process to end."""


class Lost(Exception):
    """Another process took this one's piece over, taking it for dead."""


@dataclass(frozen=True)
class Job:
    """What all processes work on.

    batch_size: pictures at a time. max_bad_fraction: with more unreadable pictures among those seen, work stops.
    """

    settings: Settings
    inputs: Inputs
    output: Output
    batch_size: int = 16
    max_bad_fraction: float = 0.5

    @property
    def names(self) -> list[str]:
        """The names of the output's shards."""
        return [f"{number:06d}" for number in range(len(self.inputs))]


@dataclass
class Clock:
    """Seconds spent in a piece: captioning, ranking, and altogether."""

    captioning: float = 0.0
    ranking: float = 0.0
    total: float = 0.0


def uniform_draws(seed: int, key: str, texts: int, length: int) -> Tensor:
    """What decides the tokens of a picture's captions: float32[texts, length] in [0, 1), of (seed, key) alone."""
    generator = torch.Generator().manual_seed(seed_of(seed, *key.encode()))
    return torch.rand(texts, length, generator=generator)


class Worker:
    """Does pieces of a job; as many as one likes may do so at once, on machines that share the output's folder."""

    def __init__(
        self, job: Job, captioner: Captioner, ranker: Ranker, claims: Claims, signals: StopSignals
    ) -> None:
        self.job = job
        self.captioner = captioner
        self.ranker = ranker
        self.claims = claims
        self.signals = signals
        # Of what is done already too: a restart that meets a bad shard first must judge as one that didn't stop.
        done = added(
            Tally(**manifest["tally"]) for manifest in map(job.output.manifest, job.names) if manifest
        )
        self.seen, self.bad = done.pictures + done.unreadable, done.unreadable
        self._progress = _Progress(job)
        self._log = job.output.folder / "workers" / f"{claims.owner}.jsonl"

    def run(self) -> None:
        """Work until every piece is done or given up, by whomever; waits for others, to take over from those that die.

        Raises Stopped on a signal, DataError when the output can't be written or too much is unreadable.
        """
        left, is_over = dict(enumerate(self.job.names)), self.job.output.is_over
        waiting = False
        while left := {number: name for number, name in left.items() if not is_over(name)}:
            if not sum(self._try(number, name) for number, name in left.items()):
                if not waiting and any(not is_over(name) for name in left.values()):
                    logger.info(
                        "waiting for %d shards that other processes have, or to try them again", len(left)
                    )
                    waiting = True
                self._check_signals()
                time.sleep(POLL_SECONDS)

    def _rests(self, name: str) -> bool:
        """Whether somebody failed at a piece a moment ago."""
        try:
            failed = self.job.output.failure_path(name).stat().st_mtime
        except FileNotFoundError:
            return False
        return self.claims.now() - failed < RETRY_SECONDS

    def _try(self, number: int, name: str) -> bool:
        """Do a piece unless it is over, somebody has it, or it has just failed; whether it was tried here."""
        self._check_signals()
        is_over = self.job.output.is_over
        claim = None if is_over(name) or self._rests(name) else self.claims.take(name)
        if claim is None:
            return False
        try:
            if is_over(name) or self._rests(name):  # by the one who had it until a moment ago
                return False
            if claim.number > 1:
                logger.info("shard %s: taken over from a process that is gone", name)
                self.job.output.remove_leftovers(name)
            self._do(number, name, claim)
            self.claims.clear([name])
        except Lost:
            logger.warning("shard %s: another process took it over; leaving it", name)
        finally:
            claim.release()
        return True

    def _do(self, number: int, name: str, claim: Claim) -> None:
        clock, started = Clock(), time.monotonic()
        try:
            with self.job.output.piece(name) as writer:
                self._fill(writer, number, claim, clock)
                self._check_fraction(writer)
                if not claim.holds():
                    raise Lost
        except DataReadError as error:
            self._note_failure(name, number, claim, str(error))
            return
        except OSError as error:
            if not claim.holds():  # whoever took it over removed what was half written
                raise Lost from error
            raise refused(error, self.job.output.folder, self._progress.done()) from error
        clock.total = time.monotonic() - started
        self.seen += writer.tally.pictures + writer.tally.unreadable
        self.bad += writer.tally.unreadable
        self._note(name, writer, clock)

    def _note_failure(self, name: str, number: int, claim: Claim, reason: str) -> None:
        if not claim.holds():
            raise Lost
        try:
            source = self.job.inputs.name(number)
            failure = self.job.output.note_failure(name, source, reason.removeprefix(f"{source}: "))
        except OSError as error:
            raise refused(error, self.job.output.folder, self._progress.done()) from error
        then = "given up" if failure.final else "it is tried again"
        logger.warning("shard %s: %s; attempt %d of %d: %s", name, reason, failure.attempts, ATTEMPTS, then)

    def _fill(self, writer: PieceWriter, number: int, claim: Claim, clock: Clock) -> None:
        """Read a piece from its beginning and write its pictures with their captions."""
        piece = self.job.inputs.open(number)
        writer.source = self.job.inputs.name(number)
        for batch in decoded_batches(_reading(piece), self.job.batch_size):
            self._check_signals()
            claim.beat()
            if not claim.holds():
                raise Lost
            for item, found in batch:
                if isinstance(found, str):
                    writer.tally.add_unreadable(found)
                    logger.info("%s: %s", item.name, found)
            self._write(writer, [(item, found) for item, found in batch if not isinstance(found, str)], clock)
            self._progress.tell(self.job.names[number], writer)
        writer.damage = piece.damage
        if piece.damage:
            logger.warning("%s: %s; what came before is used", writer.source, piece.damage)

    def _write(self, writer: PieceWriter, batch: Sequence[tuple[Item, Image.Image]], clock: Clock) -> None:
        if not batch:
            return
        settings, pictures = self.job.settings, [picture for _, picture in batch]
        draws = [
            uniform_draws(settings.seed, item.key, settings.num_captions, settings.max_length)
            for item, _ in batch
        ]
        begun = time.monotonic()
        sampled = self.captioner.captions(pictures, torch.cat(draws))
        captioned = time.monotonic()
        entries = [candidates(item.captions, own) for (item, _), own in zip(batch, sampled, strict=True)]
        scores = self.ranker.scores(pictures, [[entry.text for entry in own] for own in entries])
        clock.captioning += captioned - begun
        clock.ranking += time.monotonic() - captioned
        for (item, picture), own, values in zip(batch, entries, scores, strict=True):
            if own:
                writer.add(item, picture, ranked(own, values), settings.keep)
            else:
                writer.tally.captionless += 1

    def _check_fraction(self, writer: PieceWriter) -> None:
        bad = self.bad + writer.tally.unreadable
        seen = self.seen + writer.tally.pictures + writer.tally.unreadable
        if bad > self.job.max_bad_fraction * seen:
            reason, count = max(writer.tally.reasons.items(), key=lambda entry: entry[1])
            raise DataError(
                f"{bad} of {seen} pictures can't be read ({count} in {writer.source}: {reason}); is the image folder "
                f"right? --max-bad-fraction is {self.job.max_bad_fraction}"
            )

    def _check_signals(self) -> None:
        if self.signals.received is not None:
            raise Stopped

    def _note(self, name: str, writer: PieceWriter, clock: Clock) -> None:
        """How fast a piece was, in this process's own file: the manifests are the same whoever made them."""
        row = {
            "shard": name,
            "pictures": writer.tally.pictures,
            "seconds": round(clock.total, 3),
            "captioning": round(clock.captioning, 3),
            "ranking": round(clock.ranking, 3),
        }
        self._log.parent.mkdir(exist_ok=True)
        with self._log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


class DataReadError(Exception):
    """A piece that can't be read now, as opposed to work that can't go on."""


def _reading(piece: Iterable[Item]) -> Iterator[Item]:
    try:
        yield from piece
    except DataError as error:
        raise DataReadError(str(error)) from error


# A picture, or why there is none.
Found = Image.Image | str


def decoded_batches(items: Iterable[Item], size: int) -> Iterator[list[tuple[Item, Found]]]:
    """Items with their pictures in RGB, `size` at a time and in order, decoded a batch ahead."""
    items = iter(items)
    with ThreadPoolExecutor(DECODERS) as pool:
        ahead = deque([[pool.submit(_decode, item) for item in itertools.islice(items, size)]])
        while ahead[0]:
            ahead.append([pool.submit(_decode, item) for item in itertools.islice(items, size)])
            yield [future.result() for future in ahead.popleft()]


def _decode(item: Item) -> tuple[Item, Found]:
    if item.content is None:
        return item, item.problem or "there is no picture"
    try:
        return item, decode_image(BytesIO(item.content), item.name)
    except UnreadableSample as error:
        return item, error.reason


class _Progress:
    """A line now and then: how far this process and all of them are, how fast, how long still."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.started = self._last = time.monotonic()
        self._at_start = self.done()
        self._pictures = 0
        self._shard = ""
        self._in_shard = 0

    def done(self) -> int:
        """The shards that are done, by whomever."""
        return sum(self.job.output.manifest_path(name).is_file() for name in self.job.names)

    def tell(self, name: str, writer: PieceWriter) -> None:
        """Say it, if it wasn't just said."""
        self._pictures += writer.tally.pictures - (self._in_shard if self._shard == name else 0)
        self._shard, self._in_shard = name, writer.tally.pictures
        now = time.monotonic()
        if now - self._last < LINE_SECONDS:
            return
        self._last, elapsed = now, now - self.started
        done, total = self.done(), len(self.job.inputs)
        own = done - self._at_start
        left = f", {duration(elapsed / own * (total - done))} left" if own else ""
        logger.info(
            "shard %s: %d pictures; %.2f pictures/s here; %d of %d shards done%s",
            *(name, writer.tally.pictures, self._pictures / elapsed, done, total, left),
        )
