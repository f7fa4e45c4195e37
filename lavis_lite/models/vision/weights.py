"""Weights from other people's files: explicit key maps, and position embeddings for other image sizes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from lavis_lite.common.errors import CheckpointError

SHOWN_KEYS = 5
# Separate query, key and value weights become rows of a fused one: `<name>#0`, `#1`, `#2` until joined.
PART = "#"


@dataclass(frozen=True)
class Layout:
    """How one kind of file names its weights.

    name: for messages. marker: a regular expression; the file is of this kind if it fully matches some key.
    rules: (regular expression, replacement) tried in order on the full key; None drops a weight on purpose.
    A key that no rule matches is an error.
    """

    name: str
    marker: str
    rules: Sequence[tuple[str, str | None]]


def rename(tensors: Mapping[str, Tensor], layouts: Sequence[Layout], *, source: str) -> dict[str, Tensor]:
    """A file's weights under timm's names, by the first layout whose marker is in it.

    Raises CheckpointError naming the keys of a file in no known layout, or those a layout doesn't know.
    """
    layout = next((x for x in layouts if any(re.fullmatch(x.marker, key) for key in tensors)), None)
    if layout is None:
        raise CheckpointError(
            f"'{source}' is in no known layout ({', '.join(x.name for x in layouts)}); its keys begin with: "
            f"{_first(list(tensors))}"
        )
    renamed: dict[str, Tensor] = {}
    unknown: list[str] = []
    for key, tensor in tensors.items():
        match = next(((m, new) for old, new in layout.rules if (m := re.fullmatch(old, key))), None)
        if match is None:
            unknown.append(key)
        elif match[1] is not None:
            renamed[match[0].expand(match[1])] = tensor
    if unknown:
        raise CheckpointError(
            f"'{source}', read as {layout.name}, has {len(unknown)} unknown keys: {_first(unknown)}"
        )
    return _with_batch_axes(_joined(renamed, source))


def _joined(tensors: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Parts of fused matrices put together, query, key, value."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key in [key for key in tensors if PART in key]:
        whole, number = key.split(PART)
        parts.setdefault(whole, {})[number] = tensors.pop(key)
    for whole, pieces in parts.items():
        if sorted(pieces) != ["0", "1", "2"]:
            raise CheckpointError(f"'{source}' has only some of the query, key and value weights of {whole}")
        tensors[whole] = torch.cat([pieces["0"], pieces["1"], pieces["2"]])
    return tensors


def _with_batch_axes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """CLIP's files hold the class token as [D] and positions as [P, D]; timm has [1, 1, D] and [1, P, D]."""
    for key in ("cls_token", "pos_embed"):
        if key in tensors and tensors[key].dim() < 3:
            tensors[key] = tensors[key].reshape(1, -1, tensors[key].shape[-1])
    return tensors


def _first(keys: list[str]) -> str:
    more = len(keys) - SHOWN_KEYS
    return ", ".join(keys[:SHOWN_KEYS]) + (f", and {more} more" if more > 0 else "")


def interpolate_positions(
    pos_embed: Tensor, grid: tuple[int, int], *, num_prefix: int, align_corners: bool
) -> Tensor:
    """Position embeddings [1, prefix + h*w, D] of a square grid, made to fit another, bicubic.

    Args:
        grid: rows and columns wanted.
        num_prefix: embeddings before the grid's (the class token's), which stay as they are.
        align_corners: published scores rest on false for EVA-CLIP and true for CLIP.

    Returns: [1, prefix + rows*columns, D]; the argument itself if it fits, or if its grid isn't square
    (the strict load then names it).
    """
    side = math.isqrt(max(0, pos_embed.shape[1] - num_prefix))
    if side == 0 or side * side != pos_embed.shape[1] - num_prefix or (side, side) == grid:
        return pos_embed
    prefix, patches = pos_embed[:, :num_prefix], pos_embed[:, num_prefix:]
    image = patches.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    image = interpolate(image, size=grid, mode="bicubic", align_corners=align_corners)
    return torch.cat([prefix, image.permute(0, 2, 3, 1).flatten(1, 2).to(prefix)], dim=1)
