"""Clips in the generative model: frame by frame through encoder and Q-Former, joined before the language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from generative_helpers import tiny_generative_config
from stage1_helpers import enlarge_weights
from torch import Tensor
from vqa_helpers import ANSWERS, QUESTIONS, question_config, question_model

from lavis_lite.common.checkpoint import save_tensors
from lavis_lite.common.errors import CheckpointError, ConfigError, InputError
from lavis_lite.models.blip2_generative import Blip2Generative
from lavis_lite.models.frames import FrameJoin, VideoConfig
from lavis_lite.samples import complete_samples

CAPTIONS = ["a red dog", "a cat on the mat", "dogs"]
FRAMES = 3


def clips(batch: int = 3, frames: int = FRAMES, *, seed: int = 0) -> Tensor:
    return torch.randn(batch, frames, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def caption_model(folder: Path, family: str = "opt", **video: Any) -> Blip2Generative:
    torch.manual_seed(0)
    model = Blip2Generative.from_config(tiny_generative_config(folder, family, video=video))
    enlarge_weights(model)
    return model.eval()


def by_hand(model: Blip2Generative, video: Tensor, questions: list[str] | None = None) -> Tensor:
    """A clip at a time and a frame at a time: [B, F, Q, D]."""
    told = []
    for row, clip in enumerate(video):
        frames = []
        for frame in clip:
            seen = model.encode_image(frame[None])
            if questions is None:
                frames.append(model.encode_queries(seen).output[0])
            else:
                tokens = model.tokenize([questions[row]])
                frames.append(model.Qformer.encode_pairs(model.query_tokens, seen, tokens)[0])
        told.append(torch.stack(frames))
    return torch.stack(told)


@pytest.mark.parametrize("family", ["opt", "t5"])
def test_frames_stand_one_after_the_other_with_their_embeddings(tmp_path: Path, family: str) -> None:
    model = caption_model(tmp_path, family, frame_embeddings=FRAMES)
    embeddings = model.frame_join.embeddings
    assert embeddings is not None and embeddings.abs().min() > 0, "enlarged by the test"
    video = clips()
    with torch.no_grad():
        queries = by_hand(model, video)
        parts = [model.llm_proj(queries[:, frame] + embeddings[frame]) for frame in range(FRAMES)]
        assert torch.allclose(model.visual_prompt(video), torch.cat(parts, 1), atol=1e-4)
        fewer = model.visual_prompt(video[:, :2])
    assert torch.allclose(fewer, torch.cat(parts[:2], 1), atol=1e-4)


def test_a_mean_forgets_the_order_and_places_do_not(tmp_path: Path) -> None:
    mean = caption_model(tmp_path, join="mean")
    video = clips()
    with torch.no_grad():
        expected = mean.llm_proj(by_hand(mean, video).mean(1))
        assert torch.allclose(mean.visual_prompt(video), expected, atol=1e-4)
        assert torch.allclose(mean.visual_prompt(video.flip(1)), expected, atol=1e-4)
    join = caption_model(tmp_path)
    losses = [join({"video": v, "text_input": CAPTIONS})["loss"] for v in (video, video.flip(1))]
    assert (losses[0] - losses[1]).abs() > 1e-4


def test_each_frame_is_seen_with_its_clips_question(tmp_path: Path) -> None:
    model = question_model(tmp_path, video={"frame_embeddings": FRAMES})
    video, questions = clips(), QUESTIONS[:3]
    with torch.no_grad():
        expected = model.llm_proj(model.frame_join(by_hand(model, video, questions)))
        found = model.visual_prompt(video, questions)
    assert found.shape == (3, FRAMES * 5, 24) and torch.allclose(found, expected, atol=1e-4)


def test_a_picture_is_a_clip_of_one_frame(tmp_path: Path) -> None:
    model = question_model(tmp_path)
    image = clips(3, 1)
    asked = {"text_input": QUESTIONS[:3]}
    assert model.predict_answers({"image": image[:, 0], **asked}) == model.predict_answers(
        {"video": image, **asked}
    )
    with torch.no_grad():
        assert torch.equal(
            model.visual_prompt(image[:, 0], QUESTIONS[:3]), model.visual_prompt(image, QUESTIONS[:3])
        )


def test_clips_are_trained_on_captions_and_answers(tmp_path: Path) -> None:
    model = question_model(tmp_path, video={"frame_embeddings": FRAMES}).train()
    loss = model({"video": clips(4), "text_input": QUESTIONS, "text_output": ANSWERS})["loss"]
    loss.backward()
    embeddings = model.frame_join.embeddings
    assert embeddings is not None and embeddings.grad is not None and embeddings.grad.abs().sum(1).min() > 0
    assert "frame_join.embeddings" in model.trainable_state_dict()
    assert "frame_join.embeddings" in model.no_weight_decay()
    captions = caption_model(tmp_path / "captions").train()
    assert captions({"video": clips(), "text_input": CAPTIONS})["loss"].isfinite()


def test_training_on_pictures_reaches_every_parameter_too(tmp_path: Path) -> None:
    """Or data parallelism would wait for the frame embeddings in batches of pictures."""
    model = question_model(tmp_path, video={"frame_embeddings": FRAMES}).train()
    model({"image": clips(4, 1)[:, 0], "text_input": QUESTIONS, "text_output": ANSWERS})["loss"].backward()
    assert model.frame_join.embeddings is not None and model.frame_join.embeddings.grad is not None


@pytest.mark.parametrize("family", ["opt", "t5"])
def test_a_batch_says_of_each_clip_what_it_says_of_it_alone(tmp_path: Path, family: str) -> None:
    model = question_model(tmp_path, family, video={"frame_embeddings": FRAMES})
    video, questions = clips(), QUESTIONS[:3]
    together = model.predict_answers({"video": video, "text_input": questions}, num_beams=3)
    alone = [
        model.predict_answers({"video": clip[None], "text_input": question}, num_beams=3)[0]
        for clip, question in zip(video, questions, strict=True)
    ]
    assert together == alone
    ranked = model.predict_answers(
        {"video": video, "text_input": questions}, inference_method="rank", answer_list=ANSWERS
    )
    assert set(ranked) <= set(ANSWERS)
    said = model.generate({"video": video, "prompt": "describe:"}, num_beams=2, max_length=5, num_captions=2)
    assert len(said) == 6
    assert isinstance(model.chat(video[:1], [], "what color is it?", max_new_tokens=3)[0], str)


def test_a_checkpoint_of_pictures_begins_a_model_of_clips(tmp_path: Path) -> None:
    pictures = question_model(tmp_path)
    save_tensors(tmp_path / "pictures.safetensors", pictures.trainable_state_dict())
    model = Blip2Generative.from_config(question_config(tmp_path, video={"frame_embeddings": FRAMES}))
    model.load_checkpoint(tmp_path / "pictures.safetensors")
    assert model.frame_join.embeddings is not None and not model.frame_join.embeddings.any()
    for name in ("visual_encoder", "language_model"):
        getattr(model, name).load_state_dict(getattr(pictures, name).state_dict())
    video = clips()
    with torch.no_grad():
        told = model.eval().visual_prompt(video, QUESTIONS[:3])
        assert torch.allclose(told, pictures.visual_prompt(video, QUESTIONS[:3]), atol=1e-6), (
            "it says what it said"
        )
    save_tensors(tmp_path / "clips.safetensors", model.trainable_state_dict())
    with pytest.raises(CheckpointError, match=r"frame_join\.embeddings"):
        pictures.load_checkpoint(tmp_path / "clips.safetensors")


def test_mistakes_are_one_clear_line(tmp_path: Path) -> None:
    model = question_model(tmp_path, video={"frame_embeddings": FRAMES})
    asked = {"text_input": "how big"}
    for samples, message in (
        (
            {"video": clips()[0]},
            r"samples\['video'\] must be a float tensor \[B, F, 3, H, W\], not \[3, 3, 16, 16\]",
        ),
        ({"video": clips(), "image": clips()[:, 0]}, "and not both"),
        ({}, "there are: text_input"),
        ({"video": clips(2, 4)}, "the clips have 4 frames and model.video.frame_embeddings=3"),
        ({"video": "clip.mp4"}, "not str"),
    ):
        with pytest.raises(InputError, match=message):
            model.predict_answers({**samples, **asked})


def test_stage_1_takes_no_clips() -> None:
    with pytest.raises(InputError, match="not NoneType; this model takes no clips"):
        complete_samples({"video": clips(), "text_input": CAPTIONS})


def test_configuration_mistakes(tmp_path: Path) -> None:
    for video, message in (
        ({"join": "mean", "frame_embeddings": 4}, r"model\.video\.frame_embeddings: a mean over frames"),
        ({"frame_embeddings": -1}, r"model\.video\.frame_embeddings can't be negative"),
        ({"join": "sum"}, r"model\.video\.join: 'sum'"),
        ({"embeddings": 3}, r"unknown key 'model\.video\.embeddings'"),
    ):
        with pytest.raises(ConfigError, match=message):
            Blip2Generative.validate_config(question_config(tmp_path, video=video))


def test_embeddings_begin_at_zero_and_join_nothing_else() -> None:
    join = FrameJoin(VideoConfig(frame_embeddings=4), 6)
    queries = torch.randn(2, 3, 5, 6)
    assert torch.equal(join(queries), queries.reshape(2, 15, 6))
    assert not list(FrameJoin(VideoConfig(), 6).parameters())
