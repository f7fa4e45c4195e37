"""The config.json of a Hugging Face folder: given and checked, or told by the shapes of a published model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lavis_lite.common.errors import CheckpointError
from lavis_lite.common.tensor_reader import first_of
from lavis_lite.models.convert import hf
from lavis_lite.models.convert.rules import Renamed

# Which config class belongs to which model class.
CLASSES = {
    "Blip2ForConditionalGeneration": "Blip2Config",
    "Blip2ForImageTextRetrieval": "Blip2Config",
    "Blip2Model": "Blip2Config",
    "InstructBlipForConditionalGeneration": "InstructBlipConfig",
}
# Heads are in no shape, so only published widths tell the rest: ViT-g/14 and BERT-base, which are the defaults of
# Hugging Face's classes, and the paper's language models by their family and width.
VISION_WIDTH, PATCH_SIZE, QFORMER_WIDTH = 1408, 14, 768
_OPT = {"model_type": "opt", "num_hidden_layers": 32, "num_attention_heads": 32, "eos_token_id": 50118}
_T5 = {
    "model_type": "t5",
    "num_layers": 24,
    "d_kv": 64,
    "feed_forward_proj": "gated-gelu",
    "vocab_size": 32128,
}
LANGUAGE_MODELS: dict[tuple[str | None, int], dict[str, Any]] = {
    ("opt", 2560): {**_OPT, "hidden_size": 2560, "ffn_dim": 10240, "word_embed_proj_dim": 2560},
    ("opt", 4096): {**_OPT, "hidden_size": 4096, "ffn_dim": 16384, "word_embed_proj_dim": 4096},
    ("t5", 2048): {**_T5, "d_model": 2048, "d_ff": 5120, "num_heads": 32, "tie_word_embeddings": False},
    ("t5", 4096): {**_T5, "d_model": 4096, "d_ff": 10240, "num_heads": 64, "tie_word_embeddings": False},
}
_FROZEN = {"vision_model.": "the image encoder", "language_model.": "the language model"}
_WORDS = ("embeddings.word_embeddings.weight", "qformer.embeddings.word_embeddings.weight")
_POSITIONS = ("embeddings.position_embeddings.weight", "qformer.embeddings.position_embeddings.weight")
_LM_WORDS = ("language_model.model.decoder.embed_tokens.weight", "language_model.shared.weight")


def config_for(
    tensors: Renamed, llm: str | None, *, given: Path | None
) -> tuple[str | None, tuple[str, ...]]:
    """The text of a config.json for tensors under Hugging Face's names, and notes for the user.

    Args:
        given: a config.json; without it the weights must be of published sizes, or there is no text.

    Raises CheckpointError when it describes another model: names or shapes that its class doesn't have.
    """
    architecture = tensors.layout.name.removeprefix(hf.NAME)
    if given is not None:
        text = given.read_text()
        config = _parsed(text, given)
        architecture = (config.get("architectures") or [architecture])[0]
        if architecture not in CLASSES:
            raise CheckpointError(f"'{given}' is of class {architecture}; known: {', '.join(CLASSES)}")
    else:
        told = _told_by_shapes(tensors, llm, architecture)
        if told is None:
            note = "no config.json: the sizes are no published model's; give that of one by --config"
            return None, (note,)
        config, text = told, json.dumps(told, indent=2) + "\n"
    return text, _compare(
        tensors, config, architecture, where=f"'{given}'" if given else "the derived config"
    )


def _parsed(text: str, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"'{path}' is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"'{path}' is no model's config.json")
    return content


def _told_by_shapes(tensors: Renamed, llm: str | None, architecture: str) -> dict[str, Any] | None:
    _, count, width = tensors.spec("query_tokens").shape
    image_width = tensors.spec("vision_model.post_layernorm.weight").shape[0]
    if (image_width, width) != (VISION_WIDTH, QFORMER_WIDTH):
        return None
    config: dict[str, Any] = {
        "model_type": CLASSES[architecture].removesuffix("Config").lower().replace("blip2", "blip-2"),
        "architectures": [architecture],
        "num_query_tokens": count,
        "qformer_config": _qformer_config(tensors, architecture),
        "vision_config": {"image_size": _image_size(tensors)},
    }
    if "vision_projection.weight" in tensors:
        return config | {"image_text_hidden_size": tensors.spec("vision_projection.weight").shape[0]}
    sizes = LANGUAGE_MODELS.get((llm, tensors.spec("language_projection.weight").shape[0]))
    if sizes is None:
        return None
    words = next((tensors.spec(name).shape[0] for name in _LM_WORDS if name in tensors), None)
    return config | {"text_config": sizes if words is None else {**sizes, "vocab_size": words}}


def _qformer_config(tensors: Renamed, architecture: str) -> dict[str, Any]:
    config: dict[str, Any] = {"encoder_hidden_size": VISION_WIDTH}
    for key, names in (("vocab_size", _WORDS), ("max_position_embeddings", _POSITIONS)):
        table = next((name for name in names if name in tensors), None)
        if table is not None:
            config[key] = tensors.spec(table).shape[0]
    if architecture == "Blip2ForImageTextRetrieval":
        config["use_qformer_text_input"] = True
    return config


def _image_size(tensors: Renamed) -> int:
    name = "vision_model.embeddings.position_embedding"
    return PATCH_SIZE * math.isqrt(tensors.spec(name).shape[1] - 1) if name in tensors else 224


def _compare(
    tensors: Renamed, config: Mapping[str, Any], architecture: str, *, where: str
) -> tuple[str, ...]:
    """Notes on what the class has and the weights don't; CheckpointError where they disagree."""
    import transformers

    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with torch.device("meta"):
            built = getattr(transformers, CLASSES[architecture]).from_dict(dict(config))
            model = getattr(transformers, architecture)(built)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{where} is no config.json for {architecture}: {error}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wrong = [
        f"{name} {tuple(tensors.spec(name).shape)} there {expected.get(name, 'absent')}"
        for name in tensors
        if expected.get(name) != tuple(tensors.spec(name).shape)
    ]
    if wrong:
        raise CheckpointError(f"{where} is for another model: {first_of(wrong)}")
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    missing = [name for name in expected if name not in tensors and tied.get(name) not in tensors]
    notes = [
        f"without {what} ({prefix}*), which is frozen and in the source neither: load it from its own files"
        for prefix, what in _FROZEN.items()
        if any(name.startswith(prefix) for name in missing)
    ]
    others = [name for name in missing if not name.startswith(tuple(_FROZEN))]
    if others:
        raise CheckpointError(f"{where}: the weights lack {first_of(others)}")
    return tuple(notes)
