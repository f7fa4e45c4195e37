"""Where in a picture the evidence for a text lies, by gradients, by attention, or by covering parts of the picture.

What is explained is a score of some words of a text, all of them or one:
- "itm": how much the ITM logit (match against no match) falls when these words are left out of the text. The logit
  alone won't do: a large part of its evidence is the same for every text, and on short ones that part points at empty
  places (docs/explain.md has the measurement).
- "itg": the log-probability that the ITG decoder says these words of the picture, each after the words before it.

B pairs, R rows (a row is one score of one pair), I images, T text tokens, h x w image tokens, L blocks that see them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lavis_lite.common.errors import InputError, closest
from lavis_lite.models.attention_maps import as_grid, attention_effects, cross_attention, grid_side
from lavis_lite.models.qformer_states import ImageKV
from lavis_lite.models.tokenizer import TextTokens, Word

if TYPE_CHECKING:
    from lavis_lite.models.blip2_qformer import Blip2QFormer

Method = Literal["gradcam", "attention", "occlusion"]
Score = Literal["itm", "itg"]
# Side of the square that occlusion covers, in image tokens.
COVER = 3
# Covered pictures that go through the encoder together.
COVERED_AT_ONCE = 16


@dataclass(frozen=True)
class WordMap:
    """A word of a text as it stands there, its score, and its map as in `Explanation`."""

    word: str
    score: float
    map: Tensor


@dataclass(frozen=True)
class Explanation:
    """Where in a picture the evidence for a text lies.

    match: the ITM probability that text and picture match.
    score: what the map explains: the ITM logit's fall without the text, or the log-probability of its words. None for
        attention, which explains no score.
    map: float32[h, w] over the whole picture in [0, 1], the largest value 1; all 0 where nothing speaks for the text.
    words: one for each word where they were asked for.
    """

    text: str
    match: float
    score: float | None
    map: Tensor
    words: tuple[WordMap, ...] = ()


@dataclass(frozen=True)
class _Rows:
    """R scores to be explained.

    pair: int64[R], the image of each. tokens: of R texts. picked: bool[R, T], the tokens whose score it is.
    """

    pair: Tensor
    tokens: TextTokens
    picked: Tensor

    def of_pair(self, pair: int) -> _Rows:
        own = self.pair == pair
        return _Rows(self.pair[own], self.tokens[own.nonzero()[:, 0]], self.picked[own])


# A part of a score: its sign, and what gives it for R images.
_Parts = list[tuple[float, Callable[[ImageKV], Tensor]]]


def explain(
    model: Blip2QFormer,
    image: Tensor,
    texts: Sequence[str],
    *,
    method: Method,
    score: Score,
    per_word: bool,
) -> list[Explanation]:
    """See `Blip2QFormer.explain`; here `texts` are one for each image."""
    check_request(texts, method, score, per_word)
    with _evaluated(model):
        words = [model.tokenizer.words(text, max_length=model.max_txt_len) for text in texts]
        rows = _rows(model.tokenize(texts), words if per_word else [[] for _ in texts])
        with torch.no_grad():
            images = model.project_image(model.encode_image(image))
            tokens = next(kv[0].shape[1] for kv in images.layers if kv is not None)
            side = grid_side(tokens, image.shape[-2:])
            match = model.match_logits(images, model.tokenize(texts)).float().softmax(-1)[:, 1].tolist()
        values: list[float] | list[None] = [None] * len(rows.pair)
        if method == "attention":
            maps = _attention(model, images, rows.tokens)
        elif method == "gradcam":
            maps, scores = _gradcam(model, images[rows.pair], rows, score)
            values = scores.tolist()
        else:
            maps, scores = _occlusion(model, image, images, rows, score, side)
            values = scores.tolist()
    shown, known = iter(_normalised(maps).cpu()), iter(values)
    return [
        Explanation(
            text,
            own_match,
            next(known),
            next(shown),
            tuple(WordMap(word.text, next(known) or 0.0, next(shown)) for word in own if per_word),
        )
        for text, own_match, own in zip(texts, match, words, strict=True)
    ]


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """Eval mode: dropout would be part of what is explained. Afterwards each module has its mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def check_request(texts: Sequence[str], method: str, score: str, per_word: bool) -> None:
    """InputError for what can't be explained, whatever the model."""
    for kind, given, names in (("method", method, get_args(Method)), ("score", score, get_args(Score))):
        if given not in names:
            hint = closest(given, names)
            raise InputError(
                f"explain: no {kind} '{given}': one of {', '.join(names)}" + (f"; {hint}" if hint else "")
            )
    for text in texts:
        if not any(letter.isalnum() for letter in text):
            raise InputError(
                f"explain: the text '{text}' has no word; give one that says something of the picture"
            )
    if per_word and method == "attention":
        raise InputError(
            "explain: attention tells nothing of single words, which the queries read all at once: "
            "use method gradcam or occlusion for words"
        )


