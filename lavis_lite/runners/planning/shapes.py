"""A configuration's model and batch as mere shapes, built offline whatever files the configuration names."""

from __future__ import annotations

import contextlib
import inspect
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# Documented in torch's notes ("Fake tensor") although its name begins with an underscore: tensors that have a device,
# so that autocast and the choice of kernels work as they will, and no storage. The meta device has no autocast.
from torch._subclasses.fake_tensor import FakeTensorMode

from lavis_lite.common.config import Config
from lavis_lite.common.errors import ConfigError
from lavis_lite.common.registry import registry
from lavis_lite.image_features import DTYPES, FeaturePrecision, ImageFeatures
from lavis_lite.models.base import BaseModel, without_sources
from lavis_lite.models.blip2_base import Blip2Base
from lavis_lite.models.vision.tower import low_precision_layers
from lavis_lite.processors.video import VideoProcessor

# Tokenizers on the hub whose files a plan can do without, by the size of their vocabulary.
VOCABULARIES = {"bert-base-uncased": 30522}
CHAT_TOKENS = 24  # what a chat template writes around a prompt, roughly


@dataclass(frozen=True)
class Shape:
    """A model without storage. text_tokens: the length of every text of a batch. mode: what makes such tensors.

    stored_tokens: P, where features of pictures are read from disk in the place of pictures, in that precision.
    frames: F, where rows are clips.
    """

    model: Blip2Base
    mode: FakeTensorMode
    image_size: int
    text_tokens: int
    stored_tokens: int | None = None
    stored_precision: FeaturePrecision = "bf16"
    frames: int | None = None

    def samples(self, batch: int) -> dict[str, Any]:
        """A batch [B, 3, H, W], of clips [B, F, 3, H, W], with texts of full length: the most that one can need."""
        with self.mode:
            image = self._images(batch)
        text = " ".join(["a"] * self.text_tokens)
        samples: dict[str, Any] = {"video" if self.frames else "image": image, "text_input": [text] * batch}
        if getattr(self.model, "takes_questions", False):
            samples["text_output"] = ["a a"] * batch
        return samples

    def _images(self, batch: int) -> Tensor | ImageFeatures:
        if self.stored_tokens is None:
            clip = () if self.frames is None else (self.frames,)
            return torch.empty(batch, *clip, 3, self.image_size, self.image_size)
        shape = (batch, self.stored_tokens, self.model.visual_encoder.num_features)
        values = torch.empty(shape, dtype=DTYPES[self.stored_precision])
        return ImageFeatures(values, torch.empty(*shape[:2], 1) if self.stored_precision == "int8" else None)


def build_shape(cfg: Config, *, text_tokens: int | None = None, stored_features: bool = False) -> Shape:
    """The shape of a configuration's model, in training mode.

    Args:
        text_tokens: of every text; by default `max_txt_len`, the longest there can be.
        stored_features: the image encoder's features are read from disk; it stays, as validation needs it.

    Raises ConfigError for a model that isn't a BLIP-2, or one whose architecture isn't known offline.
    """
    model_class = registry.get_model_class(cfg.model["arch"])
    if not issubclass(model_class, Blip2Base):
        raise ConfigError(f"model.arch: a plan needs a BLIP-2 model, and '{cfg.model['arch']}' is none")
    with offline_section(model_class, cfg.model) as section, torch.device("meta"):
        model = model_class.from_config(section)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    _give_device(model, mode)
    if hasattr(model, "language_model"):
        model.language_model.tokenizer = WordTokens(model.language_model.model.config)
    image_size = image_size_of(cfg, model)
    shape = Shape(model.train(), mode, image_size, text_tokens or model.max_txt_len, frames=frames_of(cfg))
    if not stored_features:
        return shape
    return replace(shape, stored_tokens=_tokens(shape), stored_precision=cfg.run.features.precision)


