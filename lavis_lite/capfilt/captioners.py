"""What samples captions of pictures: a model of ours, or an image-to-text model of transformers.

B pictures, K captions each, L tokens at most, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from lavis_lite.api import load_model_and_preprocess
from lavis_lite.capfilt.settings import Settings, parse_model
from lavis_lite.capfilt.transformers_models import load_pretrained
from lavis_lite.common.device import autocast
from lavis_lite.common.errors import ConfigError
from lavis_lite.models.decoding import draw_from_nucleus


class Captioner(Protocol):
    """Samples captions; each token by a number it is given, so that nothing else decides."""

    def captions(self, images: Sequence[Image.Image], draws: Tensor) -> list[list[str]]:
        """K captions of each of B pictures in RGB; draws: float32[B * K, L] in [0, 1), a picture's rows together."""
        ...


def build_captioner(settings: Settings, device: torch.device, precision: str) -> Captioner:
    """The captioner that the settings name, on a device; ConfigError or CheckpointError when there is none."""
    named = parse_model(settings.captioner, "captioner")
    if not named.ours:
        return TransformersCaptioner(named.name, settings, device, precision)
    model, processors, _ = load_model_and_preprocess(named.name, None, True, str(device), named.checkpoint)
    if not hasattr(model, "generate"):
        raise ConfigError(f"--captioner '{settings.captioner}': this model generates no text")
    if settings.prompt and not getattr(model, "takes_prompt", True):
        raise ConfigError(f"--prompt: --captioner '{settings.captioner}' takes none; leave it out")
    return OurCaptioner(model, processors["eval"], settings, autocast(device, precision))


class OurCaptioner:
    """Any model with `generate`."""

    def __init__(
        self, model: Any, processor: Any, settings: Settings, arithmetic: AbstractContextManager[None]
    ) -> None:
        self.model = model
        self.processor = processor
        self.settings = settings
        self.arithmetic = arithmetic

    def captions(self, images: Sequence[Image.Image], draws: Tensor) -> list[list[str]]:
        """See `Captioner`."""
        settings = self.settings
        samples: dict[str, Any] = {"image": torch.stack([self.processor(image) for image in images])}
        samples["image"] = samples["image"].to(self.model.device)
        if settings.prompt is not None:
            samples["prompt"] = settings.prompt
        with self.arithmetic:
            said = self.model.generate(
                samples,
                use_nucleus_sampling=True,
                num_captions=settings.num_captions,
                min_length=settings.min_length,
                max_length=settings.max_length,
                top_p=settings.top_p,
                temperature=settings.temperature,
                draws=draws,
            )
        return _by_picture(said, settings.num_captions)


class TransformersCaptioner:
    """Any of transformers' AutoModelForImageTextToText that captions without a chat template, such as BLIP or GIT."""

    def __init__(self, name: str, settings: Settings, device: torch.device, precision: str) -> None:
        self.model, self.processor = load_pretrained(
            name, "AutoModelForImageTextToText", device, precision, role="captioner"
        )
        self.settings = settings

    @torch.no_grad()
    def captions(self, images: Sequence[Image.Image], draws: Tensor) -> list[list[str]]:
        """See `Captioner`."""
        settings, prompt = self.settings, self.settings.prompt
        texts = {} if prompt is None else {"text": [prompt] * len(images)}
        inputs = self.processor(images=list(images), return_tensors="pt", **texts)
        inputs = inputs.to(self.model.device, self.model.dtype)
        # The token is chosen by the last processor, which leaves nothing else to choose: sampling is only named because
        # transformers gives several texts for one input to nothing else.
        said = self.model.generate(
            **inputs,
            logits_processor=[_ChooseByDraws(draws, settings.top_p, settings.temperature)],
            do_sample=True,
            num_beams=1,
            num_return_sequences=settings.num_captions,
            min_new_tokens=settings.min_length,
            max_new_tokens=settings.max_length,
        )
        spoken = self.processor.batch_decode(said, skip_special_tokens=True)
        return _by_picture([_without(text, prompt or "") for text in spoken], settings.num_captions)


class _ChooseByDraws:
    """A logits processor of transformers that leaves each row one token, the one its number draws from the nucleus."""

    def __init__(self, draws: Tensor, top_p: float, temperature: float) -> None:
        self.draws = draws
        self.top_p = top_p
        self.temperature = temperature
        self.place = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits [B * K, V] -> 0 for the token drawn, -inf for all others."""
        chance = self.draws[:, self.place].to(scores.device)
        self.place += 1
        probs = (scores.float() / self.temperature).softmax(-1)
        drawn = draw_from_nucleus(probs, self.top_p, chance)
        return torch.full_like(scores, float("-inf")).scatter(1, drawn[:, None], 0.0)


def _without(text: str, prompt: str) -> str:
    """Decoder-only models repeat their prompt."""
    return text[len(prompt) :] if text.lower().startswith(prompt.lower()) else text


def _by_picture(texts: Sequence[str], each: int) -> list[list[str]]:
    return [[text.strip() for text in texts[at : at + each]] for at in range(0, len(texts), each)]
