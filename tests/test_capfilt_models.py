"""CapFilt's captioners and rankers: ours and transformers', at random weights, on drawn pictures and photographs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from capfilt_helpers import read_shard
from data_helpers import COCO_MINI, needs_coco_mini
from generative_helpers import tiny_generative_config
from PIL import Image
from stage1_helpers import enlarge_weights, tiny_config, write_tokenizer

from lavis_lite.capfilt import captioners, rankers
from lavis_lite.capfilt.captioners import OurCaptioner, TransformersCaptioner, build_captioner
from lavis_lite.capfilt.rankers import ClipRanker, QFormerRanker, build_ranker
from lavis_lite.capfilt.settings import Settings
from lavis_lite.capfilt.worker import uniform_draws
from lavis_lite.cli import main
from lavis_lite.common.device import autocast
from lavis_lite.common.errors import CheckpointError, ConfigError, InputError
from lavis_lite.models.blip2_generative import Blip2Generative
from lavis_lite.models.blip2_qformer import Blip2QFormer
from lavis_lite.processors.image import BlipImageEval

CPU = torch.device("cpu")
FULL = autocast(CPU, "fp32")
TEXTS = [["a red dog", "the big blue cat sits on a mat"], [], ["dogs", "a cat", "a small dog runs"]]
WORDS = ("a", "red", "blue", "dog", "cat", "on", "the", "mat", "sits", "runs", "big", "small", "and", "dogs")


def settings(**changes: Any) -> Settings:
    defaults = {"num_captions": 3, "min_length": 1, "max_length": 6, "top_p": 0.95}
    return Settings("hf:x", "hf:y", **{**defaults, **changes})


def pictures(count: int = 4) -> list[Image.Image]:
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (count, 20, 24, 3), generator=generator, dtype=torch.uint8)
    return [Image.fromarray(own.numpy()) for own in pixels]


def draws(count: int = 4, texts: int = 3, length: int = 6) -> torch.Tensor:
    return torch.cat([uniform_draws(0, str(number), texts, length) for number in range(count)])


@pytest.fixture(scope="module")
def blip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BLIP of a few thousand parameters, as transformers saves one."""
    from transformers import (
        BertTokenizerFast,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
        BlipProcessor,
    )

    folder = tmp_path_factory.mktemp("blip")
    tokenizer = BertTokenizerFast(vocab=_vocabulary())
    text = {
        "vocab_size": len(_vocabulary()), "hidden_size": 16, "encoder_hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 40, "projection_dim": 8,
        "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0, "sep_token_id": 3,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 32, "patch_size": 16, "projection_dim": 8,
    }  # fmt: skip
    torch.manual_seed(0)
    model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision)).eval()
    enlarge_weights(model, std=0.3)
    model.save_pretrained(folder)
    image = BlipImageProcessor(size={"height": 32, "width": 32})
    BlipProcessor(image_processor=image, tokenizer=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP likewise."""
    from transformers import BertTokenizerFast, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    folder = tmp_path_factory.mktemp("clip")
    common = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {
        **common, "vocab_size": len(_vocabulary()), "max_position_embeddings": 12,
        "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0,
    }  # fmt: skip
    vision = {**common, "image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    enlarge_weights(model, std=0.3)
    model.save_pretrained(folder)
    image = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    tokenizer = BertTokenizerFast(vocab=_vocabulary())
    CLIPProcessor(image_processor=image, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def _vocabulary() -> dict[str, int]:
    return {word: at for at, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}


def stage1(tmp_path: Path) -> Blip2QFormer:
    torch.manual_seed(0)
    model = Blip2QFormer.from_config(tiny_config(write_tokenizer(tmp_path / "words"))).eval()
    enlarge_weights(model)
    return model


def stage2(tmp_path: Path) -> Blip2Generative:
    torch.manual_seed(0)
    model = Blip2Generative.from_config(tiny_generative_config(tmp_path / "llm", "opt")).eval()
    enlarge_weights(model)
    return model


# Captioners


def captioner(kind: str, tmp_path: Path, blip_folder: Path, **changes: Any) -> Any:
    if kind == "blip":
        return TransformersCaptioner(str(blip_folder), settings(**changes), CPU, "fp32")
    model = stage1(tmp_path) if kind == "stage 1" else stage2(tmp_path)
    return OurCaptioner(model, BlipImageEval(image_size=16), settings(**changes), FULL)


@pytest.mark.parametrize("kind", ["stage 1", "stage 2", "blip"])
def test_captions_of_a_picture_depend_on_its_draws_alone(
    kind: str, tmp_path: Path, blip_folder: Path
) -> None:
    model = captioner(kind, tmp_path, blip_folder)
    together = model.captions(pictures(), draws())
    assert len(together) == 4 and all(len(own) == 3 for own in together)
    torch.manual_seed(99)
    alone = [
        model.captions([picture], draws()[3 * row : 3 * row + 3])[0] for row, picture in enumerate(pictures())
    ]
    assert alone == together
    assert len({text for own in together for text in own}) > 6
    other = model.captions(pictures(), draws().flip(0))
    assert other != together


@pytest.mark.parametrize("kind", ["stage 1", "blip"])
def test_a_tiny_nucleus_is_the_likeliest_token_whatever_is_drawn(
    kind: str, tmp_path: Path, blip_folder: Path
) -> None:
    model = captioner(kind, tmp_path, blip_folder, top_p=1e-6)
    assert all(len(set(own)) == 1 for own in model.captions(pictures(), draws()))


def test_tokens_are_drawn_from_the_models_own_distribution(tmp_path: Path) -> None:
    """The share of each first word over many draws is its probability by the decoder's logits."""
    model = stage1(tmp_path)
    image = BlipImageEval(image_size=16)(pictures(1)[0])[None]
    texts = 4000
    chances = torch.rand(texts, 2, generator=torch.Generator().manual_seed(0))
    said = model.generate(
        {"image": image}, True, num_captions=texts, max_length=1, min_length=1, top_p=1.0, draws=chances
    )
    again = model.generate({"image": image}, True, num_captions=texts, max_length=1, min_length=1, top_p=1.0)
    words = sorted(set(said) | set(again))
    assert len(words) > 3
    for word in words:
        assert abs(said.count(word) - again.count(word)) / texts < 0.04


def test_a_prompt_is_no_part_of_the_caption(blip_folder: Path, tmp_path: Path) -> None:
    model = captioner("blip", tmp_path, blip_folder, prompt="a red")
    plain = captioner("blip", tmp_path, blip_folder)
    said = model.captions(pictures(), draws())
    assert said != plain.captions(pictures(), draws())
    assert max(len(text.split()) for own in said for text in own) <= 6  # new words alone


def test_too_few_draws_are_an_error(tmp_path: Path) -> None:
    model = captioner("stage 1", tmp_path, tmp_path)
    with pytest.raises(InputError, match="draws for 12 texts of 6 tokens"):
        model.captions(pictures(), draws(length=5))


# Rankers


@pytest.mark.parametrize("by", ["itc", "itm"])
def test_stage_1_scores_pair_by_pair(by: str, tmp_path: Path) -> None:
    model, vis = stage1(tmp_path), BlipImageEval(image_size=16)
    ranker = QFormerRanker(model, vis, str.lower, FULL, by=by)
    scores = ranker.scores(pictures(3), [[text.upper() for text in own] for own in TEXTS])
    compute = model.compute_itc if by == "itc" else model.compute_itm
    for picture, own, found in zip(pictures(3), TEXTS, scores, strict=True):
        expected = [float(compute({"image": vis(picture)[None], "text_input": [text]})) for text in own]
        assert found == pytest.approx(expected, abs=1e-5)
    assert ranker.scores(pictures(1), [[]]) == [[]]


def test_clip_scores_are_transformers_own(clip_folder: Path) -> None:
    from transformers import CLIPModel, CLIPProcessor

    ranker = ClipRanker(str(clip_folder), CPU, "fp32")
    scores = ranker.scores(pictures(3), TEXTS)
    model, processor = (
        CLIPModel.from_pretrained(clip_folder).eval(),
        CLIPProcessor.from_pretrained(clip_folder),
    )
    for picture, own, found in zip(pictures(3), TEXTS, scores, strict=True):
        expected = []
        for text in own:
            inputs = processor(text=[text], images=[picture], return_tensors="pt")
            with torch.no_grad():
                expected.append(float(model(**inputs).logits_per_image / model.logit_scale.exp()))
        assert found == pytest.approx(expected, abs=1e-5)
    long = ranker.scores(pictures(1), [["a dog and a cat " * 20]])
    assert -1 <= long[0][0] <= 1


# Which model is meant


def test_models_of_ours_are_loaded_by_name_type_and_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Sequence[Any]] = []

    class Nothing:
        pass

    def load(*arguments: Any) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        asked.append(arguments)
        return Nothing(), {"eval": None}, {"eval": None}

    monkeypatch.setattr(captioners, "load_model_and_preprocess", load)
    monkeypatch.setattr(rankers, "load_model_and_preprocess", load)
    named = Settings("blip2_t5/shapes:runs/a", "blip2/shapes")
    with pytest.raises(ConfigError, match="this model generates no text"):
        build_captioner(named, CPU, "fp32")
    with pytest.raises(ConfigError, match="this model compares no texts with images"):
        build_ranker(named, CPU, "fp32")
    assert asked == [
        ("blip2_t5/shapes", None, True, "cpu", "runs/a"),
        ("blip2/shapes", None, True, "cpu", None),
    ]


