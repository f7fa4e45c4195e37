"""Stage 2: what is built and trained, what it takes of a stage-1 checkpoint, and what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from generative_helpers import FAMILIES, tiny_generative_config
from stage1_helpers import enlarge_weights, tiny_config, tiny_samples, write_tokenizer

from lavis_lite.common import checkpoint as ckpt
from lavis_lite.common.errors import CheckpointError, ConfigError
from lavis_lite.models.blip2_generative import Blip2Generative
from lavis_lite.models.blip2_qformer import Blip2QFormer


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Blip2Generative:
    torch.manual_seed(0)
    built = Blip2Generative.from_config(tiny_generative_config(tmp_path / "llm", request.param))
    enlarge_weights(built, std=0.2)
    return built.eval()


def test_what_only_text_needs_is_not_built(model: Blip2Generative) -> None:
    names = {name for name, _ in model.named_parameters() if not name.startswith("language_model")}
    assert not any("word_embeddings" in name or "cls." in name or ".intermediate." in name for name in names)
    trained = model.trainable_state_dict()
    assert {name.split(".")[0] for name in trained} == {"ln_vision", "query_tokens", "Qformer", "llm_proj"}


def test_full_size_has_107_million_trained_parameters() -> None:
    """method.md section 1: 107,133,696 with ViT-g and OPT-2.7B."""
    config = {
        "vision_encoder": {"name": "eva_clip_g"},
        "language_model": {
            "name": "opt",
            "model_name": "facebook/opt-2.7b",
            "config": {
                "model_type": "opt",
                "hidden_size": 2560,
                "word_embed_proj_dim": 2560,
                "ffn_dim": 10240,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
            },
        },
    }
    with torch.device("meta"):
        model = Blip2Generative.from_config(config)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 107_133_696


def test_training_reaches_the_qformer_and_leaves_the_frozen_parts(model: Blip2Generative) -> None:
    model.train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(25):
        torch.manual_seed(3)  # the same prefix each time
        loss = model(tiny_samples())["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    for name, parameter in model.named_parameters():
        frozen = name.startswith(("visual_encoder", "language_model"))
        assert torch.equal(parameter, before[name]) == frozen, name


def test_a_prompt_is_read_and_not_scored(tmp_path: Path) -> None:
    config = tiny_generative_config(tmp_path / "llm", "opt", prompt="a photo of")
    torch.manual_seed(0)
    model = Blip2Generative.from_config(config).eval()
    samples = tiny_samples()
    visual = model.visual_prompt(samples["image"])
    texts = samples["text_input"]
    expected = model.language_model.answer_losses(visual, ["a photo of"] * 4, texts, max_length=12).mean()
    torch.testing.assert_close(model(samples)["loss"], expected)


def stage1_checkpoint(folder: Path, **changes: Any) -> Blip2QFormer:
    torch.manual_seed(9)
    stage1 = Blip2QFormer.from_config(tiny_config(write_tokenizer(folder / "bert"), **changes))
    enlarge_weights(stage1)
    ckpt.save_checkpoint(folder / ckpt.FOLDER, 1, model=stage1.trainable_state_dict(), optimizer={}, state={})
    return stage1.eval()


def test_stage_2_goes_on_where_stage_1_ended(model: Blip2Generative, tmp_path: Path) -> None:
    stage1 = stage1_checkpoint(tmp_path / "stage1")
    model.load_checkpoint(tmp_path / "stage1")
    model.visual_encoder.load_state_dict(stage1.visual_encoder.state_dict())
    image = tiny_samples()["image"]
    ours = model.encode_queries(model.project_image(model.encode_image(image))).output
    theirs = stage1.encode_queries(stage1.project_image(stage1.encode_image(image))).output
    torch.testing.assert_close(ours, theirs)


def test_a_stage_2_checkpoint_must_be_whole(model: Blip2Generative, tmp_path: Path) -> None:
    tensors = model.trainable_state_dict()
    ckpt.save_tensors(tmp_path / "whole.safetensors", tensors)
    model.load_checkpoint(tmp_path / "whole.safetensors")
    del tensors["llm_proj.weight"]
    ckpt.save_tensors(tmp_path / "lacking.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"1 missing: llm_proj\.weight"):
        model.load_checkpoint(tmp_path / "lacking.safetensors")
    stage1_checkpoint(tmp_path / "wide", qformer={"hidden_size": 64})
    with pytest.raises(CheckpointError, match="of another shape"):
        model.load_checkpoint(tmp_path / "wide")


@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_says_what_each_image_alone_does(model: Blip2Generative, beams: int) -> None:
    image = tiny_samples()["image"]
    prompts = ["a photo of", "question: where is the star? answer:", "the", ""]
    together = model.generate({"image": image, "prompt": prompts}, num_beams=beams, max_new_tokens=8)
    alone = [
        model.generate({"image": image[row : row + 1], "prompt": prompt}, num_beams=beams, max_new_tokens=8)[
            0
        ]
        for row, prompt in enumerate(prompts)
    ]
    assert together == alone
    same = model.generate({"image": image, "prompt": "the"}, num_beams=beams, max_length=8)
    assert same == model.generate({"image": image, "prompt": ["the"] * 4}, num_beams=beams, max_new_tokens=8)


def test_several_captions_and_their_scores(model: Blip2Generative) -> None:
    samples = {"image": tiny_samples()["image"][:2], "prompt": "a photo of"}
    found = model.generate_with_scores(samples, num_beams=4, num_captions=3, max_new_tokens=6)
    assert len(found.texts) == 6 and found.scores.shape == (6,)
    scores = found.scores.view(2, 3)
    assert bool((scores[:, :-1] >= scores[:, 1:]).all())
    torch.manual_seed(0)
    drawn = model.generate(
        samples, use_nucleus_sampling=True, num_captions=4, max_new_tokens=6, temperature=3.0
    )
    assert len(drawn) == 8 and len(set(drawn)) > 2
    assert len(model.generate(samples, num_beams=1, max_new_tokens=6, min_length=6)) == 2


def test_mistakes_are_one_clear_line(model: Blip2Generative) -> None:
    image = tiny_samples()["image"]
    with pytest.raises(ValueError, match="2 prompts for 4 images"):
        model.generate({"image": image, "prompt": ["a", "b"]})
    with pytest.raises(ValueError, match="must be a string or a list of strings"):
        model.generate({"image": image, "prompt": [1, 2, 3, 4]})
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\], not list"):
        model.generate({"image": [1, 2]})
    with pytest.raises(ValueError, match="3 captions asked of 2 beams"):
        model.generate({"image": image}, num_beams=2, num_captions=3)


def test_configuration_mistakes(tmp_path: Path) -> None:
    config = tiny_generative_config(tmp_path / "llm", "t5")
    with pytest.raises(ConfigError, match=r"model\.language_model\.name"):
        Blip2Generative.validate_config({**config, "language_model": {"model_name": "x"}})
    with pytest.raises(ConfigError, match="unknown language model 'opd'"):
        Blip2Generative.validate_config({**config, "language_model": {"name": "opd", "model_name": "x"}})
    with pytest.raises(ConfigError, match="overflows in fp16"):
        section = {**config["language_model"], "precision": "fp16"}
        Blip2Generative.validate_config({**config, "language_model": section})
