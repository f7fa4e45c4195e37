"""run.compile: the same losses and keys; a compiler that doesn't work costs one line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._functorch.config as settings
from functorch.compile import make_boxed_func
from generative_helpers import tiny_generative_config
from runner_helpers import assert_same_bits, config, start, weights
from stage1_helpers import tiny_config, tiny_samples, write_tokenizer
from torch import nn
from torch._inductor.exc import InductorError

from lavis_lite.common.errors import TrainingError
from lavis_lite.common.registry import registry
from lavis_lite.parallel.blocks import compiled_blocks
from lavis_lite.runners import compiling
from lavis_lite.runners.runner import Runner

CPU = torch.device("cpu")
WORKS = compiling.compiler_failure(CPU) is None


def build(stage: int, folder: Path, *, family: str = "opt", recompute: bool = False) -> Any:
    torch.manual_seed(0)
    if stage == 1:
        section = tiny_config(write_tokenizer(folder / "tokenizer"))
        return registry.get_model_class("blip2").from_config(section).train()
    own = {"language_model": {"grad_checkpointing": recompute}}
    section = tiny_generative_config(folder, family, **own)
    return registry.get_model_class(f"blip2_{family}").from_config(section).train()


@pytest.mark.slow
@pytest.mark.skipif(not WORKS, reason="torch.compile doesn't work here")
@pytest.mark.parametrize(
    ("stage", "family", "recompute"), [(1, "", False), (2, "opt", False), (2, "opt", True), (2, "t5", True)]
)
def test_compiled_blocks_give_the_same_losses_and_gradients(
    stage: int, family: str, recompute: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that recompute, too. And all variants are compiled: what goes beyond torch's limit is an error here.
    Generation is not compiled."""
    torch._dynamo.reset()
    plain = build(stage, tmp_path, family=family)
    compiled = build(stage, tmp_path, family=family, recompute=recompute)
    assert compiling.compile_blocks(compiled, CPU) > 0
    image = tiny_samples(3)["image"]
    said: list[str] = []
    monkeypatch.setattr(compiling.logger, "warning", lambda text, *args: said.append(text % args))
    results, texts = [], []
    for model in (plain, compiled):
        for batch in (4, 3):  # other sizes than those first compiled for
            torch.manual_seed(1)
            model.zero_grad()
            with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
                loss = model(tiny_samples(batch))["loss"]
            loss.backward()
            generated = model.eval().generate({"image": image}, num_beams=2, max_length=6)
            model.train()
        results.append((loss.detach(), model.query_tokens.grad))
        texts.append(generated)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert texts[0] == texts[1] and not said
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


def test_a_block_that_cannot_be_compiled_runs_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Something small compiles, a block of the model does not: one line, and the numbers of a plain run."""

    def failing(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no kernel for this\nlong explanation")

    compile_with = torch.compile
    monkeypatch.setattr(compiling, "_try_out", lambda device: None)
    monkeypatch.setattr(torch, "compile", lambda function: compile_with(function, backend=failing))
    said: list[str] = []
    monkeypatch.setattr(compiling.logger, "warning", lambda text, *args: said.append(text % args))
    plain, compiled = build(1, tmp_path), build(1, tmp_path)
    assert compiling.compile_blocks(compiled, CPU) > 0
    losses = []
    for model in (plain, compiled, compiled):
        torch.manual_seed(1)
        losses.append(model(tiny_samples(4))["loss"])
    assert losses[0] == losses[1] == losses[2]
    assert len(said) == 1 and "\n" not in said[0] and "no kernel for this" in said[0]
    assert said[0].startswith("run.compile: going on without, since a block can't be compiled: ")


def without_backward() -> Any:
    """A compiler that can do forward passes alone."""
    from torch._dynamo.backends.common import aot_autograd

    def failing(graph: Any, inputs: Any) -> Any:
        raise InductorError(RuntimeError("no kernel for this\nlong explanation"), None)

    def plain(graph: Any, inputs: Any) -> Any:
        return make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=plain, bw_compiler=failing)


def test_a_block_whose_backward_pass_cannot_be_compiled_runs_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    compile_with, backend = torch.compile, without_backward()
    monkeypatch.setattr(compiling, "_try_out", lambda device: None)
    monkeypatch.setattr(torch, "compile", lambda function: compile_with(function, backend=backend))
    said: list[str] = []
    monkeypatch.setattr(compiling.logger, "warning", lambda text, *args: said.append(text % args))
    plain, compiled = build(1, tmp_path), build(1, tmp_path)
    with settings.patch(force_non_lazy_backward_lowering=False):  # puts back what is set here
        assert compiling.compile_blocks(compiled, CPU) > 0
        for model in (plain, compiled):
            torch.manual_seed(1)
            model(tiny_samples(4))["loss"].backward()
    assert torch.equal(plain.query_tokens.grad, compiled.query_tokens.grad)
    assert len(said) == 1 and "\n" not in said[0], said
    assert said[0].startswith("run.compile: going on without, since a block can't be compiled: ")
    assert "no kernel for this" in said[0]


def test_a_backward_pass_that_is_compiled_too_late_is_one_line() -> None:
    """The forward pass is compiled, and long over."""
    torch._dynamo.reset()
    function = torch.compile(torch.tanh, backend=without_backward())
    with settings.patch(force_non_lazy_backward_lowering=False):
        loss = function(torch.ones(3, requires_grad=True)).sum()
    with pytest.raises(TrainingError) as caught, compiling.backward_errors():
        loss.backward()
    assert "can't be compiled: RuntimeError: no kernel for this; set run.compile=false" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="another"), compiling.backward_errors():
        raise ValueError("another")


@pytest.mark.slow
@pytest.mark.skipif(not WORKS, reason="torch.compile doesn't work here")
def test_compiled_blocks_train_under_strategies_as_one_process_does_without(tmp_path: Path) -> None:
    """Weights in parts or whole, trained or frozen, recomputing or not, with an evaluation between any two steps."""
    process = start([sys.executable, "-m", "tests.compile_scenario", str(tmp_path)])
    _, err = process.communicate(timeout=900)
    assert process.returncode == 0, err[-3000:]
    names = ("plain", "ddp", "ddp_recomputing", "fsdp2", "fsdp2_recomputing")
    plain, *others = (torch.load(tmp_path / f"{run}.pt", weights_only=True) for run in names)
    for several in others:
        assert not several["said"] and several["blocks"] == 4 and several["graphs"] > 0
        for what in ("losses", "norms", "alone"):
            assert several[what] == pytest.approx(plain[what], rel=1e-5), what
        for key, weight in plain["weights"].items():
            torch.testing.assert_close(several["weights"][key], weight, rtol=1e-4, atol=2e-6, msg=key)