def test_a_captioner_that_takes_no_prompt_says_so_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = stage1(tmp_path), {"eval": None}, {"eval": None}
    monkeypatch.setattr(captioners, "load_model_and_preprocess", lambda *_: loaded)
    build_captioner(Settings("blip2/shapes", "blip2/shapes"), CPU, "fp32")
    with pytest.raises(ConfigError, match="--prompt: --captioner 'blip2/shapes' takes none"):
        build_captioner(Settings("blip2/shapes", "blip2/shapes", prompt="a photo of"), CPU, "fp32")


def test_models_of_transformers_that_dont_fit_are_named(
    tmp_path: Path, blip_folder: Path, clip_folder: Path
) -> None:
    nowhere = Settings(f"hf:{tmp_path}/nowhere", f"hf:{tmp_path}/nowhere")
    with pytest.raises(CheckpointError, match=r"--captioner hf:.*nowhere: no such model here"):
        build_captioner(nowhere, CPU, "fp32")
    with pytest.raises(CheckpointError, match=r"--ranker hf:.*nowhere: no such model here"):
        build_ranker(nowhere, CPU, "fp32")
    with pytest.raises(ConfigError, match="has no matching head"):
        build_ranker(Settings("hf:x", f"hf:{clip_folder}", rank_by="itm"), CPU, "fp32")


