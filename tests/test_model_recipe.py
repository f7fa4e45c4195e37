"""What `--model` and `load_model` may name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runner_helpers import assert_same_bits, config

from lavis_lite import load_model, load_model_and_preprocess
from lavis_lite.common.checkpoint import MODEL, list_checkpoints, load_tensors
from lavis_lite.common.errors import CheckpointError, ConfigError
from lavis_lite.common.io import atomic_write
from lavis_lite.common.model_recipe import is_run, model_recipe
from lavis_lite.runners.runner import Runner


def test_a_name_and_a_type_mean_a_preset() -> None:
    one, other = model_recipe("blip2/shapes"), model_recipe("blip2", "shapes")
    assert one == other and one.arch == "blip2" and "pretrained" not in one.model
    assert one.preprocess["vis_processor"]["eval"]["name"] == "shapes_image_eval"
    assert model_recipe("blip2/shapes", checkpoint="x").model["pretrained"] == "x"


@pytest.mark.parametrize("name", ["blip2", "blip2/", "/shapes", "/no/run"])
def test_anything_else_is_one_line(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"model '{name}': give a name and a type.*or the folder of a run"):
        model_recipe(name)


def test_a_run_is_a_model_even_of_an_architecture_of_ones_own(tmp_path: Path) -> None:
    """The fake model is registered by the file that the run's configuration imports."""
    result = Runner(config(tmp_path, "model.width=12", save_every=3)).train()
    model, vis, text = load_model_and_preprocess(str(tmp_path / "run"), is_eval=True)
    assert type(model).__name__ == "FakeMLP" and not model.training and (vis, text) == ({}, {})
    assert result.checkpoint is not None
    assert_same_bits(model.trainable_state_dict(), load_tensors(result.checkpoint / MODEL))
    third = list_checkpoints(tmp_path / "run" / "checkpoints")[0][1]
    earlier = load_model(str(tmp_path / "run"), checkpoint=third)
    assert not torch.equal(earlier.first.weight, model.first.weight)


def test_processors_are_those_of_the_runs_first_dataset(tmp_path: Path) -> None:
    text = (
        "model: {arch: blip2, tokenizer: shapes}\n"
        "datasets:\n"
        "  one: {vis_processor: {eval: {name: shapes_image_eval, image_size: 64}}}\n"
        "  two: {vis_processor: {eval: {name: blip_image_eval}}}\n"
    )
    atomic_write(tmp_path / "config.yaml", text)
    recipe = model_recipe(str(tmp_path))
    assert is_run(tmp_path) and recipe.model["pretrained"] == str(tmp_path)
    assert recipe.preprocess["vis_processor"] == {
        "train": {"name": "blip2_image_train"},  # the builder's own, where the run says nothing
        "eval": {"name": "shapes_image_eval", "image_size": 64},
    }
    assert recipe.preprocess["text_processor"]["eval"] == {"name": "blip_caption"}


def test_a_folder_that_is_no_run_says_so(tmp_path: Path) -> None:
    atomic_write(tmp_path / "config.yaml", "model: {}\n")
    with pytest.raises(
        ConfigError, match=r"config.yaml' is not of a run: it has no model.arch, or no datasets"
    ):
        model_recipe(str(tmp_path))
    atomic_write(
        tmp_path / "config.yaml", "model: {arch: blip2, tokenizer: shapes}\ndatasets: {a: {limit: 1}}\n"
    )
    with pytest.raises(CheckpointError, match="holds neither"):
        load_model(str(tmp_path))
