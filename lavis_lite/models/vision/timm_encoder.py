"""Any timm model by its name: SigLIP, DINOv2, a convnet."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import timm

from lavis_lite.common.binding import bind
from lavis_lite.common.errors import ConfigError, UnknownNameError, closest
from lavis_lite.common.registry import registry
from lavis_lite.models.vision.timm_features import TimmFeatures, check_image_size
from lavis_lite.models.vision.weights import Layout


@registry.register_vision_encoder("timm")
class TimmEncoder(TimmFeatures):
    """A timm model by name: images [B, 3, H, W] -> features [B, P, D] of an inner layer, without final norm.

    A transformer gives its class token and registers, then its patches; a convnet gives its grid row by row.

    Args:
        model_name: timm's name, such as `vit_base_patch16_siglip_224.webli`; the part behind the point
            chooses the weights that `pretrained: true` loads.
        image_size: the side in pixels; null is the model's own.
        layer: the block of a transformer or the stage of a convnet whose output is taken; negative
            from the end.
        drop_path_rate: stochastic depth while training.
    """

    def __init__(
        self,
        *,
        model_name: str,
        image_size: int | None = None,
        layer: int = -2,
        drop_path_rate: float = 0.0,
    ) -> None:
        _check_name(model_name, "model_name")
        build = partial(_build, model_name, image_size=image_size, drop_path_rate=drop_path_rate)
        model = build(pretrained=False)
        super().__init__(
            model,
            name=f"timm {model_name}",
            hub=lambda: build(pretrained=True).state_dict(),
            layouts=[_own_layout(model)],
            layer=layer,
        )

    @classmethod
    def validate_config(cls, cfg: Mapping[str, Any], *, where: str) -> None:
        """Check keys, types and the model's name without building it; ConfigError, UnknownNameError."""
        bind(cls, cfg, where=where)
        _check_name(cfg["model_name"], f"{where}.model_name")


def _check_name(model_name: str, where: str) -> None:
    architecture = model_name.split(".")[0]
    if not timm.is_model(architecture):
        hint = closest(architecture, timm.list_models()) or "timm.list_models() lists them"
        raise UnknownNameError(f"{where}: timm has no model '{architecture}'; {hint}")
    weights = timm.list_pretrained(f"{architecture}.*")
    if "." in model_name and model_name not in weights:
        hint = f"there are: {', '.join(weights)}" if weights else "it has none"
        raise UnknownNameError(f"{where}: timm knows no weights '{model_name}'; {hint}")


def _build(model_name: str, *, image_size: int | None, drop_path_rate: float, pretrained: bool) -> Any:
    # Not every model has the argument, so it's passed only when it does something.
    extra = {"drop_path_rate": drop_path_rate} if drop_path_rate else {}
    try:
        model = timm.create_model(model_name, pretrained=pretrained, num_classes=0, **extra)
    except TypeError as error:
        raise ConfigError(f"timm {model_name}: {error}") from error
    # Convnets take any size; models with position embeddings or windows are set to it.
    if image_size is not None and hasattr(model, "set_input_size"):
        patch_size = getattr(getattr(model, "patch_embed", None), "patch_size", (1, 1))
        check_image_size(image_size, patch_size[0], f"timm {model_name}")
        try:
            model.set_input_size(img_size=(image_size, image_size))
        except (AssertionError, ValueError, RuntimeError) as error:
            raise ConfigError(f"timm {model_name}: image_size {image_size} doesn't fit: {error}") from error
    return model


def _own_layout(model: Any) -> Layout:
    """timm's own names; the classifier, which a file may have, is dropped."""
    classifier = model.pretrained_cfg.get("classifier") or ()
    names = [classifier] if isinstance(classifier, str) else list(classifier)
    head: list[tuple[str, str | None]] = [(re.escape(name) + r"\.(weight|bias)", None) for name in names]
    # Every other key passes: the strict load compares it with the model's own.
    return Layout(name="timm", marker=r".*", rules=[*head, (r".*", r"\g<0>")])
