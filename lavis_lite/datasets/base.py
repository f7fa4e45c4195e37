"""What a dataset must offer the loaders and the evaluation."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from PIL import Image

# How many other rows are tried in place of an unreadable one before the batch is given up.
MAX_ATTEMPTS = 16


class UnreadableSample(Exception):
    """A row whose picture or caption can't be read: a fault of that row, not of the program.

    path: the file at fault. reason: what is wrong with it, in a few words.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@runtime_checkable
class Rows(Protocol):
    """Rows by number, all a loader asks for. Everything random in a row is a pure function of (index, seed).

    A dataset may declare what its rows are, which models and tasks then check before a run begins: `visual`, "image" or
    "video", and `texts`, "captions" or "questions" (with answers as `text_output`).
    """

    name: str

    def __len__(self) -> int: ...

    def load(self, index: int, *, seed: int) -> dict[str, Any]:
        """One processed row; raises UnreadableSample. Leaves torch's global generator as it was."""
        ...

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch of rows that `load` returned."""
        ...


@runtime_checkable
class KnowsProblems(Protocol):
    """Rows of which some are known to be unusable before they are read."""

    def problems(self) -> tuple[int, str | None]:
        """How many, and why one of them is."""
        ...


class MapDataset(Rows, Protocol):
    """What builders give: rows, and what evaluations and reports show of them."""

    def captions(self, index: int) -> list[str]:
        """All processed captions of a row; empty when they can't be read."""
        ...

    def image(self, index: int) -> Image.Image:
        """The row's picture in RGB, unprocessed; raises UnreadableSample."""
        ...