def _rows(tokens: TextTokens, words: Sequence[Sequence[Word]]) -> _Rows:
    """Of every pair a row for the whole text, then one for each of its words."""
    pair, picked = [], []
    for index, own in enumerate(words):
        everything = tokens.attention_mask[index].clone()
        everything[[0, int(everything.sum()) - 1]] = False  # [CLS] and [SEP]
        picked.append(everything)
        for word in own:
            alone = torch.zeros_like(everything)
            alone[list(word.places)] = True
            picked.append(alone)
        pair += [index] * (1 + len(own))
    numbers = torch.tensor(pair, device=tokens.input_ids.device)
    return _Rows(numbers, tokens[numbers], torch.stack(picked))


def _parts(model: Blip2QFormer, rows: _Rows, score: Score) -> _Parts:
    """What a score of R rows is the sum of; each part makes one pass of the Q-Former's cross-attention."""
    if score == "itg":
        return [(1.0, lambda images: _said(model, images, rows))]
    without = _left_out(rows)
    return [
        (1.0, lambda images: _matching(model, images, rows.tokens)),
        (-1.0, lambda images: _matching(model, images, without)),
    ]


def _matching(model: Blip2QFormer, images: ImageKV, tokens: TextTokens) -> Tensor:
    logits = model.match_logits(images, tokens).float()
    return logits[:, 1] - logits[:, 0]


def _left_out(rows: _Rows) -> TextTokens:
    """The texts without the picked tokens."""
    kept = rows.tokens.attention_mask & ~rows.picked
    ids = pad_sequence(
        [row[keep] for row, keep in zip(rows.tokens.input_ids, kept, strict=True)], batch_first=True
    )
    lengths = kept.sum(1, keepdim=True)
    return TextTokens(ids, torch.arange(ids.shape[1], device=ids.device) < lengths)


def _said(model: Blip2QFormer, images: ImageKV, rows: _Rows) -> Tensor:
    """Log-probability of the picked tokens by the ITG decoder [R]."""
    inputs, targets = rows.tokens.for_decoding(model.tokenizer.dec_id)
    states = model.Qformer.encode_text(inputs, prefix=model.encode_queries(images))
    logs = model.Qformer.lm_logits(states).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    # A token is said by the state of the one before it.
    picked = rows.picked[:, 1:]
    spread = logs.new_zeros(picked.shape).masked_scatter(inputs.attention_mask, logs)
    return (spread * picked).sum(1)


def _gradcam(model: Blip2QFormer, images: ImageKV, rows: _Rows, score: Score) -> tuple[Tensor, Tensor]:
    """Maps [R, h, w] and scores [R]: attention weight times the score's gradient in it, where that is positive."""
    found = [
        (sign, attention_effects(model.Qformer, images, partial(part, images)))
        for sign, part in _parts(model, rows, score)
    ]
    values = torch.stack([sign * value for sign, (value, _) in found]).sum(0)
    effects = torch.stack([sign * effect for sign, (_, effect) in found]).sum(0)
    return as_grid(effects.clamp(min=0).sum((0, 2, 3))), values


def _attention(model: Blip2QFormer, images: ImageKV, tokens: TextTokens) -> Tensor:
    weights = cross_attention(model.Qformer, images, lambda: model.match_logits(images, tokens))
    return as_grid(weights.mean((0, 2, 3)))


@torch.no_grad()
def _occlusion(
    model: Blip2QFormer, image: Tensor, images: ImageKV, rows: _Rows, score: Score, side: int
) -> tuple[Tensor, Tensor]:
    """Maps [R, h, w] and scores [R]: how far a score falls when a square around each image token is covered."""

    def scores(seen: ImageKV, asked: _Rows) -> Tensor:
        return torch.stack([sign * part(seen) for sign, part in _parts(model, asked, score)]).sum(0)

    whole = scores(images[rows.pair], rows)
    maps = []
    for pair, picture in enumerate(image):
        own = rows.of_pair(pair)
        falls = []
        for covered in _covered(picture, side).split(COVERED_AT_ONCE):
            seen = model.project_image(model.encode_image(covered))
            each = torch.arange(len(own.pair), device=own.pair.device).repeat_interleave(len(covered))
            asked = _Rows(own.pair[each], own.tokens[each], own.picked[each])
            places = torch.arange(len(covered), device=each.device).repeat(len(own.pair))
            falls.append(scores(seen[places], asked).unflatten(0, (len(own.pair), -1)))
        maps.append(whole[rows.pair == pair][:, None] - torch.cat(falls, 1))
    return torch.cat(maps).unflatten(1, (side, side)), whole


def _covered(picture: Tensor, side: int) -> Tensor:
    """A picture [3, H, W] with a square around each of side x side places covered by its median colour."""
    height, width = picture.shape[1:]
    colour = picture.flatten(1).median(1).values[:, None, None]
    covered = picture.repeat(side * side, 1, 1, 1)
    reach = (COVER - 1) // 2
    for place in range(side * side):
        row, column = divmod(place, side)
        top, bottom = (round(max(0, edge) * height / side) for edge in (row - reach, row + reach + 1))
        left, right = (round(max(0, edge) * width / side) for edge in (column - reach, column + reach + 1))
        covered[place, :, top:bottom, left:right] = colour
    return covered


def _normalised(maps: Tensor) -> Tensor:
    positive = maps.float().clamp(min=0)
    return positive / positive.amax((1, 2), keepdim=True).clamp(min=1e-12)
