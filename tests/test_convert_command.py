"""`lavis-lite convert` and runs as its source: what it says, and mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from convert_helpers import (
    OPT,
    lavis_state,
    stage1_config,
    stage2_config,
)
from safetensors.torch import save_file

from lavis_lite.commands.convert import convert_main
from lavis_lite.common import checkpoint as ckpt
from lavis_lite.common.errors import CheckpointError
from lavis_lite.models.blip2_generative import Blip2Generative
from lavis_lite.models.blip2_qformer import Blip2QFormer
from lavis_lite.models.convert.command import convert


def test_a_run_tells_its_language_model(tmp_path: Path) -> None:
    model = Blip2Generative.from_config(stage2_config(OPT))
    ckpt.save_checkpoint(
        tmp_path / "run" / "checkpoints", 7, model=model.trainable_state_dict(), optimizer={}, state={}
    )
    with pytest.raises(CheckpointError, match="add --llm opt or t5"):
        convert(tmp_path / "run", tmp_path / "theirs.pth", to="lavis")
    (tmp_path / "run" / "config.yaml").write_text("model: {language_model: {name: opt}}")
    with pytest.raises(CheckpointError, match="family opt, not t5"):
        convert(tmp_path / "run", tmp_path / "theirs.pth", to="lavis", llm="t5")
    convert(tmp_path / "run", tmp_path / "theirs.pth", to="lavis")
    written = torch.load(tmp_path / "theirs.pth", weights_only=True)["model"]
    assert written.keys() == lavis_state("opt", vision="none").keys()
    assert torch.equal(written["opt_proj.weight"], model.llm_proj.weight)


def run_command(*arguments: Any) -> None:
    convert_main([str(argument) for argument in arguments])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = lavis_state("stage1", vision="none")
    torch.save({"model": state}, tmp_path / "theirs.pth")
    run_command(tmp_path / "theirs.pth", tmp_path / "hf", "--to", "hf")
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("LAVIS, stage 1 -> Hugging Face's Blip2ForImageTextRetrieval: ")
    assert said[1].startswith("note: no config.json") and "Qformer.cls.predictions.decoder.weight" in said[2]

    model = Blip2QFormer.from_config(stage1_config(tmp_path, "tiny_patches"))
    ckpt.save_checkpoint(
        tmp_path / "run" / "checkpoints", 7, model=model.trainable_state_dict(), optimizer={}, state={}
    )
    run_command(tmp_path / "run", tmp_path / "of_a_run.pth", "--to", "lavis")
    written = torch.load(tmp_path / "of_a_run.pth", weights_only=True)["model"]
    assert written.keys() == state.keys()
    assert torch.equal(written["query_tokens"], model.query_tokens)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("absent.pth", "no checkpoint at"),
        ("text.pth", "can't be read as weights only"),
        ("empty", "holds neither model.safetensors nor"),
        ("other.safetensors", "is no BLIP-2 model: neither llm_proj.weight nor vision_proj.weight"),
        ("unknown.pth", "1 unknown keys: novel"),
    ],
)
def test_a_mistake_is_one_line(
    tmp_path: Path, source: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "empty").mkdir()
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    torch.save({"model": lavis_state("opt") | {"novel": torch.zeros(1)}}, tmp_path / "unknown.pth")
    with pytest.raises(SystemExit) as stopped:
        run_command(tmp_path / source, tmp_path / "new.pth", "--to", "lavis")
    said = capsys.readouterr().err
    assert stopped.value.code == 1 and message in said and source in said and said.count("\n") == 1
    assert not (tmp_path / "new.pth").exists()
