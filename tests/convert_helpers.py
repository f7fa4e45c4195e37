"""Other projects' BLIP-2 checkpoints at any size: LAVIS's by a list of names, Hugging Face's by its classes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from stage1_helpers import tiny_config, write_tokenizer
from torch import Tensor

from lavis_lite.common.registry import registry
from lavis_lite.models.vision.clip import build_clip
from lavis_lite.models.vision.eva import build_eva
from lavis_lite.models.vision.timm_features import TimmFeatures

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Sizes:
    """Of a checkpoint; the defaults are a tiny model's."""

    image: int = 24
    mlp: int = 48
    blocks: int = 3
    patches: int = 4
    width: int = 32
    ffn: int = 40
    layers: int = 4
    queries: int = 5
    words: int = 20
    positions: int = 20
    embed: int = 16
    llm: int = 16


TINY = Sizes()
FULL = Sizes(1408, 6144, 39, 256, 768, 3072, 12, 32, 30523, 512, 256, 2560)
FULL_CLIP = Sizes(1024, 4096, 23, 256, 768, 3072, 12, 32, 30523, 512, 256, 2560)


def pair(name: str, out: int, *into: int) -> Shapes:
    """A weight and a bias."""
    return {f"{name}.weight": (out, *into), f"{name}.bias": (out,)}


def eva_shapes(s: Sizes) -> Shapes:
    shapes: Shapes = {
        "cls_token": (1, 1, s.image),
        "pos_embed": (1, 1 + s.patches, s.image),
        **pair("patch_embed.proj", s.image, 3, 14, 14),
    }
    for n in range(s.blocks):
        block: Shapes = {
            **pair("norm1", s.image),
            **pair("norm2", s.image),
            "attn.q_bias": (s.image,),
            "attn.v_bias": (s.image,),
            "attn.qkv.weight": (3 * s.image, s.image),
            **pair("attn.proj", s.image, s.image),
            **pair("mlp.fc1", s.mlp, s.image),
            **pair("mlp.fc2", s.image, s.mlp),
        }
        shapes |= {f"blocks.{n}.{name}": shape for name, shape in block.items()}
    return {f"visual_encoder.{name}": shape for name, shape in shapes.items()}


def clip_shapes(s: Sizes) -> Shapes:
    shapes: Shapes = {
        "class_embedding": (s.image,),
        "positional_embedding": (1 + s.patches, s.image),
        "conv1.weight": (s.image, 3, 14, 14),
        **pair("ln_pre", s.image),
    }
    for n in range(s.blocks):
        block: Shapes = {
            **pair("ln_1", s.image),
            **pair("ln_2", s.image),
            "attn.in_proj_weight": (3 * s.image, s.image),
            "attn.in_proj_bias": (3 * s.image,),
            **pair("attn.out_proj", s.image, s.image),
            **pair("mlp.c_fc", 4 * s.image, s.image),
            **pair("mlp.c_proj", s.image, 4 * s.image),
        }
        shapes |= {f"transformer.resblocks.{n}.{name}": shape for name, shape in block.items()}
    return {f"visual_encoder.{name}": shape for name, shape in shapes.items()}


def qformer_shapes(s: Sizes, *, text: bool) -> Shapes:
    """The Q-Former behind `Qformer.`, without its prediction head and position counter."""
    shapes: Shapes = pair("bert.embeddings.LayerNorm", s.width)
    if text:
        shapes["bert.embeddings.word_embeddings.weight"] = (s.words, s.width)
        shapes["bert.embeddings.position_embeddings.weight"] = (s.positions, s.width)
    for n in range(s.layers):
        block: Shapes = {}
        for kind, context in (("attention", s.width), ("crossattention", s.image if n % 2 == 0 else 0)):
            if context:
                block |= pair(f"{kind}.self.query", s.width, s.width)
                block |= pair(f"{kind}.self.key", s.width, context)
                block |= pair(f"{kind}.self.value", s.width, context)
                block |= pair(f"{kind}.output.dense", s.width, s.width)
                block |= pair(f"{kind}.output.LayerNorm", s.width)
        for twin in ("_query", "") if text else ("_query",):
            block |= pair(f"intermediate{twin}.dense", s.ffn, s.width)
            block |= pair(f"output{twin}.dense", s.width, s.ffn)
            block |= pair(f"output{twin}.LayerNorm", s.width)
        shapes |= {f"bert.encoder.layer.{n}.{name}": shape for name, shape in block.items()}
    return {f"Qformer.{name}": shape for name, shape in shapes.items()}


def head_shapes(s: Sizes) -> Shapes:
    """The prediction head as it is stored, its decoder's repetitions aside."""
    shapes: Shapes = {
        "bias": (s.words,),
        **pair("transform.dense", s.width, s.width),
        **pair("transform.LayerNorm", s.width),
    }
    return {f"Qformer.cls.predictions.{name}": shape for name, shape in shapes.items()}


