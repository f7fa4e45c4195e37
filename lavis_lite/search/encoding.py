"""A model as search uses it: pictures and texts to vectors, pairs to matching scores, and which model it is.

Legend: B rows, Q query tokens, E width of the projected vectors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from lavis_lite.api import build_recipe, load_preprocess
from lavis_lite.common.device import autocast, choose_device, choose_precision
from lavis_lite.common.errors import ConfigError
from lavis_lite.common.hub import PREFIX
from lavis_lite.common.logging import get_logger
from lavis_lite.common.model_recipe import enclosing_run, is_run, model_recipe, run_task

logger = get_logger(__name__)

NEEDED = ("query_features", "text_features", "match_logits", "project_image", "project_text")


@dataclass(frozen=True)
class ModelChoice:
    """Which model: `name`/`type` such as "blip2/shapes" with a checkpoint, or a run's folder; see `model_recipe`."""

    model: str
    checkpoint: str | None = None


class Encoder:
    """A stage-1 model (features and matching) with the processors of its preset.

    Args:
        model: with the methods of `tasks.gallery.MatchingModel`, in evaluation mode.
        processor: picture in RGB -> float32[3, H, W]. clean: a text as the model was trained with.
        identity: what an index remembers of the model, see `load_encoder`.
        precision: fp32, bf16 or fp16.
        itm_weight: how much re-ranking trusts the matching head beside ITC, unless a search says otherwise.
    """

    def __init__(
        self,
        model: Any,
        processor: Callable[[Image.Image], Tensor],
        clean: Callable[[str], str],
        identity: Mapping[str, Any],
        *,
        precision: str = "fp32",
        itm_weight: float = 1.0,
    ) -> None:
        self.model, self.processor, self.clean = model, processor, clean
        self.identity, self.precision, self.itm_weight = dict(identity), precision, itm_weight

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Processed pictures [B, 3, H, W] -> their projected queries float32[B, Q, E] on the CPU, normalised."""
        with self._autocast():
            queries = self.model.query_features(self.model.encode_image(images.to(self.model.device)))
        return nn.functional.normalize(queries.float(), dim=-1).cpu()

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts -> float32[B, 1, E] on the CPU, normalised."""
        with self._autocast():
            feats = self.model.text_features(self.model.tokenize([self.clean(text) for text in texts]))
        return nn.functional.normalize(feats.float(), dim=-1).cpu()[:, None]

    @torch.no_grad()
    def project_text(self, text: str) -> Any:
        """What `match` reads of a text, computed once for all pictures it is matched with."""
        with self._autocast():
            return self.model.project_text(self.model.tokenize([self.clean(text)]))

    @torch.no_grad()
    def match(self, images: Tensor, text: Any) -> Tensor:
        """ITM logits float32[B, 2] (no match, match) of processed pictures [B, 3, H, W] with one projected text."""
        with self._autocast():
            image_kv = self.model.project_image(self.model.encode_image(images.to(self.model.device)))
            logits = self.model.match_logits(image_kv, text[[0] * len(images)])
        return logits.float().cpu()

    @property
    def temperature(self) -> float:
        """ITC's, by which cosines are divided."""
        return float(self.model.temp.detach())

    def _autocast(self) -> Any:
        return autocast(self.model.device, self.precision)


def load_encoder(choice: ModelChoice, *, device: str = "auto", precision: str = "auto") -> Encoder:
    """The encoder of a chosen model. Its identity has a SHA-256 over all weights and the preset's pictures and texts.

    Raises ConfigError for a model without stage-1 features, and what `load_model` raises.
    """
    where = choose_device(device, where="--device")
    checkpoint = choice.checkpoint
    if checkpoint is not None and not checkpoint.startswith(PREFIX):
        checkpoint = str(Path(checkpoint).expanduser().absolute())
    recipe = model_recipe(choice.model, checkpoint=checkpoint)
    model = build_recipe(recipe, True, str(where))
    if not all(hasattr(model, method) for method in NEEDED):
        raise ConfigError(f"--model '{choice.model}': search needs a stage-1 model, such as blip2/shapes")
    vision, text = load_preprocess(recipe.preprocess)
    identity = {
        "model": str(Path(choice.model).expanduser().absolute()) if is_run(choice.model) else choice.model,
        "checkpoint": checkpoint,
        "fingerprint": fingerprint(
            model, {kind: splits.get("eval") for kind, splits in recipe.preprocess.items()}
        ),
    }
    chosen = choose_precision(precision, where)
    clean = text.get("eval", str)
    return Encoder(
        model, vision["eval"], clean, identity, precision=chosen, itm_weight=_evaluation_weight(choice)
    )


def _evaluation_weight(choice: ModelChoice) -> float:
    """`task.itm_weight` of the run that the weights lie in, or of the one that is the model; 1 without a run."""
    run = _run_of(choice)
    weight = run_task(run).get("itm_weight", 1.0) if run else 1.0
    if not isinstance(weight, int | float) or weight <= 0:
        raise ConfigError(
            f"'{run}': task.itm_weight in its config.yaml must be a number above 0, is {weight}"
        )
    logger.info(
        "re-ranking by sum weighs matching by %g, %s",
        weight,
        f"as '{run}' was evaluated" if run else "as there is no run to ask",
    )
    return float(weight)


def _run_of(choice: ModelChoice) -> str | Path | None:
    checkpoint = choice.checkpoint
    if checkpoint is not None and not checkpoint.startswith(PREFIX):
        run = enclosing_run(checkpoint)
        if run is not None:
            return run
    return choice.model if is_run(choice.model) else None


def fingerprint(model: nn.Module, preprocess: Mapping[str, Any]) -> str:
    """32 hexadecimal digits that differ when a weight or the way pictures and texts are prepared does."""
    digest = hashlib.sha256(json.dumps(preprocess, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(memoryview(content.numpy()))
    return digest.hexdigest()[:32]
