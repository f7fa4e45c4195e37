"""Any timm model as an encoder: the output of an inner layer, with class token and without final norm.

B images, P tokens, D width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from timm.models import group_parameters
from torch import Tensor, nn

from lavis_lite.common.checkpoint import load_tensors
from lavis_lite.common.errors import CheckpointError, ConfigError
from lavis_lite.models.base import load_strictly
from lavis_lite.models.vision.weights import Layout, interpolate_positions, rename


class TimmFeatures(nn.Module):
    """A timm model cut off behind one of its layers: images [B, 3, H, W] -> features [B, P, D].

    The tokens before the patches (class token, registers) come first, then the patches row by row. The layers
    behind, the final norm and the head are removed, so that they cost neither memory nor time. Default is the
    second-last layer (BLIP-2, arXiv 2301.12597, section 3.4).

    Args:
        model: built with random weights.
        name: the encoder's name in messages.
        hub: the state dict of the same, whole model with pretrained weights; may use the network.
        layouts: the files `load_pretrained` can read.
        layer: which of the layers that timm counts (blocks of a transformer, stages of a convnet); negative
            from the end.
        align_corners: how position embeddings are interpolated.

    Raises ConfigError when the model has no such layer or timm can't read inner layers of it.
    """

    def __init__(
        self,
        model: Any,
        *,
        name: str,
        hub: Callable[[], Mapping[str, Tensor]],
        layouts: Sequence[Layout],
        layer: int = -2,
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        self.name = name
        self.hub = hub
        self.layouts = layouts
        self.align_corners = align_corners
        whole = set(model.state_dict())
        self.layer = _prune(model, layer, name)
        self.model: Any = model
        self.removed = whole - set(model.state_dict())
        self.num_features: int = model.feature_info[self.layer]["num_chs"]
        self.has_prefix = bool(getattr(model, "num_prefix_tokens", 0)) and (
            "return_prefix_tokens" in inspect.signature(model.forward_intermediates).parameters
        )
        self._layer_ids = _layer_ids(model)
        self.num_layers = max(self._layer_ids.values(), default=0)

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width that the position embeddings are for, in pixels; None if any will do."""
        patch_embed = getattr(self.model, "patch_embed", None)
        fixed = getattr(patch_embed, "strict_img_size", False)
        return tuple(patch_embed.img_size) if patch_embed is not None and fixed else None

    def forward(self, images: Tensor) -> Tensor:
        """Features float[B, P, D] of images float[B, 3, H, W]; ConfigError for a size not built for."""
        expected = self.image_size
        if expected and tuple(images.shape[-2:]) != expected:
            raise ConfigError(
                f"{self.name}: images are {images.shape[-2]}x{images.shape[-1]}, the encoder wants "
                f"{expected[0]}x{expected[1]}; set vision_encoder.image_size or the image processor's"
            )
        if self.has_prefix:
            [(patches, prefix)] = self.model.forward_intermediates(
                images,
                indices=[self.layer],
                return_prefix_tokens=True,
                output_fmt="NLC",
                intermediates_only=True,
            )
            return torch.cat([prefix, patches], dim=1)
        [grid] = self.model.forward_intermediates(
            images, indices=[self.layer], output_fmt="NCHW", intermediates_only=True
        )
        return grid.flatten(2).transpose(1, 2)

    def layer_id(self, name: str) -> int:
        """Depth of a parameter for layer-wise learning rates: 0 for the embeddings, up to `num_layers`."""
        return self._layer_ids.get(name.removeprefix("model."), self.num_layers)

    def set_grad_checkpointing(self, enable: bool) -> None:
        """Recompute activations in the backward pass instead of keeping them; ConfigError if timm can't."""
        try:
            self.model.set_grad_checkpointing(enable)
        except (AssertionError, AttributeError) as error:
            raise ConfigError(f"{self.name}: timm has no activation checkpointing for this model") from error

    def load_pretrained(self, source: bool | str) -> None:
        """Load weights, strictly: True from the hub through timm, a path from a .safetensors or .pth file.

        Layers that were removed, the final norm and the head are left out; positions are interpolated.

        Raises CheckpointError naming the keys that are missing, unknown or of another shape.
        """
        if source is False:
            return
        if source is True:
            where, tensors = f"{self.name} (hub)", self._from_hub()
        else:
            where, tensors = str(source), load_tensors(source)
        tensors = rename(tensors, self.layouts, source=where)
        kept = {key: tensor for key, tensor in tensors.items() if key not in self.removed}
        load_strictly(self.model, self._with_positions(kept), source=where)

    def fit_positions(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This encoder's tensors with the position embeddings interpolated to its image size."""
        fitted = self._with_positions({name.removeprefix("model."): x for name, x in tensors.items()})
        return {f"model.{name}": tensor for name, tensor in fitted.items()}

    def _from_hub(self) -> dict[str, Tensor]:
        try:
            return dict(self.hub())
        except Exception as error:  # whatever the hub client, its HTTP library and timm raise
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise CheckpointError(
                f"{self.name}: no pretrained weights from the hub ({lines[0]}); "
                "without network set `pretrained` to a local file"
            ) from error

    def _with_positions(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        own = self.model.state_dict().get("pos_embed")
        grid = getattr(getattr(self.model, "patch_embed", None), "grid_size", None)
        if own is None or own.dim() != 3 or not grid or tensors.get("pos_embed", own).dim() != 3:
            return tensors
        if "pos_embed" in tensors:
            num_prefix = own.shape[1] - grid[0] * grid[1]
            tensors["pos_embed"] = interpolate_positions(
                tensors["pos_embed"], tuple(grid), num_prefix=num_prefix, align_corners=self.align_corners
            )
        return tensors


def _prune(model: Any, layer: int, name: str) -> int:
    """Remove what lies behind a layer; its index from the start."""
    if not hasattr(model, "forward_intermediates") or not hasattr(model, "prune_intermediate_layers"):
        raise ConfigError(f"{name}: timm can't read inner layers of this model; choose another")
    count = len(model.feature_info)
    if not -count <= layer < count:
        raise ConfigError(f"{name}: layer {layer}, but the model has {count} ({-count} to {count - 1})")
    [index] = model.prune_intermediate_layers([layer], prune_norm=True, prune_head=True)
    return int(index)


def _layer_ids(model: Any) -> dict[str, int]:
    if not hasattr(model, "group_matcher"):
        return {}
    ids: dict[str, int] = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    return ids


def check_image_size(image_size: int, patch_size: int, name: str) -> None:
    """Raises ConfigError unless the side of the image is a positive multiple of the patch's."""
    if image_size < patch_size or image_size % patch_size:
        below = max(patch_size, image_size // patch_size * patch_size)
        raise ConfigError(
            f"{name}: image_size {image_size} is not a multiple of the patch size {patch_size}; "
            f"nearest: {below} or {below + patch_size}"
        )