@contextlib.contextmanager
def offline_section(model_class: type[BaseModel], section: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A model section that loads no weights, and no tokenizer whose vocabulary's size is known anyway."""
    own = without_sources(section)
    for part in ("vision_encoder", "language_model", "qformer"):
        if isinstance(own.get(part), Mapping):
            own[part] = {**own[part], "pretrained": None if part == "qformer" else False}
    parameter = inspect.signature(model_class).parameters.get("tokenizer")
    source = own.get("tokenizer", parameter.default if parameter else None)
    if source not in VOCABULARIES:
        yield own
        return
    with tempfile.TemporaryDirectory() as folder:
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        words = [*special, *(f"w{index}" for index in range(VOCABULARIES[source] - len(special)))]
        (Path(folder) / "vocab.txt").write_text("\n".join(words) + "\n")
        yield {**own, "tokenizer": folder}


def _give_device(model: Blip2Base, mode: FakeTensorMode) -> None:
    """Put a model on the meta device onto a CPU without storage; tied parameters stay tied."""
    tower = model.visual_encoder
    lowered: dict[Tensor, torch.dtype] = {}
    if tower.freeze and tower.dtype is not None:
        layers = low_precision_layers(tower.encoder)
        lowered = {p: tower.dtype for layer in layers for p in layer.parameters(recurse=False)}
    made: dict[Tensor, nn.Parameter] = {}
    with mode:
        for module in model.modules():
            kept = module.state_dict(keep_vars=True)
            for name, old in list(module.named_parameters(recurse=False)):
                if old not in made:
                    empty = torch.empty_like(old, dtype=lowered.get(old, old.dtype), device="cpu")
                    made[old] = nn.Parameter(empty, requires_grad=old.requires_grad)
                module.register_parameter(name, made[old])
            for name, buffer in list(module.named_buffers(recurse=False)):
                module.register_buffer(name, torch.empty_like(buffer, device="cpu"), persistent=name in kept)


def image_size_of(cfg: Config, model: Blip2Base) -> int:
    """The side of the pictures that the training split's processor gives, else what the encoder is built for."""
    for processor in _train_processors(cfg):
        of_pictures = (processor.get("frames") or {}) if _is_of_clips(processor) else processor
        if isinstance(of_pictures.get("image_size"), int):
            return int(of_pictures["image_size"])
    size = (cfg.model.get("vision_encoder") or {}).get("image_size")
    size = getattr(model.visual_encoder.encoder, "image_size", None) if size is None else size
    if not isinstance(size, int):
        raise ConfigError("model.vision_encoder.image_size is missing: a plan needs the size of the pictures")
    return size


def frames_of(cfg: Config) -> int | None:
    """The largest number of frames of the clips that training reads; None where it reads pictures."""
    default = inspect.signature(VideoProcessor).parameters["num_frames"].default
    clips = [processor for processor in _train_processors(cfg) if _is_of_clips(processor)]
    return max((int(processor.get("num_frames", default)) for processor in clips), default=None)


def _is_of_clips(processor: Mapping[str, Any]) -> bool:
    return processor.get("name") == "video"


def _train_processors(cfg: Config) -> Iterator[Mapping[str, Any]]:
    """The training split's sections vis_processor, the builders' own where a dataset has none."""
    for section in cfg.datasets.values():
        builder = registry.get_builder_class(section.get("builder", "image_text"))
        own = section.get("vis_processor") or {}
        yield own.get("train") or getattr(builder, "default_vis", {}).get("train") or {}


def _tokens(shape: Shape) -> int:
    """P of the encoder's features."""
    with shape.mode:
        features: Tensor = shape.model.visual_encoder(torch.empty(1, 3, shape.image_size, shape.image_size))
    return features.shape[1]


class WordTokens:
    """Stands for a language model's tokenizer: every word is a token, which is all that shapes depend on."""

    def __init__(self, config: Any) -> None:
        self.eos_token_id = self.pad_token_id = 1
        # Decoder-only models begin a text with a token of its own.
        self._first = [] if getattr(config, "is_encoder_decoder", False) else [0]

    def __call__(
        self, text: str, *, add_special_tokens: bool = True, return_offsets_mapping: bool = False
    ) -> dict[str, Any]:
        """Ids, and where asked for the words' places in the text."""
        places = [match.span() for match in re.finditer(r"\S+|\n", text)]
        first = self._first if add_special_tokens else []
        encoded: dict[str, Any] = {"input_ids": [*first, *[2] * len(places)]}
        if return_offsets_mapping:
            encoded["offset_mapping"] = [*[(0, 0)] * len(first), *places]
        return encoded

    def apply_chat_template(self, messages: list[dict[str, str]], **settings: Any) -> str:
        """The messages with as many words around them as templates write."""
        return " ".join([*["x"] * CHAT_TOKENS, *(message["content"] for message in messages)])
