from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from lavis_lite.common import optim
from lavis_lite.common.errors import CheckpointError, ConfigError
from lavis_lite.common.registry import registry


def schedule(**changes: float) -> optim.Schedule:
    settings = {
        "max_steps": 100,
        "init_lr": 1.0,
        "min_lr": 0.1,
        "warmup_lr": 0.0,
        "warmup_steps": 20,
        **changes,
    }
    made: optim.Schedule = registry.get_lr_scheduler_class("linear_warmup_cosine_lr")(**settings)
    return made


def test_warm_up_is_linear_and_cosine_ends_at_the_minimum() -> None:
    lr = schedule()
    assert [lr(step) for step in (0, 5, 10, 20)] == pytest.approx([0.0, 0.25, 0.5, 1.0])
    assert lr(60) == pytest.approx(0.1 + 0.9 * 0.5)
    assert lr(40) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))
    assert lr(100) == lr(1000) == pytest.approx(0.1)


def test_the_rate_never_jumps() -> None:
    lr = schedule(max_steps=1000, warmup_steps=300)
    rates = [lr(step) for step in range(1001)]
    assert max(abs(a - b) for a, b in pairwise(rates)) < 1.0 / 250


def test_a_warm_up_longer_than_the_run_just_rises() -> None:
    lr = schedule(max_steps=10, warmup_steps=20)
    assert lr(10) == pytest.approx(0.5)
    assert schedule(warmup_steps=0)(0) == pytest.approx(1.0)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, 4)
        self.block = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.temp = nn.Parameter(torch.ones(()))
        self.queries = nn.Parameter(torch.ones(1, 2, 4))
        self.tied = nn.Linear(4, 3, bias=False)
        self.tied.weight = self.embed.weight

    def no_weight_decay(self) -> set[str]:
        return {"queries"}

    def lr_scale(self, name: str, decay: float) -> float:
        return decay**2 if name.startswith("embed") else 1.0


def grouped(model: nn.Module, layer_decay: float = 1.0) -> dict[str, tuple[float, float]]:
    groups = optim.param_groups(model, 0.05, layer_decay)
    return {name: (g["weight_decay"], g["lr_scale"]) for g in groups for name in g["names"]}


def test_only_matrices_decay_and_every_parameter_is_there_once() -> None:
    assert grouped(Model()) == {
        "embed.weight": (0.05, 1.0),
        "block.weight": (0.05, 1.0),
        "block.bias": (0.0, 1.0),
        "norm.weight": (0.0, 1.0),
        "norm.bias": (0.0, 1.0),
        "temp": (0.0, 1.0),
        "queries": (0.0, 1.0),
    }


def test_layer_decay_reaches_the_rates() -> None:
    model = Model()
    assert grouped(model, 0.5)["embed.weight"] == (0.05, 0.25)
    optimizer = optim.build_optimizer(optim.param_groups(model, 0.05, 0.5), (0.9, 0.98), torch.device("cpu"))
    optim.set_lr(optimizer, 0.2)
    rates = {name: group["lr"] for group in optimizer.param_groups for name in group["names"]}
    assert rates["embed.weight"] == pytest.approx(0.05) and rates["block.weight"] == pytest.approx(0.2)
    assert optimizer.defaults["betas"] == (0.9, 0.98)


def test_a_frozen_model_is_an_error() -> None:
    with pytest.raises(ConfigError, match="nothing to train"):
        optim.param_groups(Model().requires_grad_(False), 0.05)


def stepped(steps: int, model: Model) -> torch.optim.AdamW:
    optimizer = optim.build_optimizer(optim.param_groups(model, 0.05), (0.9, 0.98), torch.device("cpu"))
    advance(model, optimizer, steps)
    return optimizer


def advance(model: Model, optimizer: torch.optim.AdamW, steps: int) -> None:
    for step in range(steps):
        optim.set_lr(optimizer, 0.01 * (step + 1))
        model.tied(model.norm(model.block(model.embed.weight))).square().sum().backward()  # not temp, queries
        optimizer.step()
        optimizer.zero_grad()


def test_state_round_trip_goes_on_bit_for_bit() -> None:
    torch.manual_seed(0)
    model, other = Model(), Model()
    optimizer = stepped(3, model)
    saved = {name: tensor.clone() for name, tensor in optim.optimizer_tensors(optimizer).items()}
    assert "embed.weight|exp_avg" in saved and not any(name.startswith("queries") for name in saved)
    other.load_state_dict(model.state_dict())
    loaded = stepped(0, other)
    optim.load_optimizer_tensors(loaded, saved)
    advance(model, optimizer, 2)
    advance(other, loaded, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_state_of_another_model_is_refused() -> None:
    optimizer = stepped(1, Model())
    with pytest.raises(CheckpointError, match=r"doesn't train: other\.weight"):
        optim.load_optimizer_tensors(optimizer, {"other.weight|exp_avg": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"'block\.weight' has another shape"):
        optim.load_optimizer_tensors(optimizer, {"block.weight|exp_avg": torch.ones(2)})