def lavis_state(
    kind: Literal["stage1", "opt", "t5"],
    s: Sizes = TINY,
    *,
    vision: Literal["eva", "clip", "none"] = "eva",
    llm: Shapes | None = None,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """What LAVIS saves, random, with its tied repetitions and the position counter."""
    stage1 = kind == "stage1"
    shapes: Shapes = {
        "query_tokens": (1, s.queries, s.width),
        **pair("ln_vision", s.image),
        **({"eva": eva_shapes, "clip": clip_shapes}[vision](s) if vision != "none" else {}),
        **qformer_shapes(s, text=stage1),
        **(
            {
                **head_shapes(s),
                **pair("vision_proj", s.embed, s.width),
                **pair("text_proj", s.embed, s.width),
                **pair("itm_head", 2, s.width),
                "temp": (),
            }
            if stage1
            else pair(f"{kind}_proj", s.llm, s.width)
        ),
        **{f"{kind}_model.{name}": shape for name, shape in (llm or {}).items()},
    }
    draw = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {
        name: torch.randn(shape, generator=draw) * 0.2
        if device == "cpu"
        else torch.empty(shape, device=device)
        for name, shape in shapes.items()
    }
    state["Qformer.bert.embeddings.position_ids"] = torch.arange(s.positions if stage1 else 512)[None]
    if stage1:
        state["Qformer.cls.predictions.decoder.weight"] = state[
            "Qformer.bert.embeddings.word_embeddings.weight"
        ]
        state["Qformer.cls.predictions.decoder.bias"] = state["Qformer.cls.predictions.bias"]
    return state


@registry.register_vision_encoder("small_eva")
def small_eva(*, image_size: int = 28) -> TimmFeatures:
    """EVA as in TINY: three blocks are left."""
    return build_eva(image_size=image_size, width=TINY.image, depth=4, num_heads=2, mlp_width=TINY.mlp).eval()


@registry.register_vision_encoder("small_clip")
def small_clip(*, image_size: int = 28) -> TimmFeatures:
    """CLIP as in TINY: three blocks are left."""
    return build_clip(image_size=image_size, width=TINY.image, depth=4, num_heads=2).eval()


def stage1_config(folder: Path, vision: str = "small_eva", **changes: Any) -> dict[str, Any]:
    """A stage-1 model section of TINY's sizes."""
    tokenizer = write_tokenizer(folder / "tokenizer")
    return tiny_config(tokenizer, vision_encoder={"name": vision, **changes})


OPT = {
    "model_type": "opt", "vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "ffn_dim": 20, "max_position_embeddings": 16, "word_embed_proj_dim": 16,
}  # fmt: skip
T5 = {
    "model_type": "t5", "vocab_size": 30, "d_model": 16, "d_kv": 8, "num_layers": 2, "num_heads": 2, "d_ff": 20,
    "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
}  # fmt: skip


def stage2_config(llm: dict[str, Any], vision: str = "small_eva", **changes: Any) -> dict[str, Any]:
    """A stage-2 model section of TINY's sizes."""
    return {
        "vision_encoder": {"name": vision, **changes},
        "qformer": {**tiny_config("")["qformer"]},
        "language_model": {"name": llm["model_type"], "model_name": "tiny", "config": llm},
    }


def hf_model(architecture: str, llm: dict[str, Any] = OPT, s: Sizes = TINY, **heads: int) -> Any:
    """A random model of a class of Hugging Face's; heads: `vision` and `qformer`, in number."""
    import transformers

    transformers.logging.set_verbosity_error()
    vision = {
        "hidden_size": s.image, "intermediate_size": s.mlp, "num_hidden_layers": s.blocks,
        "num_attention_heads": heads.get("vision", 2), "image_size": 14 * round(s.patches**0.5), "patch_size": 14,
    }  # fmt: skip
    qformer = {
        "vocab_size": s.words, "hidden_size": s.width, "num_hidden_layers": s.layers,
        "num_attention_heads": heads.get("qformer", 4), "intermediate_size": s.ffn, "encoder_hidden_size": s.image,
        "max_position_embeddings": s.positions,
    }  # fmt: skip
    if architecture == "Blip2ForImageTextRetrieval":
        qformer["use_qformer_text_input"] = True
    family = "InstructBlipConfig" if architecture.startswith("Instruct") else "Blip2Config"
    config = getattr(transformers, family)(
        vision_config=vision, qformer_config=qformer, text_config=dict(llm), num_query_tokens=s.queries,
        image_text_hidden_size=s.embed,
    )  # fmt: skip
    return getattr(transformers, architecture)(config).eval()


def without_key_bias(model: Any) -> None:
    """As in published models: the key has no bias in their ViT."""
    for layer in model.vision_model.encoder.layers:
        with torch.no_grad():
            layer.self_attn.qkv.bias.view(3, -1)[1].zero_()
