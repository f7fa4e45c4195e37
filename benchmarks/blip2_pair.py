"""Hugging Face's BLIP-2 and ours with the same random weights, for benchmarks that put them side by side.

The ViT is small (6 blocks of width 384) because both sides compute the same there; Q-Former and language models have
BERT-base's and OPT-125M's / FlanT5-base's widths and vocabularies.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lavis_lite.common.registry import registry
from lavis_lite.models.blip2_generative import Blip2Generative
from lavis_lite.models.convert.formats import our_names
from lavis_lite.models.vision.eva import PATCH_SIZE, build_eva
from lavis_lite.models.vision.timm_features import TimmFeatures

Family = Literal["opt", "t5"]
FAMILIES: tuple[Family, ...] = ("opt", "t5")
PAD, END, UNKNOWN, IMAGE = "<pad>", "</s>", "<unk>", "<image>"
SPECIAL = [PAD, END, UNKNOWN, IMAGE]
PROMPT = "a photo of"
# Of random weights: output scale / input scale, where it isn't 1.
GAINS = {"lm_head": 3.0, "q": 0.5, "k": 0.5}


@dataclass(frozen=True)
class Vision:
    """The image encoder's shape: blocks that are left of it, pixels on a side."""

    width: int = 384
    blocks: int = 6
    num_heads: int = 6
    mlp_width: int = 1536
    image_size: int = 224


@dataclass(frozen=True)
class Sizes:
    """Of both models: Q-Former as in BERT; language models of `llm_layers` blocks (T5: on either side).

    vocabulary: of OPT and T5.
    """

    vision: Vision
    queries: int = 32
    layers: int = 12
    width: int = 768
    num_heads: int = 12
    llm_layers: int = 6
    llm_width: int = 768
    llm_heads: int = 12
    opt_ffn: int = 3072
    t5_ffn: int = 2048
    vocabulary: tuple[int, int] = (50272, 32128)


MODERATE = Sizes(Vision())
TINY = Sizes(Vision(24, 2, 2, 48, 28), 5, 4, 32, 4, 2, 24, 2, 48, 48, (60, 50))


@registry.register_vision_encoder("benchmark_eva")
def benchmark_eva(
    *, width: int, blocks: int, num_heads: int, mlp_width: int, image_size: int
) -> TimmFeatures:
    """EVA-CLIP's architecture in the sizes of `Vision`."""
    return build_eva(
        image_size=image_size, width=width, depth=blocks + 1, num_heads=num_heads, mlp_width=mlp_width
    )


def text_config(family: Family, sizes: Sizes) -> dict[str, Any]:
    """The language model's sizes as transformers names them; dropout off, since frozen models have none."""
    width, heads = sizes.llm_width, sizes.llm_heads
    ids = {"pad_token_id": 0, "eos_token_id": 1, "dropout": 0.0, "attention_dropout": 0.0}
    if family == "opt":
        return {
            **ids,
            "model_type": "opt",
            "vocab_size": sizes.vocabulary[0],
            "hidden_size": width,
            "word_embed_proj_dim": width,
            "ffn_dim": sizes.opt_ffn,
            "num_hidden_layers": sizes.llm_layers,
            "num_attention_heads": heads,
            "bos_token_id": 1,
            "max_position_embeddings": 256,
            # Tied at random, a model says its last token again and again.
            "tie_word_embeddings": False,
        }
    return {
        **ids,
        "model_type": "t5",
        "vocab_size": sizes.vocabulary[1],
        "d_model": width,
        "d_kv": width // heads,
        "d_ff": sizes.t5_ffn,
        "num_layers": sizes.llm_layers,
        "num_heads": heads,
        "dropout_rate": 0.0,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "decoder_start_token_id": 0,
    }


def word_count(family: Family, sizes: Sizes) -> int:
    """How many words w0, w1, ... the vocabulary has room for."""
    return sizes.vocabulary[FAMILIES.index(family)] - len(SPECIAL) - len(PROMPT.split())


