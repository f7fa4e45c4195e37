"""Frozen weights that no file gave are kept with the run, and so are the same wherever it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from feature_world import project
from generative_helpers import tiny_generative_config
from runner_helpers import assert_same_bits, weights
from torch import Tensor

from lavis_lite.api import load_model
from lavis_lite.common import checkpoint as ckpt
from lavis_lite.common.config import Config, load_config
from lavis_lite.common.errors import CheckpointError
from lavis_lite.common.registry import registry
from lavis_lite.models.base import BaseModel
from lavis_lite.models.convert.command import convert
from lavis_lite.runners.runner import Runner

PLAIN = ["run.cache_features=false", "run.max_steps=2", "run.save_every=1"]


def config(folder: Path, *options: str) -> Config:
    """A stage 1 on an encoder that is frozen at random weights."""
    return load_config(project(folder), [*PLAIN, *options])


def encoder_of(folder: Path, seed: int, checkpoint: Path | None = None) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return dict(load_model(str(folder), checkpoint=checkpoint).visual_encoder.state_dict())  # type: ignore[union-attr]


def kept_in(run_dir: Path) -> Path:
    (file,) = run_dir.glob("frozen-*.safetensors")
    return file


def test_a_run_is_one_model_whatever_was_drawn_before(tmp_path: Path) -> None:
    runner = Runner(config(tmp_path))
    runner.train()
    trained = {name: x.clone() for name, x in runner.parts.model.visual_encoder.state_dict().items()}  # type: ignore[union-attr,operator]
    assert (
        ckpt.load_state(ckpt.newest(tmp_path / "run"))["frozen_from"]
        == f"../../{kept_in(tmp_path / 'run').name}"
    )  # type: ignore[arg-type]
    assert_same_bits(encoder_of(tmp_path / "run", 1), trained)
    (tmp_path / "run").rename(tmp_path / "moved")
    assert_same_bits(encoder_of(tmp_path / "moved", 2), trained)
    convert(tmp_path / "moved", tmp_path / "converted", to="lavis_lite")
    converted = ckpt.load_tensors(tmp_path / "converted/model.safetensors")
    assert all(torch.equal(converted[f"visual_encoder.{name}"], x) for name, x in trained.items())
    kept_in(tmp_path / "moved").unlink()
    with pytest.raises(CheckpointError, match=r"frozen parts of '.*moved/frozen-.*', which isn't there"):
        encoder_of(tmp_path / "moved", 3)


def test_evaluation_has_the_encoder_of_training_whatever_its_seed(tmp_path: Path) -> None:
    Runner(config(tmp_path, "run.test_splits=[train]")).train()
    measured = [
        Runner(config(tmp_path, "run.test_splits=[train]", f"run.seed={n}")).evaluate() for n in (1, 2)
    ]
    assert measured[0] == measured[1]


def test_a_run_goes_on_with_the_encoder_it_began_with(tmp_path: Path) -> None:
    whole = Runner(config(tmp_path / "whole", "run.max_steps=3")).train()
    Runner(config(tmp_path / "parts")).train()
    kept, content = kept_in(tmp_path / "parts/run"), kept_in(tmp_path / "parts/run").read_bytes()
    parts = Runner(config(tmp_path / "parts", "run.max_steps=3")).train()
    assert_same_bits(weights(whole.checkpoint), weights(parts.checkpoint))
    assert kept_in(tmp_path / "parts/run").read_bytes() == content
    # Other runs may be built on the first one's: another has a file of its own.
    Runner(config(tmp_path / "parts", "run.resume=never", "run.seed=5")).train()
    assert len(list((tmp_path / "parts/run").glob("frozen-*"))) == 2 and kept.read_bytes() == content
    first = tmp_path / "parts/run/previous_1/checkpoints/step_000003"
    assert_same_bits(
        encoder_of(tmp_path / "parts/run", 4, first), dict(encoder_of(tmp_path / "whole/run", 5))
    )


def test_a_step_that_is_set_aside_and_one_behind_a_link_are_still_models(tmp_path: Path) -> None:
    cfg = config(tmp_path, "run.max_steps=3")
    Runner(cfg).train()
    wanted = encoder_of(tmp_path / "run", 1)
    early = tmp_path / "run/checkpoints/step_000002"
    Runner(config(tmp_path, f"run.resume={early}", "run.max_steps=2")).train()
    aside = tmp_path / "run/previous_1/checkpoints/step_000003"
    assert_same_bits(encoder_of(tmp_path / "run", 2, aside), wanted)
    (tmp_path / "run/checkpoints").rename(tmp_path / "elsewhere")
    (tmp_path / "run/checkpoints").symlink_to(tmp_path / "elsewhere")
    assert_same_bits(encoder_of(tmp_path / "run", 3), wanted)


def test_stored_features_of_a_run_that_goes_on_are_those_of_its_encoder(tmp_path: Path) -> None:
    """An encoder from another run's file: the seed doesn't make it again."""
    Runner(config(tmp_path, "run.output_dir=" + str(tmp_path / "first"), "run.seed=9")).train()
    options = ["run.cache_features=true", f"model.pretrained={tmp_path / 'first'}"]
    Runner(load_config(project(tmp_path), [*options, "run.max_steps=2"])).train()
    stores = list((tmp_path / "features").iterdir())
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "features").glob("*/*.safetensors")}
    Runner(load_config(project(tmp_path), [*options, "run.max_steps=3"])).train()
    assert list((tmp_path / "features").iterdir()) == stores
    assert {path: path.stat().st_mtime_ns for path in before} == before


def generative(folder: Path, **changes: Any) -> BaseModel:
    section = {**tiny_generative_config(folder, "opt"), **changes}
    model = registry.get_model_class("blip2_opt").from_config(section)
    assert isinstance(model, BaseModel)
    return model


def test_what_another_file_gave_and_what_none_gave_are_kept_together(tmp_path: Path) -> None:
    """Stage 2 on a stage 1 whose encoder was random, into a language model that is random, too."""
    one, other = generative(tmp_path), generative(tmp_path)
    encoder = {name: x for name, x in one.state_dict().items() if name.startswith("visual_encoder.")}
    ckpt.save_tensors(tmp_path / "first.safetensors", encoder)
    other.load_state_dict(encoder, strict=False)
    other.frozen_from = tmp_path / "first.safetensors"
    other._held = frozenset(encoder)
    assert other.keep_frozen(tmp_path / "run") == ["language_model"]
    kept = ckpt.load_tensors(kept_in(tmp_path / "run"))
    assert kept.keys() == other._frozen()
    assert all(torch.equal(kept[name], x) for name, x in encoder.items())
    assert other.keep_frozen(tmp_path / "again") == []
    assert not (tmp_path / "again").exists()


def test_what_files_give_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "shapes.yaml"
    path.write_text(
        yaml.safe_dump({"model": {"arch": "blip2_opt", "model_type": "shapes"}, "task": {"name": "vqa"}})
    )
    section = load_config(path, ["datasets.shapes_vqa={}"]).model
    model = registry.get_model_class("blip2_opt").from_config(section)
    assert isinstance(model, BaseModel) and model._frozen()
    assert model.keep_frozen(tmp_path / "none") == []
    assert not (tmp_path / "none").exists()
