"""Models that see nothing: what their language models know of answers by themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from lavis_lite import registry
from lavis_lite.models.blip2_generative import Blip2Generative


class Blind(Blip2Generative):
    """The visual prompt is there and empty: zeros in all its places."""

    def visual_prompt(self, image: Tensor, questions: Sequence[str] | None = None) -> Tensor:
        """Zeros [B, Q, L]."""
        return super().visual_prompt(image, questions) * 0.0


@registry.register_model("blip2_opt_blind")
class BlindOpt(Blind):
    """`blip2_opt` that sees nothing."""

    presets: ClassVar[str] = "blip2_opt"


@registry.register_model("blip2_t5_blind")
class BlindT5(Blind):
    """`blip2_t5` that sees nothing."""

    presets: ClassVar[str] = "blip2_t5"
