"""The supervised model whose trunk becomes the embedded world's frozen image encoder.

Legend: B images, P patches, D width, N object patches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavis_lite.common.registry import registry
from lavis_lite.models.base import BaseModel
from lavis_lite.worlds.shapes.encoder import ShapesViT
from lavis_lite.worlds.shapes.scene import BACKGROUNDS
from lavis_lite.worlds.shapes.targets import ATTRIBUTES


@registry.register_model("shapes_vit_pretrain")
class ShapesViTPretrain(BaseModel):
    """Teaches every patch what covers it: shape, colour, size and cell of the object, where its centre lies,
    and the background.

    Args:
        image_size, patch_size, width, depth, num_heads: the encoder's, see `ShapesViT`.
        centre_weight: of the loss on the offset from a patch to its object's centre, in patches. With the
            cell it keeps positions in the features: a prototype without both had a position probe of 0.15.
        keep_patches: how many patches of a picture a training step looks at, those with objects first; empty
            ones cost as much and teach little.
        full_fraction: of the steps look at all patches, as the encoder will be used.
    """

    presets: ClassVar[str] = "shapes_vit_pretrain"

    def __init__(
        self,
        *,
        image_size: int = 64,
        patch_size: int = 8,
        width: int = 128,
        depth: int = 6,
        num_heads: int = 4,
        centre_weight: float = 4.0,
        keep_patches: int = 32,
        full_fraction: float = 0.2,
    ) -> None:
        super().__init__()
        self.encoder = ShapesViT(
            image_size=image_size, patch_size=patch_size, width=width, depth=depth, num_heads=num_heads
        )
        self.grid = image_size // patch_size
        self.centre_weight = centre_weight
        self.keep_patches = keep_patches
        self.full_fraction = full_fraction
        self.norm = nn.LayerNorm(width)
        self.attribute_heads = nn.ModuleDict(
            {name: nn.Linear(width, number) for name, number in ATTRIBUTES.items()}
        )
        self.centre_head = nn.Linear(width, 2)
        self.cover_head = nn.Linear(width, 2)
        self.background_head = nn.Linear(width, len(BACKGROUNDS))

    def forward(self, samples: Mapping[str, Any]) -> dict[str, Tensor]:
        """The sum of all losses, each of them, and the accuracy of patches in telling their object's shape.

        samples: image float32[B, 3, H, W] and the labels of `targets.scene_targets`.
        """
        tokens, cover = self.encoder.embed(samples["image"]), samples["cover"]
        rows = torch.arange(len(tokens), device=tokens.device)[:, None]
        kept = self._choose_patches(cover)
        features, cover = self.norm(self.encoder.blocks(tokens[rows, kept])), cover[rows, kept]
        batch, place = cover.nonzero(as_tuple=True)
        owner = cover[batch, place] - 1
        labels, centres = samples["objects"][batch, owner], samples["centres"][batch, owner]
        covered, patch = features[batch, place], kept[batch, place]

        losses: dict[str, Tensor] = {}
        weights = _object_weights(batch, owner)
        for column, (name, head) in enumerate(self.attribute_heads.items()):
            logits = head(covered)
            each = F.cross_entropy(logits, labels[:, column], reduction="none")
            losses[f"loss_{name}"] = (each * weights).sum()
            if name == "shape":
                shape_acc = ((logits.argmax(-1) == labels[:, column]) * weights).sum()
        offset = centres * self.grid - torch.stack([patch % self.grid, patch // self.grid], -1) - 0.5
        losses["loss_centre"] = self.centre_weight * F.smooth_l1_loss(
            self.centre_head(covered).float(), offset
        )
        losses["loss_cover"] = F.cross_entropy(
            self.cover_head(features).flatten(0, 1), (cover > 0).long().flatten()
        )
        background = samples["background"][:, None].expand_as(cover)
        losses["loss_background"] = F.cross_entropy(
            self.background_head(features).flatten(0, 1), background.flatten()
        )
        return {"loss": torch.stack(list(losses.values())).sum(), **losses, "shape_acc": shape_acc}

    def _choose_patches(self, cover: Tensor) -> Tensor:
        """Numbers of the patches to look at, int64[B, kept]: all, or those with objects and some others."""
        batch, patches = cover.shape
        if not self.training or self.keep_patches >= patches or torch.rand(()) < self.full_fraction:
            return torch.arange(patches, device=cover.device).expand(batch, -1)
        order = (cover > 0) * 2 + torch.rand(cover.shape, device=cover.device)
        return order.topk(self.keep_patches, dim=1).indices

    def no_weight_decay(self) -> set[str]:
        """The position embedding."""
        return {"encoder.vit.pos_embed"}


def _object_weights(batch: Tensor, owner: Tensor) -> Tensor:
    """Weights float[N] of object patches that sum to 1 and give every object of the batch the same say.

    Small objects have a third of a large one's patches and are the harder ones.
    """
    objects = batch * (int(owner.max()) + 1 if len(owner) else 1) + owner
    _, which, counts = objects.unique(return_inverse=True, return_counts=True)
    return 1.0 / (counts[which] * len(counts))
