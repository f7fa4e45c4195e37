"""Rows of a tensor, taken the way whose gradient is fastest."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def take_rows(x: Tensor, rows: Tensor | slice | Sequence[int]) -> Tensor:
    """The chosen rows in that order, repeated where an index is.

    The gradient of [] sums repeated rows in a fixed order on every device, but takes 2.7 times as long on a CPU, where
    that of index_select has a fixed order too.
    """
    if isinstance(rows, Tensor) and x.device.type == "cpu":
        return x.index_select(0, rows)
    return x[rows]
