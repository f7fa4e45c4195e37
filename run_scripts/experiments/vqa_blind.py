"""A model that sees nothing: what its language model knows of answers by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from lavis_lite import registry
from lavis_lite.models.blip2_generative import Blip2Generative


@registry.register_model("blip2_opt_blind")
class BlindOpt(Blip2Generative):
    """The visual prompt is there and empty: zeros in all its places."""

    presets: ClassVar[str] = "blip2_opt"

    def visual_prompt(self, image: Tensor, questions: Sequence[str] | None = None) -> Tensor:
        """Zeros [B, Q, L]."""
        return super().visual_prompt(image, questions) * 0.0
