"""A model that is used before it is trained says so; one that is to be trained, or is complete, says nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from data_helpers import warnings_logged
from generative_helpers import tiny_generative_config
from runner_helpers import config
from stage1_helpers import tiny_config, write_tokenizer

from lavis_lite import api, load_model
from lavis_lite.common import checkpoint as ckpt
from lavis_lite.common.model_recipe import ModelRecipe
from lavis_lite.common.registry import registry
from lavis_lite.models.base import build_model
from lavis_lite.models.convert.formats import Checkpoint, InMemory
from lavis_lite.runners.runner import Runner


@pytest.fixture
def stage1(tmp_path: Path) -> Path:
    model = build_model({"arch": "blip2", **tiny_config(write_tokenizer(tmp_path / "bert"))})
    ckpt.save_tensors(tmp_path / "stage1.safetensors", model.trainable_state_dict())
    return tmp_path / "stage1.safetensors"


def used(section: dict[str, Any]) -> list[str]:
    """What is warned of where the model of a section is built for use."""
    with warnings_logged() as said:
        api.build_recipe(ModelRecipe(section, {}), True, "cpu")
    return said


def test_a_preset_without_weights_names_its_untrained_parts() -> None:
    with warnings_logged() as said:
        load_model("blip2_opt", "shapes")
    assert said == []
    with warnings_logged() as said:
        load_model("blip2_opt", "shapes", is_eval=True)
    (line,) = said
    assert line.startswith(
        "no trained weights for query_tokens, ln_vision, Qformer, llm_proj of this Blip2Gen"
    )
    assert "--checkpoint" in line


def test_a_stage_1_checkpoint_is_half_a_stage_2_model(tmp_path: Path, stage1: Path) -> None:
    section: dict[str, Any] = {"arch": "blip2_opt", **tiny_generative_config(tmp_path / "llm", "opt")}
    section |= {"pretrained": str(stage1), "video": {"frame_embeddings": 2}}
    (line,) = used(section)
    assert line.startswith("no trained weights for llm_proj of this") and "train stage 2 from them" in line
    with warnings_logged() as said:  # as training builds it
        model = build_model(section)
    assert said == []
    tensors = model.trainable_state_dict()
    del tensors["frame_join.embeddings"]  # they begin at zero: a model of pictures is complete without
    ckpt.save_tensors(tmp_path / "stage2.safetensors", tensors)
    assert used({**section, "pretrained": str(tmp_path / "stage2.safetensors")}) == []
    model.load_checkpoint(tmp_path / "stage2.safetensors")
    model.load_checkpoint(stage1)  # which leaves the layer as it was
    assert model.untrained() == []


def test_what_a_kind_of_checkpoint_never_has_is_not_missed(tmp_path: Path) -> None:
    model = build_model({"arch": "blip2", **tiny_config(write_tokenizer(tmp_path / "bert"))})
    assert {name.split(".")[0] for name in model.untrained()} > {"temp", "Qformer", "vision_proj"}
    tensors = {name: tensor for name, tensor in model.trainable_state_dict().items() if name != "temp"}
    model._load_opened(Checkpoint(InMemory(tensors), None, None, (r"^temp$",)), tmp_path / "file")
    assert model.untrained() == []


def test_evaluation_warns_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config(tmp_path, max_steps=1)
    monkeypatch.setattr(registry.get_model_class("fake_mlp"), "optional_keys", (r"^frozen\.", r"^temp$"))
    with warnings_logged() as said:
        checkpoint = Runner(cfg).train().checkpoint
        assert checkpoint is not None
        Runner(cfg).evaluate()
    assert not any("no trained weights" in line for line in said)
    tensors = ckpt.load_tensors(checkpoint / ckpt.MODEL)
    del tensors["temp"]
    ckpt.save_tensors(tmp_path / "part.safetensors", tensors)
    with warnings_logged() as said:
        Runner(config(tmp_path, checkpoint=str(tmp_path / "part.safetensors"))).evaluate()
    assert any(line.startswith("no trained weights for temp of this FakeMLP") for line in said), said
