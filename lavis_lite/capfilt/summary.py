"""What came of it, once all pieces are done: the annotations joined, the counts, a page with samples."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any, TypeVar

from matplotlib.figure import Figure

from lavis_lite.capfilt.claims import Claim, Claims
from lavis_lite.capfilt.inputs import Inputs
from lavis_lite.capfilt.output import Output
from lavis_lite.capfilt.tally import BINS, Tally, added
from lavis_lite.common.errors import DataError
from lavis_lite.common.io import atomic_file, atomic_write, remove_leftovers
from lavis_lite.common.logging import duration
from lavis_lite.datasets.base import UnreadableSample
from lavis_lite.datasets.images import decode_image
from lavis_lite.datasets.tar_members import read_member, samples_of
from lavis_lite.tasks.curves import COLOURS
from lavis_lite.tasks.examples import THUMBNAIL, jpeg
from lavis_lite.tasks.html import card, cards, data_uri, picture, section, table, tick, tiles
from lavis_lite.tasks.predictions import evenly
from lavis_lite.tasks.report import page

T = TypeVar("T")

NAME = "summary"
ANNOTATIONS, REPORT = "annotations.jsonl", "report.html"
WAIT_SECONDS = 0.2
SAMPLES = 24
REASONS = 10


@dataclass(frozen=True)
class Summary:
    """The whole job.

    shards: that were written. damaged: {input: why it was used in part only}. speed: pictures, seconds, captioning and
    ranking of all processes together, added up. unreadable: {input: why nothing of it could be used}.
    """

    shards: int
    damaged: dict[str, str]
    tally: Tally
    speed: dict[str, float]
    unreadable: dict[str, str] = field(default_factory=dict)

    @property
    def web_share(self) -> float:
        """Of the web's captions, the share that was kept."""
        return self.tally.web_kept / self.tally.web if self.tally.web else 0.0

    def lines(self) -> list[str]:
        """What the command prints at the end."""
        tally = self.tally
        said = [
            f"{tally.pictures} pictures with {tally.web_kept + tally.synthetic_kept} captions in {self.shards} shards"
        ]
        if tally.unreadable or tally.captionless:
            reasons = ", ".join(f"{count} {reason}" for reason, count in list(tally.reasons.items())[:3])
            said.append(
                f"left out: {tally.unreadable} unreadable ({reasons}), {tally.captionless} without any caption"
            )
        if self.damaged:
            said.append(
                f"damaged, used up to the damage: {', '.join(list(self.damaged)[:3])} ({len(self.damaged)} shards)"
            )
        if self.unreadable:
            said.append(
                f"could not be read and is missing: {', '.join(list(self.unreadable)[:3])} "
                f"({len(self.unreadable)} of {self.shards + len(self.unreadable)} shards)"
            )
        said.append(
            f"web captions kept: {tally.web_kept} of {tally.web} ({self.web_share:.1%}); "
            f"sampled ones: {tally.synthetic_kept} of {tally.synthetic}"
        )
        if self.speed["seconds"]:
            said.append(
                f"{self.speed['pictures'] / self.speed['seconds']:.2f} pictures/s per process "
                f"({duration(self.speed['seconds'])} in all: {self.speed['captioning'] / self.speed['seconds']:.0%} "
                f"captioning, {self.speed['ranking'] / self.speed['seconds']:.0%} ranking)"
            )
        return said


def finish(output: Output, names: Sequence[str], claims: Claims, inputs: Inputs) -> Summary:
    """Join, count and report what was done, unless another process does it now: then wait for that.

    names: of the output's shards, one for each piece of the inputs. Raises DataError when a shard vanished meanwhile.
    """
    # Reading all manifests takes long where there are many: only the one that makes the summary does.
    while (made := _made_before(output, names)) is None:
        claim = claims.take(NAME)
        if claim is None:
            time.sleep(WAIT_SECONDS)
            continue
        try:
            # By the one who had the claim until a moment ago.
            return _made_before(output, names) or _make(output, names, claims, claim, inputs)
        finally:
            claim.release()
    return made


