"""EVA-CLIP ViT-g/14, the image encoder of most BLIP-2 models."""

from __future__ import annotations

import timm
from torch import Tensor

from lavis_lite.common.registry import registry
from lavis_lite.models.vision.timm_features import TimmFeatures, check_image_size
from lavis_lite.models.vision.weights import Layout

ARCHITECTURE = "eva_giant_patch14_clip_224"
# Trained on LAION-400M for 11B samples: the weights in LAVIS's eva_vit_g.pth.
HUB_NAME = "eva_giant_patch14_clip_224.laion400m"
PATCH_SIZE = 14

# LAVIS's eva_vit_g.pth and timm's own files use the same names. Norm and head lie behind the last block.
LAYOUT = Layout(
    name="LAVIS eva_vit_g or timm",
    marker=r"blocks\.0\.attn\.q_bias",
    rules=[
        (r"cls_token|pos_embed|patch_embed\.proj\.(weight|bias)", r"\g<0>"),
        (r"blocks\.\d+\.attn\.(q_bias|v_bias|qkv\.weight)", r"\g<0>"),
        (r"blocks\.\d+\.(norm1|attn\.proj|norm2|mlp\.fc1|mlp\.fc2)\.(weight|bias)", r"\g<0>"),
        (r"(norm|fc_norm|head)\.(weight|bias)", None),
    ],
)


@registry.register_vision_encoder("eva_clip_g")
def eva_clip_g(*, image_size: int = 224, drop_path_rate: float = 0.0) -> TimmFeatures:
    """EVA-CLIP ViT-g/14 (arXiv 2211.07636): images [B, 3, H, W] -> features [B, 1 + (H/14)^2, 1408].

    39 of 40 blocks (986M parameters), LayerNorm eps 1e-6, separate biases for query and value and
    none for the key, class token first, no final norm.

    Args:
        image_size: the side in pixels, a multiple of 14; the positions of 224 px are interpolated
            (align_corners false).
        drop_path_rate: stochastic depth while training, rising to this rate in the last block.
    """
    return build_eva(image_size=image_size, drop_path_rate=drop_path_rate)


def build_eva(
    *,
    image_size: int,
    drop_path_rate: float = 0.0,
    width: int = 1408,
    depth: int = 40,
    num_heads: int = 16,
    mlp_width: int = 6144,
) -> TimmFeatures:
    """The EVA-CLIP architecture in any size, cut off behind its second-last block."""
    check_image_size(image_size, PATCH_SIZE, "eva_clip_g")
    model = timm.create_model(
        ARCHITECTURE,
        num_classes=0,
        global_pool="",
        img_size=image_size,
        embed_dim=width,
        depth=depth,
        num_heads=num_heads,
        mlp_ratio=mlp_width / width,
        drop_path_rate=drop_path_rate,
    )
    return TimmFeatures(model, name="eva_clip_g", hub=_from_hub, layouts=[LAYOUT])


def _from_hub() -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = timm.create_model(HUB_NAME, pretrained=True).state_dict()
    return tensors