def build_tokenizer(family: Family, sizes: Sizes) -> Any:
    """One token a word: the prompt's words and w0, w1, ... up to the vocabulary; special tokens where the family has
    them (OPT before a text, T5 after it)."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, *PROMPT.split(), *(f"w{number}" for number in range(word_count(family, sizes)))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pattern = f"{END} $A" if family == "opt" else f"$A {END}"
    ending = [(END, words.index(END))]
    inner.post_processor = processors.TemplateProcessing(single=pattern, special_tokens=ending)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        additional_special_tokens=[IMAGE],
    )


def make_theirs(family: Family, sizes: Sizes, *, seed: int = 0, text_side: bool = False) -> Any:
    """A random `Blip2ForConditionalGeneration` without dropout, in eval mode.

    text_side: build the Q-Former's networks for text, which nothing here uses.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(seed)
    vision = {
        "hidden_size": sizes.vision.width,
        "intermediate_size": sizes.vision.mlp_width,
        "num_hidden_layers": sizes.vision.blocks,
        "num_attention_heads": sizes.vision.num_heads,
        "image_size": sizes.vision.image_size,
        "patch_size": PATCH_SIZE,
    }
    qformer = {
        "hidden_size": sizes.width,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.num_heads,
        "intermediate_size": 4 * sizes.width,
        "encoder_hidden_size": sizes.vision.width,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "use_qformer_text_input": text_side,
    }
    config = transformers.Blip2Config(
        vision_config=vision,
        qformer_config=qformer,
        text_config=text_config(family, sizes),
        num_query_tokens=sizes.queries,
        image_token_index=SPECIAL.index(IMAGE),
    )
    theirs = transformers.Blip2ForConditionalGeneration(config).eval()
    # They compute the norm before the Q-Former with the ViT's eps; LAVIS, and we, with 1e-5.
    theirs.vision_model.post_layernorm.eps = 1e-5
    nn.init.normal_(theirs.query_tokens)
    for name, weight in theirs.named_parameters():
        if weight.dim() == 2:
            # As they are drawn by default, every image gets the same text, often one word again and again.
            nn.init.normal_(weight, std=GAINS.get(name.split(".")[-2], 1.0) * weight.shape[1] ** -0.5)
    return theirs


def make_ours(family: Family, sizes: Sizes, folder: Path, *, prompt: str = "") -> Blip2Generative:
    """Our model of the same sizes, random, without dropout; its tokenizer is written to the folder."""
    build_tokenizer(family, sizes).save_pretrained(str(folder))
    config = {
        "vision_encoder": {"name": "benchmark_eva", **asdict(sizes.vision)},
        "language_model": {
            "name": family,
            "model_name": str(folder),
            "config": text_config(family, sizes),
        },
        "qformer": {
            "num_layers": sizes.layers,
            "hidden_size": sizes.width,
            "num_heads": sizes.num_heads,
            "intermediate_size": 4 * sizes.width,
            "num_query_token": sizes.queries,
            "dropout": 0.0,
        },
        "prompt": prompt,
    }
    return Blip2Generative.from_config(config)


def copy_weights(theirs: Any, ours: Blip2Generative) -> None:
    """Ours becomes their model: every weight of it, and none of theirs left over but the Q-Former's text side."""
    text_side = re.compile(r"qformer\.encoder\.layer\.\d+\.(intermediate|output)\.")
    state = {name: tensor for name, tensor in theirs.state_dict().items() if not text_side.match(name)}
    ours.load_state_dict(our_names(state), strict=True)


def draw_images(batch: int, sizes: Sizes, generator: torch.Generator) -> Tensor:
    """Noise, every image of another colour, float[B, 3, H, W]."""
    side = sizes.vision.image_size
    colours = torch.randn(batch, 3, 1, 1, generator=generator)
    return colours + torch.randn(batch, 3, side, side, generator=generator)