def _make(output: Output, names: Sequence[str], claims: Claims, claim: Claim, inputs: Inputs) -> Summary:
    failures = output.failures(_beating(names, claim))
    manifests = _manifests(output, [name for name in names if name not in failures], claim)
    unreadable = {failure.source: failure.reason for failure in failures.values()}
    summary = _summary(manifests, unreadable, output.folder)
    if output.annotations:
        _join(output, list(manifests), claim)
    shown = _samples(manifests, output, inputs, claim)
    atomic_write(output.folder / REPORT, _page(summary, shown))
    atomic_write(_path(output), json.dumps(asdict(summary), indent=1) + "\n")
    remove_leftovers(output.folder)  # all is done: whoever wrote these is gone
    claims.clear({*names, NAME})
    return summary


def _beating(things: Iterable[T], claim: Claim) -> Iterator[T]:
    """Say, before each thing, that the claim's owner lives: there may be very many."""
    for thing in things:
        claim.beat()
        yield thing


def _path(output: Output) -> Path:
    return output.folder / f"{NAME}.json"


def given_up_before_summary(output: Output, names: Sequence[str]) -> list[str]:
    """The shards that the last summary already calls unreadable."""
    try:
        ended = _path(output).stat().st_mtime
    except FileNotFoundError:
        return []
    return [name for name in output.failures(names) if output.failure_path(name).stat().st_mtime <= ended]


def _made_before(output: Output, names: Sequence[str]) -> Summary | None:
    """The summary that another process made of the same shards a moment ago, or this one's forerunner did; None too
    where the annotations or the report that belong to it are gone."""
    wanted = [REPORT, *([ANNOTATIONS] if output.annotations else [])]
    path = _path(output)
    try:
        ended = path.stat().st_mtime
        if not all((output.folder / file).is_file() for file in wanted):
            return None
        if any(_told_at(output, name) > ended for name in names):
            return None
        about = json.loads(path.read_text(encoding="utf-8"))
        return Summary(**{**about, "tally": Tally(**about["tally"])})
    except (OSError, ValueError, TypeError):
        return None


def _told_at(output: Output, name: str) -> float:
    """When a shard was finished or given up."""
    paths = (output.manifest_path(name), output.failure_path(name))
    return max(path.stat().st_mtime for path in paths if path.exists())


def _manifests(output: Output, names: Sequence[str], claim: Claim) -> dict[str, dict[str, Any]]:
    found = {name: output.manifest(name) for name in _beating(names, claim)}
    gone = [name for name, manifest in found.items() if manifest is None]
    if gone:
        raise DataError(
            f"'{output.folder}': shard {gone[0]} vanished; give the same command again to make it anew"
        )
    return {name: manifest for name, manifest in found.items() if manifest is not None}


def _summary(manifests: Mapping[str, Mapping[str, Any]], unreadable: dict[str, str], folder: Path) -> Summary:
    tally = added(Tally(**manifest["tally"]) for manifest in manifests.values())
    damaged = {m["input"]: m["damage"] for m in manifests.values() if m["damage"]}
    speed = {"pictures": 0.0, "seconds": 0.0, "captioning": 0.0, "ranking": 0.0}
    for row in _worker_rows(folder / "workers"):
        for name in speed:
            speed[name] += row[name]
    speed = {name: round(value, 3) for name, value in speed.items()}
    return Summary(len(manifests), damaged, tally, speed, unreadable)