# Photographs


@needs_coco_mini
@pytest.mark.slow
def test_photographs_are_captioned_and_ranked(
    tmp_path: Path, blip_folder: Path, clip_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    annotations = COCO_MINI / "annotations" / "captions_val2017.json"
    main(
        [
            *("capfilt", "--images", str(COCO_MINI / "val2017"), "--annotations", str(annotations)),
            *("--captioner", f"hf:{blip_folder}", "--ranker", f"hf:{clip_folder}", "--preset", "paper"),
            *("--out", str(tmp_path / "out"), "--shard-size", "32", "--device", "cpu", "--precision", "fp32"),
        ]
    )
    content = json.loads(annotations.read_text())
    files = {image["id"]: image["file_name"] for image in content["images"]}
    texts: dict[str, set[str]] = {}
    for row in content["annotations"]:
        texts.setdefault(files[row["image_id"]], set()).add(" ".join(row["caption"].split()))
    shards = [read_shard(tmp_path / "out" / f"{number:06d}.tar") for number in range(3)]
    samples = [sample for shard in shards for sample in shard.values()]
    assert len(samples) == len(files) == 79
    for sample in samples:
        assert sample["jpg"] == (COCO_MINI / "val2017" / sample["image"]).read_bytes()
        assert len(sample["captions"]) == 2 and files[sample["image_id"]] == sample["image"]
        for text, source in zip(sample["captions"], sample["source"], strict=True):
            assert (text in texts[sample["image"]]) == (source == "web")
    said = capsys.readouterr().out
    assert "79 pictures with 158 captions in 3 shards" in said and "of 395" in said
