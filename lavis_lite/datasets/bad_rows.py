"""How many rows that can't be used are too many, and those that are known before any is read."""

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
