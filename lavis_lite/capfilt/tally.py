"""What is counted of a piece of work, so that the whole can be told by adding up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from lavis_lite.capfilt.selection import Scored

# Scores are cosines or probabilities: bins of 0.02 from -1 to 1.
BINS = 100
EXAMPLES = 2


def bin_of(score: float) -> int:
    """The bin of a score in [-1, 1]."""
    return max(0, min(BINS - 1, int((score + 1) / 2 * BINS)))


@dataclass
class Tally:
    """Counts of pictures and captions; adds up with `+`.

    pictures: that were read and written. unreadable: left out. captionless: left out, with no caption at all.
    with_web: had a caption from the web. web, synthetic: different captions; web_kept, synthetic_kept: of them.
    web_only, synthetic_only: pictures that kept captions of one kind.
    histograms: of all scores by source, of those kept: counts in BINS bins from -1 to 1.
    reasons: why pictures are unreadable, with how often. examples: a few pictures with all their candidates.
    """

    pictures: int = 0
    unreadable: int = 0
    captionless: int = 0
    with_web: int = 0
    web: int = 0
    synthetic: int = 0
    web_kept: int = 0
    synthetic_kept: int = 0
    web_only: int = 0
    synthetic_only: int = 0
    histograms: dict[str, list[int]] = field(
        default_factory=lambda: {name: [0] * BINS for name in ("web", "synthetic", "kept")}
    )
    reasons: dict[str, int] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)

    def add(self, key: str, scored: Sequence[Scored], kept: Sequence[Scored]) -> None:
        """Count a picture with its candidates, best first."""
        sources = Counter(entry.source for entry in scored)
        stay = Counter(entry.source for entry in kept)
        self.pictures += 1
        self.with_web += bool(sources["web"])
        self.web += sources["web"]
        self.synthetic += sources["synthetic"]
        self.web_kept += stay["web"]
        self.synthetic_kept += stay["synthetic"]
        self.web_only += not stay["synthetic"]
        self.synthetic_only += not stay["web"]
        for entry in scored:
            self.histograms[entry.source][bin_of(entry.score)] += 1
        for entry in kept:
            self.histograms["kept"][bin_of(entry.score)] += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(
                {"key": key, "kept": len(kept), "candidates": [asdict(entry) for entry in scored]}
            )

    def add_unreadable(self, reason: str) -> None:
        """Count a picture that is left out."""
        self.unreadable += 1
        self.reasons[reason] = self.reasons.get(reason, 0) + 1

    def __add__(self, other: Tally) -> Tally:
        """The counts of both; no examples, which belong to a shard."""
        total = Tally()
        for entry in fields(Tally):
            mine, yours = getattr(self, entry.name), getattr(other, entry.name)
            if isinstance(mine, int):
                setattr(total, entry.name, mine + yours)
        for name, bins in total.histograms.items():
            bins[:] = [a + b for a, b in zip(self.histograms[name], other.histograms[name], strict=True)]
        total.reasons = dict((Counter(self.reasons) + Counter(other.reasons)).most_common())
        return total


def added(tallies: Iterable[Tally]) -> Tally:
    """The sum of all."""
    return sum(tallies, Tally())
