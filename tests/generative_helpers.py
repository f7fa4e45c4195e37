"""Tiny stage-2 models of both families with the shapes world's tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stage1_helpers import tiny_config

from lavis_lite.worlds.shapes.lm_tokenizers import build_tokenizer

FAMILIES = ("opt", "t5", "llama")
SIZES: dict[str, dict[str, Any]] = {
    "opt": {
        "model_type": "opt",
        "hidden_size": 24,
        "word_embed_proj_dim": 24,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 96,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "pad_token_id": 0,
    },
    "llama": {
        "model_type": "llama",
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 96,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "pad_token_id": 0,
    },
    "t5": {
        "model_type": "t5",
        "d_model": 24,
        "d_kv": 12,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 2,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "decoder_start_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
    },
}
ADAPTERS = {"opt": "opt", "llama": "causal_lm", "t5": "t5"}


def write_llm_tokenizer(folder: Path, family: str) -> str:
    """The folder of a tokenizer for language models of that family."""
    build_tokenizer("t5" if family == "t5" else "opt").save_pretrained(str(folder))
    return str(folder)


def tiny_generative_config(folder: Path, family: str, **changes: Any) -> dict[str, Any]:
    """A stage-2 model section; `language_model` in `changes` is laid over the tiny one."""
    tokenizer = write_llm_tokenizer(folder, family)
    size = len(build_tokenizer("t5" if family == "t5" else "opt"))
    language_model: dict[str, Any] = {
        "name": ADAPTERS[family],
        "model_name": tokenizer,
        "config": {**SIZES[family], "vocab_size": size},
        **({"end_of_text": "\n"} if family == "opt" else {}),
        **changes.pop("language_model", {}),
    }
    config = tiny_config("unused", **changes)
    for key in ("tokenizer", "embed_dim"):
        del config[key]
    return {**config, "language_model": language_model}
