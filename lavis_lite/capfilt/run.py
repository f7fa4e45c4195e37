"""`lavis-lite capfilt`, from the command's arguments to the last shard."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lavis_lite.capfilt.captioners import build_captioner
from lavis_lite.capfilt.claims import Claims
from lavis_lite.capfilt.inputs import ImageFolder, Inputs, TarShards
from lavis_lite.capfilt.output import Output, refused
from lavis_lite.capfilt.rankers import build_ranker
from lavis_lite.capfilt.settings import Settings, differences
from lavis_lite.capfilt.summary import finish, given_up_before_summary
from lavis_lite.capfilt.weights import weights_of
from lavis_lite.capfilt.worker import Job, Stopped, Worker
from lavis_lite.common.device import choose_device, choose_precision
from lavis_lite.common.errors import ConfigError, DataError
from lavis_lite.common.io import atomic_write
from lavis_lite.common.logging import get_logger
from lavis_lite.common.signals import StopSignals

logger = get_logger(__name__)

SETTINGS = "settings"
SHARD_SIZE = 1000
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Place:
    """Where pictures come from, where captions go, and on what: the command's other arguments.

    images and annotations, or shards; see `ImageFolder` and `TarShards`. shard_size: of images; None: SHARD_SIZE.
    no_tars: annotations.jsonl alone.
    skip_unreadable_shards: shards that can't be read are no failure, and those given up are not tried again.
    """

    out: str
    images: str | None = None
    shards: str | None = None
    annotations: str | None = None
    image: str | None = None
    caption_field: str | None = None
    group_by_image: bool = False
    shard_size: int | None = None
    no_tars: bool = False
    batch_size: int = 16
    device: str = "auto"
    precision: str = "auto"
    max_bad_fraction: float = 0.5
    stale_after: float = 600.0
    skip_unreadable_shards: bool = False

    def check(self) -> None:
        """Raise ConfigError for arguments that don't go together."""
        if self.shards is not None:
            for name in ("annotations", "no_tars", "group_by_image", "shard_size"):
                given = getattr(self, name)
                if given is not None and given is not False:  # 0 is given, too
                    raise ConfigError(f"--{name.replace('_', '-')} goes with --images, not with --shards")
        elif self.image is not None:
            raise ConfigError("--image goes with --shards, not with --images")
        if self.batch_size < 1:
            raise ConfigError(f"--batch-size must be at least 1, got {self.batch_size}")

    def inputs(self) -> Inputs:
        """What is to be read."""
        if self.shards is not None:
            return TarShards(self.shards, image=self.image, caption_field=self.caption_field)
        return ImageFolder(
            Path(self.images or ".").expanduser(),
            Path(self.annotations).expanduser() if self.annotations else None,
            shard_size=SHARD_SIZE if self.shard_size is None else self.shard_size,
            caption_field=self.caption_field,
            group_by_image=self.group_by_image,
        )

    def output(self) -> Output:
        """What is to be written."""
        folder = Path(self.out).expanduser()
        return Output(folder, tars=not self.no_tars, annotations=self.images is not None)


def run_capfilt(settings: Settings, place: Place) -> None:
    """Do what is left of a job together with whoever else does, and print what came of it.

    Raises ConfigError: another job's folder; DataError: input that can't be read (some shards: after all else is done
    and told), output that can't be written; and what building the models raises.
    """
    place.check()
    inputs, output = place.inputs(), place.output()
    try:
        claims = Claims(output.folder / "claims", stale_after=place.stale_after)
        _agree(settings, inputs, output, claims)
        job = Job(settings, inputs, output, place.batch_size, place.max_bad_fraction)
        if not place.skip_unreadable_shards:
            _try_again(job)
    except OSError as error:
        raise refused(error, output.folder, 0) from error
    if not all(map(output.is_over, job.names)):
        _work(job, place, claims)
    try:
        summary = finish(output, job.names, claims, inputs)
    except OSError as error:
        raise refused(error, output.folder, len(job.names)) from error
    if os.environ.get("RANK", "0") == "0":  # under torchrun one process tells it
        print("\n".join([*summary.lines(), f"report: {output.folder / 'report.html'}"]))
        if summary.unreadable and not place.skip_unreadable_shards:
            source, reason = next(iter(summary.unreadable.items()))
            raise DataError(
                f"{len(summary.unreadable)} of {len(job.names)} shards could not be read, for example {source}: "
                f"{reason}; give the same command again to try those again, or with --skip-unreadable-shards to do "
                "without them"
            )


def _try_again(job: Job) -> None:
    """Where all else is done, what was given up is all there is to do: this is a later call, and it may be repaired.

    What was given up after the last summary is left alone: this process is only late, and the others tried just now.
    """
    if all(map(job.output.is_over, job.names)):
        for name in given_up_before_summary(job.output, job.names):
            job.output.forget_failure(name)


def _work(job: Job, place: Place, claims: Claims) -> None:
    device = choose_device(place.device, where="--device")
    precision = choose_precision(place.precision, device)
    captioner = build_captioner(job.settings, device, precision)
    ranker = build_ranker(job.settings, device, precision)
    with StopSignals() as signals:
        worker = Worker(job, captioner, ranker, claims, signals)
        try:
            worker.run()
        except Stopped:
            logger.info("stopped by a signal; the same command goes on from here")
            if signals.received == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise SystemExit(0) from None


def _agree(settings: Settings, inputs: Inputs, output: Output, claims: Claims) -> None:
    """Write down what is asked of a new folder; ConfigError when it was something else before."""
    path = output.folder / f"{SETTINGS}.json"
    mine: dict[str, Any] = {
        "settings": asdict(settings),
        "inputs": inputs.about,
        "files": {"tars": output.tars, "annotations": output.annotations},
        "weights": weights_of(settings),
    }
    while not path.is_file():
        claim = claims.take(SETTINGS)
        if claim is None:
            time.sleep(POLL_SECONDS)
            continue
        try:
            if not path.is_file():  # by the one who had the claim until a moment ago
                atomic_write(path, json.dumps(mine, indent=1) + "\n")
        finally:
            claims.clear([SETTINGS])
    before = json.loads(path.read_text(encoding="utf-8"))
    changed = differences(settings, before.get("settings", {}))
    if not changed:
        changed = _other_weights(mine["weights"], before.get("weights", {}))
    if not changed and before.get("inputs") != mine["inputs"]:
        changed = "the input is another"
    if not changed and before.get("files") != mine["files"]:
        changed = "--no-tars was given or not given before"
    if changed:
        raise ConfigError(f"--out '{output.folder}' holds another job: {changed}; choose another folder")


def _other_weights(now: Mapping[str, str | None], before: Mapping[str, str | None]) -> str:
    """Which models' weights differ, in words; weights that were or are not here say nothing."""
    roles = [role for role in now if now[role] and before.get(role) and now[role] != before[role]]
    return ", ".join(f"the {role}'s weights are others than they were" for role in roles)
