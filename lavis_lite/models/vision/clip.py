"""CLIP ViT-L/14, the smaller image encoder of the BLIP-2 paper."""

from __future__ import annotations

import timm
from torch import Tensor

from lavis_lite.common.registry import registry
from lavis_lite.models.vision.timm_features import TimmFeatures, check_image_size
from lavis_lite.models.vision.weights import PART, Layout

ARCHITECTURE = "vit_large_patch14_clip_quickgelu_224"
HUB_NAME = "vit_large_patch14_clip_quickgelu_224.openai"
PATCH_SIZE = 14

TIMM = Layout(
    name="timm",
    marker=r"blocks\.0\.attn\.qkv\.bias",
    rules=[
        (r"cls_token|pos_embed|patch_embed\.proj\.weight|norm_pre\.(weight|bias)", r"\g<0>"),
        (r"blocks\.\d+\.(norm1|attn\.qkv|attn\.proj|norm2|mlp\.fc1|mlp\.fc2)\.(weight|bias)", r"\g<0>"),
        (r"(norm|fc_norm|head)\.(weight|bias)", None),
    ],
)

_OPENAI_TOWER: list[tuple[str, str | None]] = [
    (r"class_embedding", "cls_token"),
    (r"positional_embedding", "pos_embed"),
    (r"conv1\.weight", "patch_embed.proj.weight"),
    (r"ln_pre\.(\w+)", r"norm_pre.\1"),
    (r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)", r"blocks.\1.attn.qkv.\2"),
    (r"transformer\.resblocks\.(\d+)\.attn\.out_proj\.(weight|bias)", r"blocks.\1.attn.proj.\2"),
    (r"transformer\.resblocks\.(\d+)\.ln_([12])\.(weight|bias)", r"blocks.\1.norm\2.\3"),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_fc\.(weight|bias)", r"blocks.\1.mlp.fc1.\2"),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_proj\.(weight|bias)", r"blocks.\1.mlp.fc2.\2"),
    (r"ln_post\.(weight|bias)", None),
    (r"proj", None),
]
# The visual tower alone, as in LAVIS's clip_vit_L.pth.
OPENAI_VISUAL = Layout(name="OpenAI CLIP's visual tower", marker=r"conv1\.weight", rules=_OPENAI_TOWER)
# The whole model: the same below `visual.`, and the text tower, which has no place here.
OPENAI_WHOLE = Layout(
    name="OpenAI CLIP",
    marker=r"visual\.conv1\.weight",
    rules=[
        *((rf"visual\.(?:{old})", new) for old, new in _OPENAI_TOWER),
        (r"transformer\.resblocks\..*|token_embedding\.weight|positional_embedding", None),
        (r"ln_final\.(weight|bias)|text_projection|logit_scale", None),
        (r"input_resolution|context_length|vocab_size", None),
    ],
)

_VISION, _LAYER = r"(?:vision_model\.)?", r"(?:vision_model\.)?encoder\.layers\.(\d+)\."
HUGGING_FACE = Layout(
    name="Hugging Face CLIP",
    marker=_VISION + r"embeddings\.class_embedding",
    rules=[
        (_VISION + r"embeddings\.class_embedding", "cls_token"),
        (_VISION + r"embeddings\.position_embedding\.weight", "pos_embed"),
        (_VISION + r"embeddings\.patch_embedding\.weight", "patch_embed.proj.weight"),
        (_VISION + r"pre_layrnorm\.(weight|bias)", r"norm_pre.\1"),  # their spelling
        (_LAYER + r"self_attn\.q_proj\.(weight|bias)", rf"blocks.\1.attn.qkv.\2{PART}0"),
        (_LAYER + r"self_attn\.k_proj\.(weight|bias)", rf"blocks.\1.attn.qkv.\2{PART}1"),
        (_LAYER + r"self_attn\.v_proj\.(weight|bias)", rf"blocks.\1.attn.qkv.\2{PART}2"),
        (_LAYER + r"self_attn\.out_proj\.(weight|bias)", r"blocks.\1.attn.proj.\2"),
        (_LAYER + r"layer_norm([12])\.(weight|bias)", r"blocks.\1.norm\2.\3"),
        (_LAYER + r"mlp\.(fc[12])\.(weight|bias)", r"blocks.\1.mlp.\2.\3"),
        (_VISION + r"embeddings\.position_ids|" + _VISION + r"post_layernorm\.(weight|bias)", None),
        (r"visual_projection\.weight|text_projection\.weight|logit_scale|text_model\..*", None),
    ],
)


@registry.register_vision_encoder("clip_L")
def clip_l(*, image_size: int = 224, drop_path_rate: float = 0.0) -> TimmFeatures:
    """CLIP ViT-L/14 (arXiv 2103.00020): images [B, 3, H, W] -> features [B, 1 + (H/14)^2, 1024].

    23 of 24 blocks, QuickGELU, LayerNorm eps 1e-5, a norm before the blocks, class token first,
    no final norm.

    Args:
        image_size: the side in pixels, a multiple of 14; the positions of 224 px are interpolated
            (align_corners true).
        drop_path_rate: stochastic depth while training, rising to this rate in the last block.
    """
    return build_clip(image_size=image_size, drop_path_rate=drop_path_rate)


def build_clip(
    *,
    image_size: int,
    drop_path_rate: float = 0.0,
    width: int = 1024,
    depth: int = 24,
    num_heads: int = 16,
) -> TimmFeatures:
    """CLIP's image tower in any size, cut off behind its second-last block."""
    check_image_size(image_size, PATCH_SIZE, "clip_L")
    model = timm.create_model(
        ARCHITECTURE,
        num_classes=0,
        global_pool="",
        img_size=image_size,
        embed_dim=width,
        depth=depth,
        num_heads=num_heads,
        drop_path_rate=drop_path_rate,
    )
    return TimmFeatures(
        model,
        name="clip_L",
        hub=_from_hub,
        layouts=[OPENAI_WHOLE, OPENAI_VISUAL, HUGGING_FACE, TIMM],
        align_corners=True,
    )


def _from_hub() -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = timm.create_model(HUB_NAME, pretrained=True).state_dict()
    return tensors
