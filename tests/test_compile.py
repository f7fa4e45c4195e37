"""run.compile: the same losses and keys; a compiler that doesn't work costs one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from generative_helpers import tiny_generative_config
from runner_helpers import assert_same_bits, config, weights
from stage1_helpers import tiny_config, tiny_samples, write_tokenizer
from torch import nn

from lavis_lite.common.registry import registry
from lavis_lite.parallel.blocks import compiled_blocks
from lavis_lite.runners import compiling
from lavis_lite.runners.runner import Runner

CPU = torch.device("cpu")
WORKS = compiling.compiler_failure(CPU) is None


def build(stage: int, folder: Path) -> Any:
    torch.manual_seed(0)
    if stage == 1:
        section = tiny_config(write_tokenizer(folder / "tokenizer"))
        return registry.get_model_class("blip2").from_config(section).train()
    return registry.get_model_class("blip2_opt").from_config(tiny_generative_config(folder, "opt")).train()


@pytest.mark.slow
@pytest.mark.skipif(not WORKS, reason="torch.compile doesn't work here")
@pytest.mark.parametrize("stage", [1, 2])
def test_compiled_blocks_give_the_same_losses_and_gradients(stage: int, tmp_path: Path) -> None:
    plain, compiled = build(stage, tmp_path), build(stage, tmp_path)
    assert compiling.compile_blocks(compiled, CPU) > 0
    results = []
    for model in (plain, compiled):
        for batch in (4, 3):  # other sizes than those first compiled for
            torch.manual_seed(1)
            model.zero_grad()
            loss = model(tiny_samples(batch))["loss"]
            loss.backward()
        results.append((loss.detach(), model.query_tokens.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert list(plain.state_dict()) == list(compiled.state_dict())
    assert list(plain.trainable_state_dict()) == list(compiled.trainable_state_dict())


def test_what_is_compiled_are_blocks_not_single_layers(tmp_path: Path) -> None:
    model = build(1, tmp_path)
    blocks = compiled_blocks(model)
    assert blocks and not any(isinstance(block, (nn.Linear, nn.LayerNorm)) for block in blocks)
    kinds = {type(block).__name__ for block in blocks}
    assert kinds == {"AddNorm", "Intermediate"}
    language_model = build(2, tmp_path).language_model
    assert {type(block).__name__ for block in compiled_blocks(language_model)} == {"OPTDecoderLayer"}


def test_without_a_compiler_the_run_goes_on_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(device: torch.device) -> None:
        raise RuntimeError("No working C++ compiler found\nlong explanation")

    monkeypatch.setattr(compiling, "_try_out", broken)
    said: list[str] = []
    monkeypatch.setattr(compiling.logger, "warning", lambda text, *args: said.append(text % args))
    result = Runner(config(tmp_path / "compiled", compile=True)).train()
    assert said == [
        "run.compile: going on without, since torch.compile does not work here: No working C++ compiler found"
    ]
    plain = Runner(config(tmp_path / "plain")).train()
    assert_same_bits(weights(result.checkpoint), weights(plain.checkpoint))