def _worker_rows(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except ValueError:  # a line that a kill cut short
                continue


def _join(output: Output, names: Sequence[str], claim: Claim) -> None:
    """All annotations in one file, in the order of the input."""
    with atomic_file(output.folder / ANNOTATIONS) as temporary, temporary.open("wb") as joined:
        for name in names:
            with (output.folder / f"{name}.jsonl").open("rb") as part:
                while block := part.read(1 << 20):
                    claim.beat()
                    joined.write(block)


# The page


def _page(summary: Summary, samples: Sequence[str]) -> str:
    """samples: cards of pictures."""
    tally = summary.tally
    kept = tally.web_kept + tally.synthetic_kept
    headline = [
        ("Pictures", f"{tally.pictures:,}", f"{tally.unreadable:,} unreadable ones left out"),
        ("Web captions kept", f"{summary.web_share:.1%}", f"{tally.web_kept:,} of {tally.web:,}"),
        ("Share of the kept", f"{tally.web_kept / max(1, kept):.1%}", "that the web wrote"),
        ("Only sampled captions", f"{tally.synthetic_only / max(1, tally.pictures):.1%}", "of the pictures"),
    ]
    drawing = data_uri(_histogram(tally.histograms), "svg+xml")
    body = [
        section("What was kept", tiles(headline)),
        section(
            "Scores",
            f'<div class="curves"><img src="{drawing}" alt="{escape(_in_words(tally.histograms))}"></div>',
            note=_in_words(tally.histograms),
        ),
    ]
    if tally.reasons:
        rows = [[reason, str(count)] for reason, count in list(tally.reasons.items())[:REASONS]]
        body.append(section("Left out", table(["reason", "pictures"], rows)))
    if summary.unreadable:
        rows = [[source, reason] for source, reason in list(summary.unreadable.items())[:REASONS]]
        body.append(section("Shards that could not be read", table(["shard", "reason"], rows)))
    if samples:
        note = "All candidates with their scores, best first; those kept are ticked."
        body.append(section("Samples", cards(samples), note=note))
    said = f"{summary.shards} shards, {tally.pictures:,} pictures, {kept:,} captions"
    return page("CapFilt", "CapFilt", said, body)


def _in_words(histograms: Mapping[str, Sequence[int]]) -> str:
    means = (f"{name}: mean {_mean(bins):.3f}" for name, bins in histograms.items() if any(bins))
    return f"Scores of captions by the ranker. {', '.join(means)}."


def _mean(bins: Sequence[int]) -> float:
    return sum(count * ((at + 0.5) / BINS * 2 - 1) for at, count in enumerate(bins)) / sum(bins)


def _histogram(histograms: Mapping[str, Sequence[int]]) -> bytes:
    """An SVG: densities of scores of the web's captions, the sampled ones, and those kept."""
    figure = Figure(figsize=(8, 2.8), layout="constrained")
    axes = figure.subplots()
    edges = [at / BINS * 2 - 1 for at in range(BINS + 1)]
    used = [at for bins in histograms.values() for at, count in enumerate(bins) if count]
    for (name, bins), colour in zip(histograms.items(), COLOURS, strict=False):
        if total := sum(bins):
            shares = [count / total for count in bins]
            axes.stairs(
                shares,
                edges,
                color=colour,
                label=name,
                fill=name == "kept",
                alpha=0.35 if name == "kept" else 1,
            )
    if used:
        axes.set_xlim(edges[max(0, min(used) - 1)], edges[min(BINS, max(used) + 2)])
        axes.legend(frameon=False)
    axes.set_xlabel("score")
    axes.set_ylabel("share of captions")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _samples(
    manifests: Mapping[str, Mapping[str, Any]], output: Output, inputs: Inputs, claim: Claim
) -> list[str]:
    """Cards of a few pictures, read from the output, or from the input where the output has none in it."""
    found = [
        (name, example) for name, manifest in manifests.items() for example in manifest["tally"]["examples"]
    ]
    made = []
    for name, example in _beating(evenly(found, SAMPLES), claim):
        key = example["key"]
        content = (
            _picture_in(output.folder / f"{name}.tar", key)
            if output.tars
            else _picture_of(inputs, int(name), key)
        )
        if content is None:  # it was removed meanwhile
            continue
        try:
            shown = decode_image(io.BytesIO(content), key)
        except UnreadableSample:
            continue
        shown.thumbnail((THUMBNAIL, THUMBNAIL))
        made.append(card(picture(jpeg(shown), key), _candidates(example)))
    return made


def _picture_in(tar: Path, key: str) -> bytes | None:
    """A picture of a shard: one of its first, which examples are; of several samples with the key the first's."""
    try:
        found = next((sample for sample in samples_of(tar) if sample.key == key), None)
        return read_member(found.members["jpg"]) if found and "jpg" in found.members else None
    except (UnreadableSample, OSError):
        return None


def _picture_of(inputs: Inputs, number: int, key: str) -> bytes | None:
    """A picture of a piece of the input: one of its first."""
    try:
        return next((item.content for item in inputs.open(number) if item.key == key), None)
    except DataError:
        return None


def _candidates(example: Mapping[str, Any]) -> str:
    lines = []
    for place, entry in enumerate(example["candidates"]):
        kept = place < example["kept"]
        source = "" if entry["source"] == "synthetic" else " <strong>web</strong>"
        lines.append(
            f'<li class="{"right" if kept else "wrong"}">{tick(kept)}{escape(entry["text"])} '
            f'<span class="note">{entry["score"]:.3f}</span>{source}</li>'
        )
    return f"<ol>{''.join(lines)}</ol>"
