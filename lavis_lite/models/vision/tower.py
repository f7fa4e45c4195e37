"""The image side of a model: one encoder, frozen or trained, in the precision asked for."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from typing_extensions import Self

from lavis_lite.common.binding import bind
from lavis_lite.common.errors import ConfigError, UnknownNameError
from lavis_lite.common.registry import registry
from lavis_lite.image_features import ImageFeatures

CONTRACT = (
    "an encoder is an nn.Module from images [B, 3, H, W] to features [B, P, D], D = its int `num_features`"
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Precision = Literal["auto", "fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class TowerConfig:
    """The keys of a `vision_encoder` section that belong to the tower; all others are the encoder's keywords.

    name: a registered encoder.
    freeze: don't train it.
    precision: of a frozen encoder: fp32, bf16 or fp16, or auto: float32 weights, and the arithmetic of what surrounds
        it (run.precision).
    pretrained: true loads the encoder's usual weights, a path loads a file.
    grad_checkpointing: recompute activations of a trained encoder in the backward pass; without effect on a
        frozen one, which keeps none.
    """

    name: str
    freeze: bool = True
    precision: Precision = "fp32"
    pretrained: bool | str = False
    grad_checkpointing: bool = False


TOWER_KEYS = tuple(field.name for field in fields(TowerConfig))


class VisionTower(nn.Module):
    """An encoder as models use it: images float[B, 3, H, W] -> features float32[B, P, D].

    Frozen: no gradients and no graph, in eval mode whatever `train()` says, and computed in `precision`
    whatever autocast surrounds it, unless that is `auto`. Trained: float32 weights, the surrounding autocast
    decides the arithmetic.

    Low precision means low-precision weights of linear and convolution layers under autocast; norms,
    embeddings and the residual stream stay float32.

    Raises ConfigError when the encoder breaks the contract, or for a trained encoder in low precision (fp16
    fine-tuning of the ViT gives NaN).
    """

    def __init__(
        self,
        encoder: Any,
        *,
        freeze: bool = True,
        precision: Precision = "fp32",
        pretrained: bool | str = False,
        grad_checkpointing: bool = False,
        name: str = "encoder",
    ) -> None:
        super().__init__()
        _check_encoder(encoder, name)
        _check_precision(freeze, precision, "vision_encoder")
        if pretrained and not hasattr(encoder, "load_pretrained"):
            raise ConfigError(f"vision_encoder.pretrained: encoder '{name}' has no load_pretrained(source)")
        if grad_checkpointing and not hasattr(encoder, "set_grad_checkpointing"):
            raise ConfigError(
                f"vision_encoder.grad_checkpointing: encoder '{name}' has no set_grad_checkpointing(enable)"
            )
        self.name = name
        self.encoder: Any = encoder
        self.freeze = freeze
        self.dtype = DTYPES.get(precision)  # None: that of the surrounding autocast
        self.pretrained = pretrained
        self.num_features: int = encoder.num_features
        if freeze:
            encoder.requires_grad_(False)
            if self.dtype is not None:
                _lower_precision(encoder, self.dtype)
            self.eval()
        elif grad_checkpointing:
            encoder.set_grad_checkpointing(True)

    def forward(self, images: Tensor | ImageFeatures) -> Tensor:
        """Features float32[B, P, D] of images float[B, 3, H, W], or those that it made of them before.

        Raises ConfigError if the encoder gives others.
        """
        if isinstance(images, ImageFeatures):
            return self._made_before(images)
        if self.freeze:
            # Not inference_mode: its tensors can't be inputs of the trained layers that follow.
            with torch.no_grad(), self._autocast(images.device.type):
                features = self.encoder(images.float())
        else:
            features = self.encoder(images.float())
        _check_features(features, images, self.num_features, self.name)
        return features.float()

    def _made_before(self, stored: ImageFeatures) -> Tensor:
        shape = list(stored.values.shape)
        if not self.freeze:
            raise ConfigError(f"stored features {shape} can't stand for images of an encoder that is trained")
        if len(shape) != 3 or shape[2] != self.num_features:
            raise ConfigError(
                f"stored features {shape} are of another encoder: '{self.name}' makes [B, P, {self.num_features}]"
            )
        return stored.float()

    def train(self, mode: bool = True) -> Self:
        """Switch the mode of a trained encoder; a frozen one stays in eval mode."""
        return super().train(mode and not self.freeze)

    def load_pretrained(self) -> None:
        """Load the weights that the config asked for, if any. Raises CheckpointError."""
        if self.pretrained:
            self.encoder.load_pretrained(self.pretrained)

    def fit_positions(self, tensors: dict[str, Tensor], *, prefix: str) -> dict[str, Tensor]:
        """Tensors of a checkpoint whose position embeddings fit the encoder's image size, if it can interpolate.

        prefix: of this tower's names among them.
        """
        fit = getattr(self.encoder, "fit_positions", None)
        prefix += "encoder."
        own = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
        return tensors if fit is None else {**tensors, **{prefix + k: x for k, x in fit(own).items()}}

    def lr_scale(self, name: str, decay: float) -> float:
        """The factor on the learning rate of parameter `name` of this tower under layer-wise decay.

        decay ** (num_layers + 1 - layer), so the last block has decay and the embeddings have
        decay ** (num_layers + 1); an encoder without `num_layers` and `layer_id` is one layer.
        """
        if not (hasattr(self.encoder, "num_layers") and hasattr(self.encoder, "layer_id")):
            return decay
        layer = self.encoder.layer_id(name.removeprefix("encoder."))
        return float(decay ** (self.encoder.num_layers + 1 - layer))

    def _autocast(self, device_type: str) -> contextlib.AbstractContextManager[Any]:
        if (
            self.dtype is None or device_type == "meta"
        ):  # which has no autocast, and no values to be precise about
            return contextlib.nullcontext()
        low = self.dtype is not torch.float32
        return torch.autocast(device_type, dtype=self.dtype if low else None, enabled=low)


def build_vision_tower(cfg: Mapping[str, Any], *, where: str = "vision_encoder") -> VisionTower:
    """The tower of a `vision_encoder` section, at random and offline; `tower.load_pretrained()` fills it.

    Raises UnknownNameError, ConfigError.
    """
    validate_vision_config(cfg, where)
    config = TowerConfig(**bind(TowerConfig, _of_tower(cfg), where=where))
    build = registry.get_vision_encoder_class(config.name)
    encoder = build(**bind(build, cfg, where=where, skip=TOWER_KEYS))
    return VisionTower(
        encoder,
        freeze=config.freeze,
        precision=config.precision,
        pretrained=config.pretrained,
        grad_checkpointing=config.grad_checkpointing,
        name=config.name,
    )


def validate_vision_config(cfg: Mapping[str, Any], where: str = "vision_encoder") -> None:
    """Check a `vision_encoder` section against the tower's keys and the encoder's signature; builds nothing.

    Raises UnknownNameError for an encoder that isn't registered, ConfigError for wrong keys and values.
    """
    if not isinstance(cfg, Mapping):
        raise ConfigError(f"{where}: expected keys and values such as `name: eva_clip_g`, got {cfg!r}")
    if not isinstance(cfg.get("name"), str):
        names = ", ".join(registry.names("vision_encoder"))
        raise ConfigError(f"{where}.name: give an encoder's name: {names}")
    try:
        build = registry.get_vision_encoder_class(cfg["name"])
    except UnknownNameError as error:
        raise UnknownNameError(f"{where}.name: {error}") from error
    _check_signature(build, cfg["name"], where)
    bind(build, cfg, where=where, skip=TOWER_KEYS)
    config = TowerConfig(**bind(TowerConfig, _of_tower(cfg), where=where))
    _check_precision(config.freeze, config.precision, where)
    if hasattr(build, "validate_config"):
        own = {key: value for key, value in cfg.items() if key not in TOWER_KEYS}
        build.validate_config(own, where=where)


def _of_tower(cfg: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in cfg.items() if key in TOWER_KEYS}


def _check_signature(build: Callable[..., nn.Module], name: str, where: str) -> None:
    taken = [key for key in inspect.signature(build).parameters if key in TOWER_KEYS]
    if taken:
        raise ConfigError(
            f"{where}: encoder '{name}' takes a keyword '{taken[0]}', which is the tower's; "
            "weights are loaded by a method load_pretrained(source) of the encoder"
        )


def _check_precision(freeze: bool, precision: str, where: str) -> None:
    if not freeze and precision not in ("fp32", "auto"):
        raise ConfigError(
            f"{where}.precision: {precision} is for a frozen encoder; a trained one keeps fp32 weights "
            "(set precision: fp32; run.precision chooses the arithmetic)"
        )


def _check_encoder(encoder: object, name: str) -> None:
    if not isinstance(encoder, nn.Module):
        raise ConfigError(f"encoder '{name}' is of type {type(encoder).__name__}; {CONTRACT}")
    width = getattr(encoder, "num_features", None)
    if not isinstance(width, int) or isinstance(width, bool) or width < 1:
        raise ConfigError(f"encoder '{name}' has num_features = {width!r}; {CONTRACT}")


def _check_features(features: object, images: Tensor, width: int, name: str) -> None:
    if not isinstance(features, Tensor):
        raise ConfigError(f"encoder '{name}' returned {type(features).__name__}; {CONTRACT}")
    if features.dim() != 3 or features.shape[0] != images.shape[0] or features.shape[2] != width:
        raise ConfigError(
            f"encoder '{name}' with num_features = {width} made {list(features.shape)} of images "
            f"{list(images.shape)}; {CONTRACT}"
        )


def low_precision_layers(encoder: nn.Module) -> Iterator[nn.Module]:
    """The layers of matrix products: nearly all of the memory; autocast takes care of the rest."""
    return (module for module in encoder.modules() if isinstance(module, (nn.Linear, _ConvNd)))


def _lower_precision(encoder: nn.Module, dtype: torch.dtype) -> None:
    for layer in low_precision_layers(encoder):
        # On the meta device, where shapes are worked out, there is no autocast to mix types.
        if not layer.weight.is_meta:
            layer.to(dtype)
