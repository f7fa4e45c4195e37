"""What each object of a picture is and which patches it covers, as tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lavis_lite.worlds.shapes.render import object_mask
from lavis_lite.worlds.shapes.scene import BACKGROUNDS, CELLS, COLOURS, MAX_OBJECTS, SHAPES, SIZES, Scene

# Columns of `objects`, with the number of classes of each.
ATTRIBUTES: dict[str, int] = {
    "shape": len(SHAPES),
    "colour": len(COLOURS),
    "size": len(SIZES),
    "position": len(CELLS),
}
# A patch belongs to an object when the object fills at least an eighth of it.
MIN_COVER = 0.125


def scene_targets(scene: Scene, *, image_size: int = 64, patch_size: int = 8) -> dict[str, Any]:
    """Labels of a scene.

    Returns: objects int64[4, 4], the class of each object in each of ATTRIBUTES (-1 in rows without an
    object); centres float32[4, 2], (x, y) as fractions of the side; background int, its index; cover
    int64[P], which object fills most of each patch, 0 for none, i + 1 for object i.
    """
    objects = np.full((MAX_OBJECTS, len(ATTRIBUTES)), -1, dtype=np.int64)
    centres = np.zeros((MAX_OBJECTS, 2), dtype=np.float32)
    for i, item in enumerate(scene.objects):
        objects[i] = (SHAPES.index(item.shape), COLOURS.index(item.colour), SIZES.index(item.size), item.cell)
        centres[i] = (item.x, item.y)
    return {
        "objects": torch.from_numpy(objects),
        "centres": torch.from_numpy(centres),
        "background": BACKGROUNDS.index(scene.background),
        "cover": torch.from_numpy(patch_cover(object_mask(scene, size=image_size), patch_size)),
    }


def patch_cover(mask: NDArray[np.uint8], patch_size: int) -> NDArray[np.int64]:
    """Which object fills most of each patch of a pixel mask, int64[P], 0 where none fills MIN_COVER of it."""
    rows, columns = mask.shape[0] // patch_size, mask.shape[1] // patch_size
    patches = mask.reshape(rows, patch_size, columns, patch_size).swapaxes(1, 2).reshape(rows * columns, -1)
    filled = np.stack([(patches == number).mean(1) for number in range(1, MAX_OBJECTS + 1)], axis=1)
    return np.where(filled.max(1) >= MIN_COVER, filled.argmax(1) + 1, 0).astype(np.int64)
