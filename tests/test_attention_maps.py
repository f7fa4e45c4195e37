"""Where queries look: the weights are those that the pass itself used."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from data_helpers import warnings_logged
from PIL import Image
from test_qformer import IMAGE_WIDTH, Q, small_qformer, tokens_of
from torch import Tensor
from vqa_helpers import QUESTIONS, question_model, question_samples

from lavis_lite.common.errors import InputError
from lavis_lite.models.attention_maps import as_grid, cross_attention, grid_side
from lavis_lite.tasks import vqa_looks
from lavis_lite.tasks.answers import Answered
from lavis_lite.tasks.heat import overlay


@torch.no_grad()
@pytest.mark.parametrize("with_text", [True, False])
def test_weights_give_back_what_attention_read(with_text: bool) -> None:
    qformer = small_qformer(4)
    queries, images = torch.randn(1, Q, 16), qformer.project_image(torch.randn(3, 4, IMAGE_WIDTH))
    tokens = tokens_of([2, 5, 3], [2, 6, 7, 3], [2, 3])
    read: list[Tensor] = []
    for layer in qformer.layers:
        if layer.crossattention is not None:
            layer.crossattention.output.register_forward_hook(
                lambda _, inputs, output: read.append(inputs[0])
            )

    def look() -> None:
        if with_text:
            qformer.encode_pairs(queries, images, tokens)
        else:
            qformer.encode_queries(queries, images)

    weights = cross_attention(qformer, images, look)
    assert weights.shape == (2, 3, 2, Q, 4)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 2, Q))
    values = [kv[1] for kv in images.layers if kv is not None]
    for own, value, context in zip(weights, values, read, strict=True):
        heads = value.unflatten(-1, (2, -1)).transpose(1, 2)
        torch.testing.assert_close((own @ heads).transpose(1, 2).flatten(2), context, rtol=0, atol=1e-5)
    look()  # no hook is left behind
    assert len(read) == 4


def test_class_tokens_are_left_out_of_the_grid() -> None:
    weights = torch.arange(2 * 17.0).reshape(2, 17)
    assert torch.equal(as_grid(weights), weights[:, 1:].reshape(2, 4, 4))


@pytest.mark.parametrize("prefix", [0, 1, 2, 5, 10])
@pytest.mark.parametrize("side", [7, 8, 16, 26])
def test_tokens_before_a_square_grid_are_left_out(prefix: int, side: int) -> None:
    assert grid_side(prefix + side * side) == grid_side(prefix + side * side, (64, 64)) == side


@pytest.mark.parametrize(
    ("tokens", "picture"), [(14 * 18, None), (12 * 16 + 1, (64, 64)), (9 * 16, (144, 256)), (6, (16, 24))]
)
def test_an_oblong_grid_has_no_map(tokens: int, picture: tuple[int, int] | None) -> None:
    with pytest.raises(InputError, match=f"no map of the encoder's {tokens} tokens.*must be square"):
        as_grid(torch.zeros(2, tokens), picture)


def test_oblong_pictures_have_no_looks_and_a_report_does_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = question_model(tmp_path)
    image = torch.randn(1, 3, 16, 24)
    with pytest.raises(InputError, match="no map of the encoder's 6 tokens of a picture of 16 x 24 pixels"):
        model.where_queries_look(image, QUESTIONS[:1])
    pair = (answered("what color is the dog"), answered("how big"))
    monkeypatch.setattr(vqa_looks, "_look_twice", lambda *_: model.where_queries_look(image, QUESTIONS[:1]))
    dataset = SimpleNamespace(image_path=lambda row: "a.png")
    with warnings_logged() as messages:
        assert vqa_looks.draw_looks(model, dataset, pair, None, 3) == []
    assert len(messages) == 1 and "doesn't show where the queries looked: no map" in messages[0]


def answered(question: str) -> Answered:
    return Answered(0, 0, "a.png", question, "", [], None, None)


def test_the_question_moves_the_look_and_neighbours_do_not(tmp_path: Path) -> None:
    model = question_model(tmp_path)
    image = question_samples(2)["image"]
    same = torch.stack([image[0], image[0], image[1]])
    looks = model.where_queries_look(same, QUESTIONS[:3])
    assert (looks[0] - looks[1]).abs().max() > 1e-4
    torch.testing.assert_close(looks[1], model.where_queries_look(image[:1], QUESTIONS[1:2])[0])
    assert (looks.sum((1, 2)) <= 1 + 1e-5).all()


def test_the_brightest_place_of_an_overlay_is_where_the_weight_is() -> None:
    weights = torch.zeros(4, 4)
    weights[0, 3] = 0.9
    drawn = Image.open(io.BytesIO(overlay(Image.new("L", (30, 60), 90), weights)))
    assert drawn.size == (120, 240)
    light = np.asarray(drawn.convert("L"), dtype=float)
    row, column = np.unravel_index(light.argmax(), light.shape)
    assert row < 60 and column >= 90
