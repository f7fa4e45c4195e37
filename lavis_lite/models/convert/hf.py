"""Hugging Face's BLIP-2 folders, by the names in the state_dict of transformers 5.24's own classes.

Their ViT is EVA's with query, key and value bias in one vector, and its final norm is `ln_vision`. They compute that
norm with the ViT's eps, 1e-6; here and in LAVIS it is 1e-5.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lavis_lite.models.convert.parts import (
    BLOCK,
    ENCODER,
    language_model,
    linear,
    qformer_blocks,
    qformer_embeddings,
    qformer_text_blocks,
    queries,
)
from lavis_lite.models.convert.rules import Group, Layout, Rule, renamed

NAME = "Hugging Face's "  # before the class's
_LAYER = "vision_model.encoder.layers.{n}."
_QFORMER_LAYER = "qformer.encoder.layer.{n}."
_LN_VISION = "vision_model.post_layernorm."


def _query_bias(bias: Tensor) -> Tensor:
    return bias.chunk(3)[0]


def _value_bias(bias: Tensor) -> Tensor:
    # The key's bias, between them, is zero in published models; any other adds the same number to all scores of a
    # query, which softmax takes away again.
    return bias.chunk(3)[2]


def _joined_bias(query: Tensor, value: Tensor) -> Tensor:
    return torch.cat([query, torch.zeros_like(query), value])


_BIASES = Rule(
    (_LAYER + "self_attn.qkv.bias",),
    (BLOCK + "attn.q_bias", BLOCK + "attn.v_bias"),
    read=(_query_bias, _value_bias),
    write=(_joined_bias,),
)
VISION = Group(
    "the image encoder",
    (
        _BIASES,
        *renamed("vision_model.embeddings.class_embedding", ENCODER + "cls_token"),
        *renamed("vision_model.embeddings.position_embedding", ENCODER + "pos_embed"),
        *renamed(
            "vision_model.embeddings.patch_embedding.{weight|bias}",
            ENCODER + "patch_embed.proj.{weight|bias}",
        ),
        *renamed(_LAYER + "self_attn.qkv.weight", BLOCK + "attn.qkv.weight"),
        *renamed(_LAYER + "self_attn.projection.{weight|bias}", BLOCK + "attn.proj.{weight|bias}"),
        *renamed(_LAYER + "layer_norm{1|2}.{weight|bias}", BLOCK + "norm{1|2}.{weight|bias}"),
        *renamed(_LAYER + "mlp.{fc1|fc2}.{weight|bias}", BLOCK + "mlp.{fc1|fc2}.{weight|bias}"),
    ),
    marker=_BIASES,
)
_BLOCKS = qformer_blocks(_QFORMER_LAYER, "attention")

RETRIEVAL = Layout(
    name=NAME + "Blip2ForImageTextRetrieval",
    family="hf",
    llm=None,
    marker=r"vision_projection\.weight",
    groups=(
        queries(_LN_VISION, "qformer.layernorm."),
        *_BLOCKS,
        VISION,
        qformer_embeddings("embeddings.", required=True),
        qformer_text_blocks(_QFORMER_LAYER, required=True),
        linear("the image projection", "vision_projection", "vision_proj"),
        linear("the text projection", "text_projection", "text_proj"),
        linear("the matching head", "itm_head", "itm_head"),
    ),
    dropped=(r"embeddings\.position_ids",),
    # It neither writes captions nor trains.
    unwritten=(r"Qformer\.cls\..*", r"temp"),
    absent=(r"^Qformer\.cls\.", r"^temp$"),
)

GENERATION = Layout(
    name=NAME + "Blip2ForConditionalGeneration",
    family="hf",
    llm=None,
    marker=r"language_projection\.weight",
    groups=(
        queries(_LN_VISION, "qformer.layernorm."),
        *_BLOCKS,
        VISION,
        linear("the projection to the language model", "language_projection", "llm_proj"),
        language_model("language_model."),
    ),
    # Its Q-Former reads no text.
    unwritten=(
        r"Qformer\.cls\..*",
        r"Qformer\.bert\.embeddings\.(word|position)_embeddings\.weight",
        r"Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\..*",
    ),
)

INSTRUCTED = Layout(
    name=NAME + "InstructBlipForConditionalGeneration",
    family="hf",
    llm=None,
    marker=r"qformer\.embeddings\.word_embeddings\.weight",
    groups=(
        queries(_LN_VISION, "qformer.embeddings.layernorm."),
        *_BLOCKS,
        VISION,
        qformer_embeddings("qformer.embeddings.", required=True),
        qformer_text_blocks(_QFORMER_LAYER, required=True),
        linear("the projection to the language model", "language_projection", "llm_proj"),
        language_model("language_model."),
    ),
    dropped=(r"qformer\.embeddings\.position_ids",),
)
