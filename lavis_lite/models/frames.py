"""The frames of clips: each passes encoder and Q-Former by itself, and their query outputs are joined here.

B clips, F frames, Q queries, D Q-Former width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lavis_lite.common.errors import ConfigError, InputError
from lavis_lite.samples import Images


@dataclass(frozen=True)
class VideoConfig:
    """How the frames of a clip become one visual prompt.

    join: "concat": their query outputs one after the other, F * Q places of the language model, as InstructBLIP does
        with clips; "mean": averaged to Q places, which forgets the frames' order.
    frame_embeddings: learn so many embeddings, that of frame f added to its Q query outputs before they are joined;
        clips may have that many frames at most. 0: none, frames are told apart by their places alone, and any model
        of pictures takes clips without new weights.
    """

    join: Literal["concat", "mean"] = "concat"
    frame_embeddings: int = 0

    def check(self, where: str) -> None:
        """Raise ConfigError for values that don't go together."""
        if self.frame_embeddings < 0:
            raise ConfigError(f"{where}.frame_embeddings can't be negative, got {self.frame_embeddings}")
        if self.frame_embeddings and self.join == "mean":
            raise ConfigError(
                f"{where}.frame_embeddings: a mean over frames forgets which was which; set "
                f"{where}.frame_embeddings=0 or {where}.join=concat"
            )


class FrameJoin(nn.Module):
    """Query outputs of F frames -> one visual prompt.

    The embeddings begin at zero: what a model of pictures has learned says of clips what it said before.
    """

    def __init__(self, config: VideoConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.embeddings = (
            nn.Parameter(torch.zeros(config.frame_embeddings, width)) if config.frame_embeddings else None
        )

    def forward(self, queries: Tensor) -> Tensor:
        """[B, F, Q, D] -> [B, F * Q, D], or [B, Q, D] averaged; InputError for more frames than embeddings."""
        if self.config.join == "mean":
            return queries.mean(1)
        if self.embeddings is not None:
            frames, known = queries.shape[1], len(self.embeddings)
            if frames > known:
                raise InputError(
                    f"the clips have {frames} frames and model.video.frame_embeddings={known}: give so many at most "
                    "(num_frames of the video processor)"
                )
            queries = queries + self.embeddings[:frames, None]
        return queries.flatten(1, 2)


def split_frames(visual: Images) -> tuple[Images, int]:
    """Pictures to be encoded one by one, and how many each row has: clips [B, F, 3, H, W] -> [B * F, 3, H, W] and F.

    Images [B, 3, H, W], and stored features of such, are as they are, with one frame each.
    """
    if isinstance(visual, Tensor) and visual.dim() == 5:
        return visual.flatten(0, 1), visual.shape[1]
    return visual, 1
