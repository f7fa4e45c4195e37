"""How many rows that can't be used are too many: counted while they are read, or known before."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

from lavis_lite.common.errors import DataError
from lavis_lite.datasets.base import KnowsProblems

logger = logging.getLogger(__name__)


def surely_above(limit: float, bad: int, reads: int) -> bool:
    """Whether failed reads are a larger fraction of all than `limit`, by three standard deviations; at 0, one is."""
    sure = bad if limit == 0 else bad - 3 * math.sqrt(bad)
    return sure > limit * reads


class ReadCounter:
    """Counts reads and failed reads, logs each bad file once, and stops a run that has too many.

    The limit is a fraction of all reads. A few failures among the first reads prove nothing, so the run stops
    once the fraction is above the limit by three standard deviations: after 10 reads when every file is
    missing, after about 1,000 when 2.5% are and 1% is allowed. With a limit of 0 the first failure stops it.
    """

    def __init__(self, max_bad_fraction: float, what: str = "replaced by another row") -> None:
        self.max_bad_fraction = max_bad_fraction
        self.what = what
        self.good = 0
        self.bad = 0
        self._paths: set[str] = set()

    def restart(self) -> None:
        """Begin a new pass: reads count from 0, files already logged stay so."""
        self.good = self.bad = 0

    def count(self, good: int, failures: Sequence[tuple[str, str]]) -> None:
        """Add one batch's reads, failed ones as (path, reason); raises DataError when too many have failed."""
        self.good += good
        self.bad += len(failures)
        for path, reason in failures:
            if path not in self._paths:
                self._paths.add(path)
                logger.warning("unreadable, %s: %s: %s", self.what, path, reason)
        if failures and self.exceeded():
            self.stop(*failures[0])

    def exceeded(self) -> bool:
        """Whether the fraction of failed reads is surely above the limit."""
        return surely_above(self.max_bad_fraction, self.bad, self.good + self.bad)

    def stop(self, path: str, reason: str) -> None:
        """Raise the error that names one of the bad files."""
        raise DataError(
            f"{self.bad} of {self.good + self.bad} reads failed, more than run.max_bad_fraction="
            f"{self.max_bad_fraction:g} allows, for example {path}: {reason}; "
            "check the dataset's `images` folder and files, or raise run.max_bad_fraction"
        )


def check_known(datasets: Sequence[Any], weights: Sequence[float], limit: float, *, told: bool) -> None:
    """Warn (told) of rows that are known to be unusable: captionless ones, or without a picture, for example.

    weights: how often each dataset is drawn; one that never is isn't told of. Raises DataError, which names the dataset
    that most of them come from, when so many would surely exceed `run.max_bad_fraction` (limit) within as many reads as
    there are rows.
    """
    reads = sum(map(len, datasets))
    found: list[tuple[float, str]] = []  # failed reads of each dataset, and what to tell of it
    for dataset, weight in zip(datasets, weights, strict=True):
        bad, reason = dataset.problems() if isinstance(dataset, KnowsProblems) else (0, None)
        if bad and weight:
            share = bad / len(dataset)
            line = (
                f"dataset '{dataset.name}': {bad:,} of {len(dataset):,} rows ({share:.1%}) can't be used, for example "
                f"{reason}"
            )
            found.append((reads * share * weight / sum(weights), line))
    if found and surely_above(limit, round(sum(failing for failing, _ in found)), reads):
        raise DataError(
            f"{max(found)[1]}; run.max_bad_fraction={limit:g} allows fewer: look at the files and the dataset's "
            "`fields`, or raise it"
        )
    for _, line in found if told else []:
        logger.warning("%s; others replace them", line)
