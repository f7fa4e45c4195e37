"""Explanations: Grad-CAM against autograd on explicit attention, occlusion on a model whose answer is known, errors."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import save_picture
from stage1_helpers import enlarge_weights, tiny_config, tiny_samples, write_tokenizer
from torch import Tensor

from lavis_lite import explain as command
from lavis_lite.cli import main
from lavis_lite.common.errors import InputError
from lavis_lite.common.registry import registry
from lavis_lite.models.attention_maps import attention_effects
from lavis_lite.models.blip2_qformer import Blip2QFormer

TEXT = "the big blue cat sits"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Blip2QFormer:
    torch.manual_seed(0)
    config = tiny_config(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    model = registry.get_model_class("blip2").from_config(config).eval()
    enlarge_weights(model, std=0.3)
    return model


def logit_and_weights(model: Blip2QFormer, image: Tensor, texts: list[str]) -> tuple[Tensor, list[Tensor]]:
    """The ITM logit with cross-attention written out, and its weights, each a leaf that adds nothing."""
    weights: list[Tensor] = []
    for layer in model.Qformer.layers:
        if layer.crossattention is None:
            continue

        def attend(query: Tensor, key: Tensor, value: Tensor, mask: Any = None, heads: int = 4) -> Tensor:
            q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
            own = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
            own.retain_grad()
            weights.append(own)
            return (own @ v).transpose(1, 2).flatten(2)

        layer.crossattention.attend = attend  # type: ignore[method-assign]
    try:
        logits = model.match_logits(model.encode_image(image), model.tokenize(texts))
    finally:
        for layer in model.Qformer.layers:
            if layer.crossattention is not None:
                del layer.crossattention.attend
    return logits[:, 1] - logits[:, 0], weights


@pytest.mark.parametrize("frozen", [False, True])
def test_effects_are_weights_times_their_gradients(model: Blip2QFormer, frozen: bool) -> None:
    samples = tiny_samples(3)
    image, texts = samples["image"], samples["text_input"]
    logit, weights = logit_and_weights(model, image, texts)
    logit.sum().backward()
    expected = torch.stack([own.detach() * own.grad for own in weights])
    model.requires_grad_(not frozen)
    with torch.no_grad():
        images = model.project_image(model.encode_image(image))

        def score() -> Tensor:
            logits = model.match_logits(images, model.tokenize(texts))
            return logits[:, 1] - logits[:, 0]

        scores, effects = attention_effects(model.Qformer, images, score)
    model.requires_grad_(True)
    torch.testing.assert_close(scores, logit.detach(), rtol=1e-4, atol=1e-5)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(effects, expected, rtol=1e-3, atol=1e-5)


def test_the_scores_are_what_they_say(model: Blip2QFormer) -> None:
    image = tiny_samples(1)["image"]
    itm = model.explain(image, TEXT, score="itm", per_word=True)[0]
    itg = model.explain(image, TEXT, score="itg", per_word=True)[0]

    def logit(text: str) -> float:
        with torch.no_grad():
            no, yes = model.match_logits(model.encode_image(image), model.tokenize([text]))[0].tolist()
        return yes - no

    assert [word.word for word in itm.words] == TEXT.split()
    assert itm.score == pytest.approx(logit(TEXT) - logit(""), abs=1e-4)
    assert itm.words[2].score == pytest.approx(logit(TEXT) - logit("the big cat sits"), abs=1e-4)
    assert itm.match == pytest.approx(1 / (1 + math.exp(-logit(TEXT))), abs=1e-5)
    assert itg.score == pytest.approx(sum(word.score for word in itg.words), abs=1e-4)
    assert itg.score is not None and itg.score < 0
    # Each word after those before it, by a decoder that is asked step by step.
    tokenizer = model.tokenizer
    ids = tokenizer([TEXT], max_length=12).input_ids[0].tolist()[1:-1]
    from lavis_lite.models.qformer_decoder import QFormerDecoder

    with torch.no_grad():
        decoder = QFormerDecoder(model.Qformer, model.encode_queries(model.encode_image(image)))
        before = [tokenizer.dec_id, *ids[:-1]]
        logs = [
            decoder.step(torch.tensor([i])).log_softmax(-1)[0, n].item()
            for i, n in zip(before, ids, strict=True)
        ]
    assert [word.score for word in itg.words] == pytest.approx(logs, abs=1e-4)


@pytest.mark.parametrize("method", ["gradcam", "attention", "occlusion"])
@pytest.mark.parametrize("score", ["itm", "itg"])
def test_maps_are_normalised_and_neighbours_change_nothing(
    model: Blip2QFormer, method: Any, score: Any
) -> None:
    samples = tiny_samples(3)
    words = method != "attention"
    found = model.explain(samples["image"], samples["text_input"], method=method, score=score, per_word=words)
    for index, item in enumerate(found):
        assert item.map.shape == (2, 2) and item.map.min() >= 0
        assert item.map.max() == pytest.approx(1.0) or not item.map.any()
        alone = model.explain(
            samples["image"][index : index + 1], item.text, method=method, score=score, per_word=words
        )[0]
        torch.testing.assert_close(alone.map, item.map, rtol=1e-3, atol=1e-3)
        for own, other in zip(alone.words, item.words, strict=True):
            torch.testing.assert_close(own.map, other.map, rtol=1e-3, atol=1e-3)
    assert bool(found[1].words) == words


@pytest.mark.parametrize("method", ["gradcam", "attention", "occlusion"])
def test_a_model_in_training_is_explained_without_dropout_and_stays_in_training(
    method: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    config = tiny_config(
        write_tokenizer(tmp_path), vision_encoder={"freeze": False}, qformer={"dropout": 0.5}
    )
    model = registry.get_model_class("blip2").from_config(config)
    enlarge_weights(model, std=0.3)
    image = tiny_samples(1)["image"]
    (expected,) = model.eval().explain(image, TEXT, method=method)
    model.train()
    model.ln_vision.eval()  # each module gets its own mode back
    modes = [module.training for module in model.modules()]
    (found,) = model.explain(image, TEXT, method=method)
    assert found.match == expected.match and torch.equal(found.map, expected.map)
    assert [module.training for module in model.modules()] == modes
    monkeypatch.setattr(model, "match_logits", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.explain(image, TEXT, method=method)
    assert [module.training for module in model.modules()] == modes


def test_occlusion_finds_the_only_place_that_counts(
    model: Blip2QFormer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A score that is the brightness of the bottom right corner falls where that corner is covered, nowhere else."""
    from lavis_lite.models import explain as module

    monkeypatch.setattr(module, "COVER", 1)
    monkeypatch.setattr(
        model,
        "encode_image",
        lambda image: image[:, :1, 8:, 8:].mean((1, 2, 3))[:, None, None].expand(-1, 4, 24),
    )
    monkeypatch.setattr(
        module, "_parts", lambda model, rows, score: [(1.0, lambda images: images.layers[0][0][:, 0, 0])]
    )
    image = torch.zeros(1, 3, 16, 16)
    sign = model.Qformer.layers[0].crossattention.self["key"].weight[0].sum().sign().item()
    image[:, :, 8:, 8:] = sign
    (found,) = model.explain(image, TEXT, method="occlusion")
    assert found.map.tolist() == [[0, 0], [0, 1]]


