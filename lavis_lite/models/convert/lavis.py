"""LAVIS's .pth files: {"model": {name: tensor}} with trained parameters, buffers, and what a user unfroze.

The Q-Former has BERT's names there as here. Counted with LAVIS (method.md, section 8): 857 names in a whole
stage-1 model with ViT-g, 627 with ViT-L, 771 in stage 2 with OPT-2.7B without the language model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lavis_lite.models.convert.parts import (
    BLOCK,
    ENCODER,
    PREDICTIONS,
    QFORMER_EMBEDDINGS,
    QFORMER_LAYER,
    language_model,
    linear,
    qformer_blocks,
    qformer_embeddings,
    qformer_text_blocks,
    queries,
)
from lavis_lite.models.convert.rules import Group, Layout, Rule, renamed

# BERT's position counter where no table of positions is left that would tell its length.
BERT_POSITIONS = 512
POSITION_IDS = QFORMER_EMBEDDINGS + "position_ids"
WORDS, POSITIONS = (QFORMER_EMBEDDINGS + f"{kind}_embeddings.weight" for kind in ("word", "position"))

# EVA's names are timm's.
_EVA_BIASES = Rule(("visual_encoder.blocks.{n}.attn.q_bias",), (BLOCK + "attn.q_bias",))
EVA = Group(
    "the image encoder (EVA)",
    (
        _EVA_BIASES,
        *renamed("visual_encoder.{cls_token|pos_embed}", ENCODER + "{cls_token|pos_embed}"),
        *renamed("visual_encoder.patch_embed.proj.{weight|bias}", ENCODER + "patch_embed.proj.{weight|bias}"),
        *renamed("visual_encoder.blocks.{n}.attn.{v_bias|qkv.weight}", BLOCK + "attn.{v_bias|qkv.weight}"),
        *renamed(
            "visual_encoder.blocks.{n}.{norm1|norm2|attn.proj|mlp.fc1|mlp.fc2}.{weight|bias}",
            BLOCK + "{norm1|norm2|attn.proj|mlp.fc1|mlp.fc2}.{weight|bias}",
        ),
    ),
    marker=_EVA_BIASES,
)

# OpenAI's names for CLIP; class token [D] and positions [P, D] are [1, 1, D] and [1, P, D] with timm.
_CLIP_NORM, *_CLIP_NORMS = renamed("visual_encoder.ln_pre.{weight|bias}", ENCODER + "norm_pre.{weight|bias}")
_CLIP_BLOCK = "visual_encoder.transformer.resblocks.{n}."
CLIP = Group(
    "the image encoder (CLIP)",
    (
        _CLIP_NORM,
        *_CLIP_NORMS,
        Rule(
            ("visual_encoder.class_embedding",),
            (ENCODER + "cls_token",),
            read=(lambda token: token.reshape(1, 1, -1),),
            write=(lambda token: token.reshape(-1),),
        ),
        Rule(
            ("visual_encoder.positional_embedding",),
            (ENCODER + "pos_embed",),
            read=(lambda table: table.unsqueeze(0),),
            write=(lambda table: table.squeeze(0),),
        ),
        *renamed("visual_encoder.conv1.weight", ENCODER + "patch_embed.proj.weight"),
        *renamed(_CLIP_BLOCK + "attn.in_proj_{weight|bias}", BLOCK + "attn.qkv.{weight|bias}"),
        *renamed(_CLIP_BLOCK + "attn.out_proj.{weight|bias}", BLOCK + "attn.proj.{weight|bias}"),
        *renamed(_CLIP_BLOCK + "ln_{1|2}.{weight|bias}", BLOCK + "norm{1|2}.{weight|bias}"),
        *renamed(_CLIP_BLOCK + "mlp.c_fc.{weight|bias}", BLOCK + "mlp.fc1.{weight|bias}"),
        *renamed(_CLIP_BLOCK + "mlp.c_proj.{weight|bias}", BLOCK + "mlp.fc2.{weight|bias}"),
    ),
    marker=_CLIP_NORM,
)


def _counter(length: int) -> Tensor:
    return torch.arange(length).unsqueeze(0)


POSITION_COUNTER = Group(
    "the position counter",
    (
        Rule((POSITION_IDS,), (POSITIONS,), read=(), write=(lambda table: _counter(len(table)),)),
        Rule(
            (POSITION_IDS,),
            (QFORMER_EMBEDDINGS + "LayerNorm.weight",),
            read=(),
            write=(lambda _: _counter(BERT_POSITIONS),),
        ),
    ),
)


def _prediction_head(*, required: bool) -> Group:
    """BERT's prediction head, whose decoder repeats the word embedding.

    Of the two names of its bias the decoder's is the one that computes.
    """
    transform = PREDICTIONS + "transform.{dense|LayerNorm}.{weight|bias}"
    bias, decoder_bias = PREDICTIONS + "bias", PREDICTIONS + "decoder.bias"
    rules = (
        *renamed(transform, transform),
        Rule((bias, decoder_bias), (bias,), read=(1,), write=(0, 0)),
        Rule((PREDICTIONS + "decoder.weight",), (WORDS, bias), read=(), write=(0,)),
    )
    return Group("the prediction head", rules, required=required)


_COMMON = (
    queries("ln_vision.", QFORMER_EMBEDDINGS + "LayerNorm."),
    *qformer_blocks(QFORMER_LAYER, "self"),
    POSITION_COUNTER,
    EVA,
    CLIP,
)

STAGE1 = Layout(
    name="LAVIS, stage 1",
    family="lavis",
    llm=None,
    # What tells a file of theirs from one of ours.
    marker=r"Qformer\.bert\.embeddings\.position_ids|Qformer\.cls\.predictions\.decoder\.weight",
    groups=(
        *_COMMON,
        qformer_embeddings(QFORMER_EMBEDDINGS, required=True),
        qformer_text_blocks(QFORMER_LAYER, required=True),
        _prediction_head(required=True),
        linear("the image projection", "vision_proj", "vision_proj"),
        linear("the text projection", "text_proj", "text_proj"),
        linear("the matching head", "itm_head", "itm_head"),
        Group("the temperature", renamed("temp", "temp"), required=True),
    ),
)


def _stage2(kind: str) -> Layout:
    groups = (
        *_COMMON,
        # Of no use to a model whose Q-Former reads no question, and yet in some files.
        qformer_embeddings(QFORMER_EMBEDDINGS, required=False),
        qformer_text_blocks(QFORMER_LAYER, required=False),
        _prediction_head(required=False),
        linear("the projection to the language model", f"{kind}_proj", "llm_proj"),
        language_model(f"{kind}_model."),
    )
    name = f"LAVIS, stage 2 with {kind.upper()}"
    return Layout(name=name, family="lavis", llm=kind, marker=rf"{kind}_proj\.weight", groups=groups)


STAGE2_OPT, STAGE2_T5 = _stage2("opt"), _stage2("t5")
