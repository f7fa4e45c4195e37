"""What passes between the Q-Former's parts: images and queries half read, and text without its padding.

B rows, I images, Q queries, T text tokens, N real text tokens of all rows together, P image tokens, D width, C image
width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from lavis_lite.models.qformer_layers import Attention
from lavis_lite.models.rows import take_rows

KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class ImageKV:
    """The keys and values of I images for every cross-attention block.

    layers: one entry per block, (keys, values) float[I, P, D] or None where the block doesn't look at the
        image.
    """

    layers: tuple[KeysValues | None, ...]

    def __len__(self) -> int:
        return next(kv[0].shape[0] for kv in self.layers if kv is not None)

    def numel(self) -> int:
        """Numbers held."""
        return sum(keys.numel() + values.numel() for keys, values in filter(None, self.layers))

    def __getitem__(self, rows: Tensor | slice | Sequence[int]) -> ImageKV:
        """The chosen images, in that order, repeated where an index is."""
        return ImageKV(tuple(kv and (take_rows(kv[0], rows), take_rows(kv[1], rows)) for kv in self.layers))

    def looks(self, layer: int, each: int = 1) -> list[tuple[Tensor, Tensor, int]]:
        """What a block sees when `each` rows in a row look at every image; nothing without cross-attention."""
        kv = self.layers[layer]
        return [] if kv is None else [(*kv, each)]


@dataclass(frozen=True)
class UnprojectedImages:
    """Images that are looked at once: a block's keys and values are made when it asks for them and not kept.

    For 16 images at full size those of all blocks would be 150 MB, and to get so much fresh memory took 4% of greedy
    generation's time (benchmarks/generate.py).

    embeds: float[I, P, C]. attentions: of every block the one that looks at the image, or None.
    """

    embeds: Tensor
    attentions: tuple[Attention | None, ...]

    def __len__(self) -> int:
        return len(self.embeds)

    def looks(self, layer: int, each: int = 1) -> list[tuple[Tensor, Tensor, int]]:
        """See `ImageKV.looks`."""
        attention = self.attentions[layer]
        return [] if attention is None else [(*attention.keys_values(self.embeds), each)]


# Groups of images, each with how many rows one after the other look at an image of it.
Shares = Sequence[tuple[ImageKV | UnprojectedImages, int]]


@dataclass(frozen=True)
class QueryStates:
    """Queries that have seen images and no text.

    output: float[B, Q, D]. keys_values: of the self-attention of every block, float[B or 1, Q, D] each.
    """

    output: Tensor
    keys_values: tuple[KeysValues, ...]


@dataclass(frozen=True)
class PairStart:
    """What pairs owe to their text alone: queries and text as they are when the queries first look at an image.

    queries: float[B, Q, D] before the first block's cross-attention. text: float[B, T, D] after the first block, zero
        at padding. attention_mask: bool[B, T].
    """

    queries: Tensor
    text: Tensor
    attention_mask: Tensor

    def __len__(self) -> int:
        return len(self.attention_mask)

    def __getitem__(self, rows: Tensor | slice | Sequence[int]) -> PairStart:
        """The chosen texts, in that order, repeated where an index is."""
        return PairStart(*(take_rows(x, rows) for x in (self.queries, self.text, self.attention_mask)))


class RealTokens:
    """Which places of a padded batch [B, T] hold tokens, and the way between the two arrangements.

    Packed tokens are followed by up to 3% of fill, copies of the first one that nothing reads: kernels made for a
    number of rows can then be used again. With a number of its own in every batch oneDNN made new ones at each step.
    """

    def __init__(self, mask: Tensor) -> None:
        self.shape = mask.shape
        places = mask.flatten().nonzero().squeeze(1)
        self.count = places.numel()
        fill = rounded(self.count) - self.count
        # A batch without padding needs no moving about.
        self.places = None if self.count == mask.numel() else F.pad(places, (0, fill))
        self.mask = None if self.places is None else mask
        self.first = (mask.sum(1).cumsum(0) - mask.sum(1)) if self.places is not None else None

    def pack(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [N + fill, ...], row after row."""
        x = x.flatten(0, 1)
        return x if self.places is None else x.index_select(0, self.places)

    def spread(self, x: Tensor) -> Tensor:
        """[N + fill, D] -> [B, T, D] with zeros at padding."""
        if self.places is not None:
            places = self.places[: self.count]
            x = x.new_zeros(self.shape.numel(), x.shape[-1]).index_copy(0, places, x[: self.count])
        return x.unflatten(0, self.shape)

    def first_of_rows(self, x: Tensor) -> Tensor:
        """[N + fill, D] -> [B, D], the first token of every row ([CLS])."""
        if self.first is None:
            return x.unflatten(0, self.shape)[:, 0]
        return x.index_select(0, self.first)


def rounded(count: int) -> int:
    """The next of 32 sizes between powers of two, for numbers of rows whose kernels can then be used again."""
    step = 1 << max(0, count.bit_length() - 6)
    return -(-count // step) * step
