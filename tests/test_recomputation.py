"""grad_checkpointing of a language model: its blocks run twice a step, keep less, and no number is another."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from generative_helpers import FAMILIES, tiny_generative_config
from stage1_helpers import enlarge_weights
from torch import Tensor, nn

from lavis_lite.common.errors import ConfigError
from lavis_lite.models.blip2_generative import build_language_model
from lavis_lite.models.blocks import RecomputedForward, recompute_blocks, transformer_blocks
from lavis_lite.models.language.adapter import LanguageModel

PROMPTS = ["a photo of", "question: what color is the star? answer:"]
TARGETS = ["a red circle and a blue star", "yes"]


class Calls:
    """Counts the forward passes of the first linear layer of every block."""

    def __init__(self, lm: LanguageModel) -> None:
        self.count = 0
        self.blocks = transformer_blocks(lm.model)
        for block in self.blocks:
            first = next(module for module in block.modules() if isinstance(module, nn.Linear))
            first.register_forward_hook(self)

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.count += 1

    def since(self, before: int = 0) -> float:
        """Passes a block."""
        return (self.count - before) / len(self.blocks)


def build(folder: Path, family: str, *, recompute: bool, **changes: Any) -> LanguageModel:
    torch.manual_seed(0)
    more = {"grad_checkpointing": recompute, **changes}
    section = tiny_generative_config(folder / "tokenizer", family, language_model=more)["language_model"]
    lm = build_language_model(section)
    enlarge_weights(lm, std=0.3)
    return lm.train()


def visual_of(lm: LanguageModel) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(len(PROMPTS), 3, lm.width, generator=generator).requires_grad_()


def step(lm: LanguageModel) -> tuple[Tensor, Tensor, int]:
    """Losses, the gradient of the visual prompt, and the bytes of activations that the forward pass keeps."""
    visual, kept = visual_of(lm), {}
    own = {p.untyped_storage().data_ptr() for p in lm.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = lm.answer_losses(visual, PROMPTS, TARGETS, max_length=32)
    losses.mean().backward()
    assert visual.grad is not None
    return losses.detach(), visual.grad, sum(kept.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_run_again_in_the_backward_pass_and_keep_less(family: str, tmp_path: Path) -> None:
    plain = build(tmp_path, family, recompute=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # transformers' own way is deprecated
        recomputing = build(tmp_path, family, recompute=True)
    plain_calls, calls = Calls(plain), Calls(recomputing)
    losses, gradient, kept = step(plain)
    again_losses, again_gradient, kept_less = step(recomputing)
    assert (plain_calls.since(), calls.since()) == (1, 2)
    assert kept_less < 0.4 * kept, (kept_less, kept)
    torch.testing.assert_close(again_losses, losses)
    torch.testing.assert_close(again_gradient, gradient)
    assert not any(module.training for module in recomputing.model.modules())
    assert list(recomputing.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_recomputed_outside_of_training(family: str, tmp_path: Path) -> None:
    lm = build(tmp_path, family, recompute=True)
    calls = Calls(lm)
    step(lm.eval())
    assert calls.since() == 1
    before = calls.count
    with torch.no_grad():
        lm.train().answer_losses(visual_of(lm), PROMPTS, TARGETS, max_length=32)
    assert calls.since(before) == 1


def test_models_that_recompute_are_copied_and_pickled(tmp_path: Path) -> None:
    """A copy runs its own blocks, and follows its own mode."""
    lm = build(tmp_path, "opt", recompute=True)
    losses, gradient, _ = step(lm)
    for other in (copy.deepcopy(lm), pickle.loads(pickle.dumps(lm))):
        lm.zero_grad()
        lm.eval()
        calls = Calls(other)
        found = step(other)
        assert calls.since() == 2
        assert torch.equal(found[0], losses) and torch.equal(found[1], gradient)
        other.eval()
        before = calls.count
        step(other)
        assert calls.since(before) == 1
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        assert torch.equal(step(lm)[0], losses)


def test_loaded_weights_recompute_too(tmp_path: Path) -> None:
    donor = build(tmp_path, "opt", recompute=False)
    donor.model.save_pretrained(donor.config.model_name)
    lm = build(tmp_path, "opt", recompute=True, config=None, pretrained=True)
    lm.load_pretrained()
    calls = Calls(lm)
    step(lm.train())
    assert calls.since() == 2


def test_blocks_recompute_once_however_often_they_are_told_to(tmp_path: Path) -> None:
    lm = build(tmp_path, "t5", recompute=True)
    assert recompute_blocks(lm) == 4
    assert not any(isinstance(block.forward.forward, RecomputedForward) for block in transformer_blocks(lm))
    calls = Calls(lm)
    step(lm)
    assert calls.since() == 2


def test_a_model_without_blocks_is_one_line(tmp_path: Path) -> None:
    config = tiny_generative_config(tmp_path, "opt")["language_model"]["config"]
    with pytest.raises(ConfigError, match=r"grad_checkpointing: this model has no blocks to recompute"):
        build(tmp_path, "opt", recompute=True, config={**config, "num_hidden_layers": 1})
