"""The embedded world's frozen image encoder: a 1.2M-parameter ViT whose weights ship with the package."""

from __future__ import annotations

import re
from pathlib import Path

import timm.layers
import torch
from safetensors.torch import load_file
from timm.models import checkpoint_seq
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lavis_lite.common.errors import CheckpointError, ConfigError
from lavis_lite.common.registry import registry
from lavis_lite.models.base import load_strictly

WEIGHTS = Path(__file__).resolve().parent / "weights" / "shapes_vit.safetensors"


@registry.register_vision_encoder("shapes_vit")
class ShapesViT(nn.Module):
    """A plain timm ViT without class token: images [B, 3, H, W] -> features [B, (H/8)(W/8), 128].

    Features are the output of the last block, without the final norm (as BLIP-2 takes them, arXiv 2301.12597
    section 3.4); README.md beside this file has what linear probes read from each block.

    Args:
        image_size: the side in pixels, a multiple of `patch_size`.
        patch_size: the side of a patch in pixels.
        width: features per patch, D.
        depth: blocks.
        num_heads: attention heads.
    """

    def __init__(
        self,
        *,
        image_size: int = 64,
        patch_size: int = 8,
        width: int = 128,
        depth: int = 6,
        num_heads: int = 4,
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ConfigError(
                f"shapes_vit: image_size {image_size} is not a multiple of patch_size {patch_size}"
            )
        self.num_features = width
        self.num_layers = depth
        self.patch_size = patch_size
        self.vit = VisionTransformer(
            img_size=image_size,
            patch_size=patch_size,
            embed_dim=width,
            depth=depth,
            num_heads=num_heads,
            class_token=False,
            global_pool="",
            num_classes=0,
            final_norm=False,
        )
        # Sine-cosine positions at the start: attention finds a patch's neighbours from the first steps.
        side = image_size // patch_size
        with torch.no_grad():
            self.vit.pos_embed.copy_(timm.layers.build_sincos2d_pos_embed([side, side], width)[None] * 0.5)

    def forward(self, image: Tensor) -> Tensor:
        """Features float[B, P, D] of float[B, 3, H, W], patches row by row; ConfigError for another size."""
        height, width = self.vit.patch_embed.img_size
        if image.shape[-2:] != (height, width):
            raise ConfigError(
                f"shapes_vit: images are {image.shape[-2]}x{image.shape[-1]}, the encoder wants {height}x{width}; set "
                "vision_encoder.image_size or the image processor's"
            )
        return self.blocks(self.embed(image))

    def embed(self, image: Tensor) -> Tensor:
        """Patches with their positions added, [B, P, D]."""
        embedded: Tensor = self.vit.patch_embed(image) + self.vit.pos_embed
        return embedded

    def blocks(self, tokens: Tensor) -> Tensor:
        """All transformer blocks on tokens [B, any number, D]."""
        if self.vit.grad_checkpointing:
            recomputed: Tensor = checkpoint_seq(self.vit.blocks, tokens)
            return recomputed
        features: Tensor = self.vit.blocks(tokens)
        return features

    def layer_id(self, name: str) -> int:
        """Depth of a parameter for layer-wise learning rates: 0 for embeddings, then the block's number."""
        block = re.match(r"(?:.*\.)?blocks\.(\d+)\.", name)
        return int(block.group(1)) + 1 if block else 0

    def set_grad_checkpointing(self, enable: bool) -> None:
        """Recompute activations in the backward pass instead of keeping them."""
        self.vit.set_grad_checkpointing(enable)

    def load_pretrained(self, source: bool | str) -> None:
        """Load the weights shipped with the package (True) or a .safetensors file (a path), strictly.

        Raises CheckpointError when the file is missing or doesn't fit.
        """
        if source is False:
            return
        path = WEIGHTS if source is True else Path(source)
        if not path.is_file():
            raise CheckpointError(
                f"shapes_vit: no weights file '{path}'; pretrained: true loads the shipped ones"
            )
        load_strictly(self, load_file(path), source=str(path))
