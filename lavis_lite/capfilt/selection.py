"""Which captions of a picture stay: the web's and the sampled ones compete by the ranker's score."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Origin = Literal["web", "synthetic"]
# Captions equal but for these are one.
_ENDS = " .!,;:"


@dataclass(frozen=True)
class Candidate:
    """A caption and where it is from."""

    text: str
    source: Origin


@dataclass(frozen=True)
class Scored:
    """A candidate with the ranker's score, rounded to six places."""

    text: str
    source: Origin
    score: float


def candidates(web: Iterable[str], synthetic: Iterable[str]) -> list[Candidate]:
    """The different captions of a picture, the web's first; those equal but for case, spaces and the last full stop
    count once, empty ones not at all."""
    found: dict[str, Candidate] = {}
    sources: tuple[tuple[Iterable[str], Origin], ...] = ((web, "web"), (synthetic, "synthetic"))
    for texts, source in sources:
        for text in texts:
            clean = " ".join(text.split())
            same = clean.lower().rstrip(_ENDS)
            if same:
                found.setdefault(same, Candidate(clean, source))
    return list(found.values())


def ranked(entries: Sequence[Candidate], scores: Sequence[float]) -> list[Scored]:
    """Best first; of equal scores the earlier candidate, so the web's."""
    scored = [Scored(c.text, c.source, round(s, 6)) for c, s in zip(entries, scores, strict=True)]
    order = sorted(range(len(scored)), key=lambda at: -scores[at])
    return [scored[at] for at in order]
