"""Processors: sizes, values, LAVIS's arguments, and randomness that torch's seed decides."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import lavis_lite.processors.randaugment as randaugment
from lavis_lite.common.errors import ConfigError
from lavis_lite.common.registry import registry
from lavis_lite.datasets.images import read_image
from lavis_lite.processors import build_processor
from lavis_lite.processors.image import CLIP_MEAN, CLIP_STD, Blip2ImageTrain, BlipImageEval, BlipImageTrain
from lavis_lite.processors.text import BlipCaption, BlipQuestion


def picture(width: int = 80, height: int = 50) -> Image.Image:
    """Red grows to the right, green downwards."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 128)], -1).astype(np.uint8))


def test_evaluation_resizes_the_whole_picture_and_normalises_as_clip() -> None:
    tensor = BlipImageEval(image_size=28)(picture())
    assert tensor.shape == (3, 28, 28) and tensor.dtype == torch.float32
    plain = np.asarray(picture().resize((28, 28), Image.Resampling.BICUBIC), np.float32) / 255
    expected = (
        torch.from_numpy(plain).permute(2, 0, 1) - torch.tensor(CLIP_MEAN)[:, None, None]
    ) / torch.tensor(CLIP_STD)[:, None, None]
    torch.testing.assert_close(tensor, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["blip2_image_train", "blip_image_train", "blip_image_eval"])
def test_any_size_mean_and_std(name: str) -> None:
    section = {"name": name, "image_size": [20, 36], "mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}
    tensor = build_processor(section, where="vis_processor.train")(picture())
    assert tensor.shape == (3, 20, 36)
    assert tensor.min() >= 0.0 and tensor.max() <= 1.0 and tensor.max() > 0.5
    assert registry.get_processor_class(name).from_config()(picture().convert("L")).shape == (3, 224, 224)
    assert registry.get_processor_class(name).from_config({"image_size": 32})(picture()).shape == (3, 32, 32)


@pytest.mark.parametrize("processor", [Blip2ImageTrain(32), BlipImageTrain(32)])
def test_training_is_random_by_torchs_seed_alone(processor: Blip2ImageTrain) -> None:
    def draw(seed: int, other: int) -> torch.Tensor:
        torch.manual_seed(seed)
        random.seed(other)
        np.random.seed(other)
        return torch.stack([processor(picture()) for _ in range(4)])

    assert torch.equal(draw(1, 1), draw(1, 2))
    assert not torch.equal(draw(1, 1), draw(2, 1))


def test_crops_keep_the_declared_share_of_the_picture_and_half_are_mirrored() -> None:
    torch.manual_seed(0)
    processor = Blip2ImageTrain(64, mean=(0, 0, 0), std=(1, 1, 1), min_scale=0.5, max_scale=1.0)
    mirrored, shares = 0, []
    for _ in range(200):
        tensor = processor(picture(100, 100))
        columns, lines = tensor[0].mean(0), tensor[1].mean(1)  # red tells the column, green the line
        mirrored += int(columns[0] > columns[-1])
        shares.append(float((columns.max() - columns.min()) * (lines.max() - lines.min())))
    assert 65 <= mirrored <= 135  # 5 standard deviations around 100
    assert 0.44 <= min(shares) <= 0.6 and max(shares) > 0.85
    with pytest.raises(ValueError, match="0 < min_scale <= max_scale <= 1"):
        Blip2ImageTrain(64, min_scale=0.9, max_scale=0.5)


def test_randaugment_operations_change_pictures_but_never_the_kind_of_colour() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    base = Image.fromarray(noise)
    for name, operation in randaugment.OPERATIONS.items():
        changed = operation(base, 0.5, [122, 116, 104])
        assert changed.size == base.size and changed.mode == "RGB", name
        same = np.array_equal(np.asarray(changed), np.asarray(base))
        assert same == (name in ("identity", "auto_contrast")), (
            name
        )  # this picture's contrast is full already
    # A red picture stays more red than green or blue.
    red = Image.new("RGB", (32, 32), (200, 40, 30))
    torch.manual_seed(0)
    augment = randaugment.RandAugment(num_ops=2, magnitude=5, fill=(122, 116, 104))
    for _ in range(50):
        middle = np.asarray(augment(red))[12:20, 12:20].reshape(-1, 3).mean(0)
        assert middle[0] >= middle[1] and middle[0] >= middle[2]


def test_captions_are_lower_case_without_punctuation() -> None:
    caption = BlipCaption()
    assert caption('  A "Big" dog; runs (fast), it\'s #1!\n') == "a big dog runs fast , it's 1"
    assert caption("well-known: salt/pepper & U.S.A.") == "well-known salt/pepper & u s a"
    assert BlipCaption(prompt="a photo of ", max_words=3)("One two THREE four") == "a photo of one two three"
    assert BlipCaption.from_config({"prompt": "x ", "max_words": 1})("A b") == "x a"
    assert caption(caption("Twice. The same!")) == caption("Twice. The same!")


def test_questions_keep_their_question_mark() -> None:
    assert BlipQuestion()(" What's the U.S. flag's colour? ") == "what's the us flag's colour?"
    assert BlipQuestion(max_words=2)("How many dogs?") == "how many"
    assert BlipQuestion.from_config().max_words == 50


def test_mistakes_name_the_key() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'v\.train\.imagesize'; did you mean 'image_size'"):
        build_processor({"name": "blip_image_eval", "imagesize": 3}, where="v.train")
    with pytest.raises(
        ConfigError, match="unknown processor 'blip_image_evl', did you mean 'blip_image_eval'"
    ):
        build_processor({"name": "blip_image_evl"}, where="v.train")
    with pytest.raises(ConfigError, match=r"missing v\.train\.name"):
        build_processor({"image_size": 3}, where="v.train")
    with pytest.raises(ConfigError, match=r"v\.train\.image_size: expected"):
        build_processor({"name": "blip_image_eval", "image_size": "large"}, where="v.train")


@pytest.mark.parametrize("name", ["blip_image_eval", "blip2_image_train", "shapes_image_eval"])
def test_a_picture_as_pillow_opens_it_is_processed_as_a_dataset_would(name: str, tmp_path: Path) -> None:
    """Transparent, deep, or turned by its EXIF tag."""
    clear = np.zeros((16, 32, 4), np.uint8)
    clear[:, 16:] = (255, 0, 0, 255)
    Image.fromarray(clear).save(tmp_path / "clear.png")
    Image.fromarray(np.full((16, 32), 3000, np.uint16)).save(tmp_path / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.ascontiguousarray(clear[..., :3])).save(tmp_path / "turned.jpg", exif=exif)
    processor = build_processor({"name": name, "image_size": 16}, where="vis_processor.eval")
    for path in sorted(tmp_path.iterdir()):
        torch.manual_seed(0)
        wanted = processor(read_image(path))
        torch.manual_seed(0)
        with Image.open(path) as opened:
            assert torch.equal(processor(opened), wanted), path.name
