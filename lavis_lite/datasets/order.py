"""The order of samples as arithmetic: which dataset, which row, which seed, each a pure function of a few
integers.

Nothing is stored, so any position of an endless stream can be asked for at once, and a resumed run needs no
state.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Words = NDArray[np.uint64]

# Permutations up to this length are drawn exactly (256 kB each); longer ones are computed position by
# position.
TABLE_LENGTH = 1 << 15
ROUNDS = 6
_WORD = (1 << 64) - 1
# Separates the uses of one seed from each other.
ORDER, AUGMENT, REPLACE, MIX = range(1, 5)
# Of stored features: what a view looks like, and which one is drawn.
VIEW, CHOICE = 11, 12


def _scramble(words: Words) -> Words:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): a bijection in which each bit moves half of
    all.
    """
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def hashed(*numbers: int | NDArray[Any]) -> Words:
    """64 well-mixed bits for each tuple of integers; arrays are taken element by element."""
    state: Words = np.zeros((1,), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for number in numbers:
            if isinstance(number, int):
                number = np.array([number % (1 << 64)], dtype=np.uint64)
            state = _scramble(state ^ number.astype(np.uint64))
    return state


def seed_of(*numbers: int) -> int:
    """A seed in 0..2^63-1 from a tuple of integers: the upper 63 bits of `hashed`, a hundred times as fast
    for one.
    """
    state = 0
    for number in numbers:
        state = ((state ^ number) + 0x9E3779B97F4A7C15) & _WORD
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _WORD
        state ^= state >> 31
    return state >> 1


def permuted(positions: NDArray[np.int64], length: int, key: int) -> NDArray[np.int64]:
    """Where a random permutation of 0..length-1, chosen by `key`, sends `positions`."""
    if length <= TABLE_LENGTH:
        return _table(length, key)[positions]
    return _feistel(positions.astype(np.uint64), length, key).astype(np.int64)


@functools.lru_cache(maxsize=16)
def _table(length: int, key: int) -> NDArray[np.int64]:
    table: NDArray[np.int64] = torch.randperm(
        length, generator=torch.Generator().manual_seed(key >> 1)
    ).numpy()
    return table


def _feistel(words: Words, length: int, key: int) -> Words:
    """A keyed bijection of 0..4^h-1 >= length, walked until it lands below `length`: memory doesn't grow with
    it.
    """
    half = np.uint64(((length - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << int(half)) - 1)
    keys = [int(hashed(key, number)[0]) for number in range(ROUNDS)]
    result = words.copy()
    outside = np.ones(words.shape, dtype=bool)
    while outside.any():
        left, right = result[outside] >> half, result[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (hashed(round_key, right) & mask)
        result[outside] = (left << half) | right
        outside = result >= np.uint64(length)
    return result


class RowStream:
    """The endless stream of one dataset's global batches.

    Every epoch is a permutation of all rows, of which the last `length % global_batch` are left out: no batch
    spans two epochs, and another epoch leaves out other rows. A dataset with fewer rows than a batch starts
    its next permutation within the batch instead.
    """

    def __init__(self, length: int, *, global_batch: int, seed: int) -> None:
        self.length = length
        self.global_batch = global_batch
        self.seed = seed
        self.batches_per_epoch = max(1, length // global_batch)
        self._epoch_rows = self.batches_per_epoch * global_batch if length >= global_batch else length

    def rows(self, batch: int, part: range) -> tuple[list[int], list[int]]:
        """Epochs and row numbers of the positions `part` of global batch number `batch`."""
        positions = batch * self.global_batch + np.arange(part.start, part.stop, dtype=np.int64)
        epochs, offsets = np.divmod(positions, self._epoch_rows)
        rows = np.empty_like(offsets)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = permuted(offsets[here], self.length, int(hashed(self.seed, ORDER, int(epoch))[0]))
        return epochs.tolist(), rows.tolist()


def mixed(weights: Sequence[float], *, seed: int, start: int = 0) -> Iterator[tuple[int, int]]:
    """For each batch from number `start` on, endlessly: the dataset it comes from, and which of its batches
    it is.
    """
    if len(weights) == 1:
        yield from ((0, number) for number in itertools.count(start))
        return
    bounds = np.cumsum(np.asarray(weights, dtype=np.float64)) / float(sum(weights))
    counts = np.zeros(len(weights), dtype=np.int64)
    block = 1 << 16
    for first in range(0, start, block):
        draws = _draws(first, min(block, start - first), bounds, seed)
        counts += np.bincount(draws, minlength=len(weights))
    for first in itertools.count(start, 1024):
        for dataset in _draws(first, 1024, bounds, seed).tolist():
            yield dataset, int(counts[dataset])
            counts[dataset] += 1


def _draws(first: int, count: int, bounds: NDArray[np.float64], seed: int) -> NDArray[np.int64]:
    words = hashed(seed, MIX, np.arange(first, first + count, dtype=np.int64))
    uniform = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    found: NDArray[np.int64] = np.searchsorted(bounds, uniform, side="right")
    return np.minimum(found, len(bounds) - 1)
