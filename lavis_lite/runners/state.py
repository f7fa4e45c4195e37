"""What a run carries from step to step besides weights and moments; all of it fits into state.json."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

# A rank whose data takes this much of a step longer than the others' is worth a warning.
STRAGGLING = 0.2


def mix_seed(*parts: int | str) -> int:
    """A seed that depends on all parts and is unrelated for neighbouring ones, in [0, 2**63)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass
class Mean:
    """Running means of named values since the last reset; saved, so that a resumed run logs the same rows."""

    sums: dict[str, float] = field(default_factory=dict)
    count: int = 0

    def add(self, values: Mapping[str, float]) -> None:
        """Take in one step's values."""
        self.count += 1
        for key, value in values.items():
            self.sums[key] = self.sums.get(key, 0.0) + value

    def take(self) -> dict[str, float]:
        """The means, and a fresh start; empty when nothing was added."""
        means = {key: value / self.count for key, value in self.sums.items()} if self.count else {}
        self.sums, self.count = {}, 0
        return means


@dataclass
class TrainState:
    """Position and bookkeeping of a run.

    step: optimiser steps done. skipped: non-finite steps so far, and in a row up to now. elapsed_s: wall
    time of all the run's parts. best: {"metric", "mode", "value", "step"}. metrics: those of the newest evaluation,
    with its step in evaluated_step. started_from: the checkpoint that run.resume named, if it did.
    stream_places: where the readers of streams were, all ranks' (`TrainLoader.places`).
    data: what each dataset that is trained on held (`content_of`), by name; empty in older checkpoints.
    """

    step: int = 0
    skipped: int = 0
    skipped_in_row: int = 0
    elapsed_s: float = 0.0
    best: dict[str, Any] | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    evaluated_step: int | None = None
    scaler: dict[str, Any] = field(default_factory=dict)
    means: Mean = field(default_factory=Mean)
    num_threads: int = 1
    world_size: int = 1
    started_from: str | None = None
    stream_places: dict[str, tuple[int, ...]] = field(default_factory=dict)
    data: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain containers; a metric that is not finite becomes null, which JSON has."""
        content = asdict(self)
        content["metrics"] = {k: v if math.isfinite(v) else None for k, v in self.metrics.items()}
        return content

    def evaluation(self) -> dict[str, Any]:
        """The part of `to_dict` that an evaluation changes."""
        content = self.to_dict()
        return {key: content[key] for key in ("best", "metrics", "evaluated_step")}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> TrainState:
        """The state that `to_dict` described; keys of other versions are left out."""
        known = {f.name for f in fields(cls)}
        values = {key: value for key, value in content.items() if key in known}
        values["means"] = Mean(**values.get("means", {}))
        values["metrics"] = {k: math.nan if v is None else v for k, v in values.get("metrics", {}).items()}
        return cls(**values)


@dataclass
class Window:
    """The steps since the last logged row: how many, their seconds, and how many seconds waited for data."""

    steps: int = 0
    seconds: float = 0.0
    wait: float = 0.0


def straggling(waits: Sequence[float], step_s: float) -> str | None:
    """What to say of the rank that waits for data longer than the others by a fifth of a step; None where none does.

    waits: seconds a step of each rank. step_s: seconds of a step.
    """
    slowest = max(range(len(waits)), key=waits.__getitem__)
    others = (sum(waits) - waits[slowest]) / (len(waits) - 1)
    if waits[slowest] - others <= STRAGGLING * step_s:
        return None
    return (
        f"rank {slowest} waits {waits[slowest]:.2f} s a step for data, the others {others:.2f} s, of {step_s:.2f} s: "
        "all wait for its disk or workers"
    )


@dataclass(frozen=True)
class RunResult:
    """How a call of `Runner.train` ended.

    finished: the run has reached its length. checkpoint: its newest. metrics: of its last evaluation,
    named as in the log.
    """

    finished: bool
    step: int
    checkpoint: Path | None
    metrics: dict[str, float]