@pytest.mark.parametrize("pictures", [2, 30])
def test_chance_is_of_the_pictures_that_are_measured(pictures: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "run_scripts" / "experiments"))
    game: Any = importlib.import_module("pointing_game")
    monkeypatch.setattr(game, "load_model_and_preprocess", lambda *_, **__: (None, {"eval": None}, None))
    asked: dict[str, list[Any]] = {}

    def point(game_of: str, cases: list[Any], keywords: Any) -> list[Any]:
        asked[f"{game_of} {(keywords or {}).get('method')}"] = cases
        return [((0.5, 0.5), case) for case in cases]

    def phrases(model: Any, processor: Any, cases: list[Any], keywords: Any) -> list[Any]:
        return point("phrases", cases, keywords)

    def words(model: Any, processor: Any, scenes: list[Any], keywords: Any) -> list[Any]:
        return point(
            "words", [game.Case(scene, item) for scene in scenes for item in scene.objects], keywords
        )

    monkeypatch.setattr(game, "point_at_phrases", phrases)
    monkeypatch.setattr(game, "point_at_words", words)
    found = dict(game.play("run", pictures, 6))
    for kind in ("phrases", "words"):
        cases = asked[f"{kind} gradcam"]
        areas = [case.named.box[2] * case.named.box[3] for case in cases]
        assert found["chance", kind] == pytest.approx(sum(areas) / len(areas))
        assert found["the centre", kind] == found["Grad-CAM, itg", kind]
        few = asked[f"{kind} occlusion"]
        assert few == cases[: len(few)]
    assert len({id(case.scene) for case in asked["words gradcam"]}) == max(1, pictures // 3)


@pytest.mark.parametrize(
    ("text", "keywords", "message"),
    [
        ("  ", {}, "has no word"),
        (
            TEXT,
            {"method": "gradcm"},
            "no method 'gradcm': one of gradcam, attention, occlusion; did you mean 'gradcam'",
        ),
        (TEXT, {"score": "itc"}, "no score 'itc'"),
        (TEXT, {"method": "attention", "per_word": True}, "use method gradcam or occlusion for words"),
    ],
)
def test_errors_say_what_to_do(model: Blip2QFormer, text: str, keywords: Any, message: str) -> None:
    with pytest.raises(InputError, match=message.replace("?", r"\?")):
        model.explain(tiny_samples(1)["image"], text, **keywords)
    with pytest.raises(InputError, match=r"must be a float tensor \[B, 3, H, W\]"):
        model.explain(torch.zeros(3, 16, 16), TEXT)
    with pytest.raises(InputError, match="no map of the encoder's 6 tokens of a picture of 16 x 24 pixels"):
        model.explain(torch.zeros(1, 3, 16, 24), TEXT)


def test_the_command_writes_a_page(
    model: Blip2QFormer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_picture(tmp_path / "a.png", 1)
    image = tiny_samples(1)["image"][0]
    monkeypatch.setattr(command, "build_recipe", lambda *_: model)
    processors = ({"eval": lambda picture: image}, {"eval": str.lower})
    monkeypatch.setattr(command, "load_preprocess", lambda _: processors)
    out = tmp_path / "page.html"
    start = ["explain", "--model", "blip2/shapes", "--image", str(tmp_path / "a.png"), "--out", str(out)]
    main([*start, "--text", "A red dog", "a <b>cat</b>", "--per-word"])
    printed, page = capsys.readouterr().out, out.read_text()
    assert printed.count("match 0.") + printed.count("match 1.") == 2 and str(out) in printed
    assert page.count("<figure>") == 4 + 3 + 4 and "a &lt;b&gt;cat" in page and "<b>cat</b></b>" not in page
    assert "http" not in page


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("--model blip2 --image a.png --text x", 2, "give a name and a type"),
        (
            "--model blip2_opt/shapes --image a.png --text x",
            2,
            "only a model with a matching head can be explained",
        ),
        ("--model blip2/shapes --image none.png --text x", 1, "--image 'none.png': no such file"),
        ("--model blip2/shapes --image broken.png --text x", 1, "--image 'broken.png': not a picture"),
        ("--model blip2/shapes --image broken.png --text ...", 2, "has no word"),
        ("--model blip2/shapes --image broken.png --text x --method cam", 2, "no method 'cam'"),
    ],
)
def test_mistakes_are_one_line(
    arguments: str, code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"nothing")
    with pytest.raises(SystemExit) as ended:
        main(["explain", *arguments.split(), "--out", "page.html"])
    error = capsys.readouterr().err
    assert ended.value.code == code and message in error and error.count("\n") == 1
    assert not (tmp_path / "page.html").exists()


def test_a_page_that_cannot_be_written_is_told_before_the_model_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("lavis_lite.explain.build_recipe", lambda *_: pytest.fail("built"))
    picture = str(tmp_path / "a.png")
    save_picture(tmp_path / "a.png", 1)
    with pytest.raises(SystemExit) as ended:
        main(
            ["explain", "--model", "blip2/shapes", "--image", picture, "--text", "x", "--out", str(tmp_path)]
        )
    error = capsys.readouterr().err
    assert ended.value.code == 2 and "is a folder; name a file in it" in error and error.count("\n") == 1
