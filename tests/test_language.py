"""Language-model adapters against transformers' own losses and generation, with tiny random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from generative_helpers import FAMILIES, tiny_generative_config
from stage1_helpers import enlarge_weights
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPTJConfig, LlamaConfig, OPTConfig

from lavis_lite.common.errors import CheckpointError, ConfigError, InputError, MissingDependencyError
from lavis_lite.models.blip2_generative import build_language_model
from lavis_lite.models.decoding import Decoded, DecodingRules, Search, decode
from lavis_lite.models.language.adapter import LanguageModel
from lavis_lite.models.language.decoder_only import check_positions

PROMPTS = ["a photo of", "question: what color is the star? answer:", "the", ""]
TARGETS = ["a red circle and a blue star", "yes", "two", "a small green ring in the center"]
QUERIES = 3


@pytest.fixture(params=FAMILIES)
def lm(request: pytest.FixtureRequest, tmp_path: Path) -> LanguageModel:
    torch.manual_seed(0)
    section = tiny_generative_config(tmp_path / "tokenizer", request.param)["language_model"]
    model = build_language_model(section)
    enlarge_weights(model, std=0.3)
    return model


def visual_of(lm: LanguageModel, batch: int = len(PROMPTS)) -> Tensor:
    return torch.randn(batch, QUERIES, lm.width, generator=torch.Generator().manual_seed(5))


def is_t5(lm: LanguageModel) -> bool:
    return hasattr(lm.model, "encoder")


def with_text(lm: LanguageModel, visual: Tensor, ids: list[int]) -> Tensor:
    """[1, Q + T, D] for one row."""
    return torch.cat([visual[None], lm.embed(torch.tensor([ids]))], 1)


def reference_losses(lm: LanguageModel, visual: Tensor, prompt: str, target: str) -> Tensor:
    """One row at a time, all logits, transformers' own shift of the labels where it has one."""
    tokenizer = lm.tokenizer
    if is_t5(lm):
        inputs = with_text(lm, visual, tokenizer(prompt)["input_ids"])
        labels = torch.tensor([tokenizer(target)["input_ids"]])
        loss = lm.model(inputs_embeds=inputs, labels=labels).loss
        return loss * labels.numel()
    begin = tokenizer(prompt)["input_ids"] if prompt else []
    whole = tokenizer(f"{prompt} {target}".strip())["input_ids"] + [lm.end_id]
    labels = torch.tensor([[-100] * (QUERIES + len(begin)) + whole[len(begin) :]])
    loss = lm.model(inputs_embeds=with_text(lm, visual, whole), labels=labels).loss
    return loss * (len(whole) - len(begin))


def test_losses_are_those_of_each_row_alone(lm: LanguageModel) -> None:
    visual = visual_of(lm)
    losses = lm.answer_losses(visual, PROMPTS, TARGETS, max_length=32)
    expected = sum(reference_losses(lm, *row) for row in zip(visual, PROMPTS, TARGETS, strict=True))
    torch.testing.assert_close(losses.sum(), expected, atol=1e-4, rtol=1e-5)


def test_gradients_reach_the_visual_prompt_and_nothing_else(lm: LanguageModel) -> None:
    visual = visual_of(lm).requires_grad_()
    lm.answer_losses(visual, PROMPTS, TARGETS, max_length=32).mean().backward()
    assert visual.grad is not None and visual.grad.abs().amax() > 0
    assert all(parameter.grad is None for parameter in lm.parameters())


def hf_generate(lm: LanguageModel, visual: Tensor, prompt: str, **settings: Any) -> list[int]:
    """New tokens of one row by transformers' `generate`."""
    ids = lm.tokenizer(prompt)["input_ids"]
    inputs = with_text(lm, visual, ids)
    said = lm.model.generate(
        inputs_embeds=inputs,
        attention_mask=torch.ones(inputs.shape[:2], dtype=torch.long),
        do_sample=False,
        eos_token_id=lm.end_id,
        pad_token_id=lm.end_id,
        max_new_tokens=12,
        **settings,
    )[0].tolist()
    return said[1:] if is_t5(lm) else said


def ours(lm: LanguageModel, visual: Tensor, prompts: list[str], beams: int, **rules: Any) -> Decoded:
    decoder = lm.decoder(visual, prompts, rows_per_input=beams)
    limits = DecodingRules(end_id=lm.end_id, max_length=12, **rules)
    start = torch.zeros(len(visual), dtype=torch.long)
    with torch.no_grad():
        return decode(decoder, start, limits, Search(beams, 1))


@pytest.mark.parametrize("beams", [1, 5])
@pytest.mark.parametrize("length_penalty", [1.0, -1.0])
def test_generation_is_transformers_token_for_token(
    lm: LanguageModel, beams: int, length_penalty: float
) -> None:
    """Batched with prompts of different lengths, against one at a time."""
    visual = visual_of(lm)
    batch = ours(lm, visual, PROMPTS, beams, length_penalty=length_penalty).ids[:, 0].tolist()
    for row, own, prompt in zip(batch, visual, PROMPTS, strict=True):
        settings = {"length_penalty": length_penalty} if beams > 1 else {}
        expected = hf_generate(lm, own, prompt, num_beams=beams, **settings)
        expected += [lm.end_id] * (len(row) - len(expected))
        row += [lm.end_id] * (len(expected) - len(row))
        assert row == expected


def test_texts_that_end_early_are_the_same_too(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    visual = visual_of(lm)
    said = ours(lm, visual, PROMPTS, 1).ids[:, 0]
    monkeypatch.setattr(type(lm), "end_id", int(said[1, 3]))  # a token that does come up
    batch = ours(lm, visual, PROMPTS, 5).ids[:, 0].tolist()
    early = 0
    for row, own, prompt in zip(batch, visual, PROMPTS, strict=True):
        expected = hf_generate(lm, own, prompt, num_beams=5)
        early += lm.end_id in expected
        length = max(len(row), len(expected))
        padded = [[*ids, *[lm.end_id] * (length - len(ids))] for ids in (row, expected)]
        assert padded[0] == padded[1]
    assert early > 0


def test_frozen_whatever_the_mode(lm: LanguageModel) -> None:
    lm.train()
    assert not any(module.training for module in lm.model.modules())
    assert not any(parameter.requires_grad for parameter in lm.parameters())


def test_the_end_is_never_cut_off(lm: LanguageModel) -> None:
    visual = visual_of(lm, 1)
    long = " ".join(["a red circle,"] * 20)
    losses = lm.answer_losses(visual, ["a photo of"], [long], max_length=7)
    assert losses.numel() == 7
    assert lm.pretraining_losses(visual, [long], max_length=7).numel() <= 7


def test_prefixes_end_between_the_first_token_and_the_middle(tmp_path: Path) -> None:
    lm = build_language_model(tiny_generative_config(tmp_path / "t", "t5")["language_model"])
    text = "a red circle and a blue star in the center"  # ten tokens, so 6 to 10 are scored, and the end
    torch.manual_seed(0)
    sizes = {lm.pretraining_losses(visual_of(lm, 1), [text], max_length=32).numel() for _ in range(60)}
    assert sizes == {6, 7, 8, 9, 10}
    assert lm.pretraining_losses(visual_of(lm, 1), ["red"], max_length=32).numel() == 2


def test_mistakes_are_one_clear_line(tmp_path: Path) -> None:
    section = tiny_generative_config(tmp_path / "t", "t5")["language_model"]
    with pytest.raises(ConfigError, match="overflows in fp16; use bf16"):
        build_language_model({**section, "precision": "fp16"})
    with pytest.raises(ConfigError, match=r"language_model\.precison.*did you mean 'precision'"):
        build_language_model({**section, "precison": "fp32"})
    with pytest.raises(ConfigError, match="model_type is missing"):
        build_language_model({**section, "config": {"d_model": 3}})
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ConfigError, match=r"unknown model .*empty"):
        build_language_model({"name": "t5", "model_name": str(empty)})
    with pytest.raises(CheckpointError, match="no weights for"):
        build_language_model({**section, "pretrained": True}).load_pretrained()
    with pytest.raises(ConfigError, match="no tokenizer for"):
        _ = build_language_model({**section, "model_name": str(empty)}).tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tokenizer_without_words_is_none(tmp_path: Path, family: str) -> None:
    """transformers makes one of a model's folder without its files, of special tokens alone."""
    section = tiny_generative_config(tmp_path / "llm", family)["language_model"]
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text(json.dumps(section["config"]))
    with pytest.raises(ConfigError, match="no tokenizer for"):
        _ = build_language_model({**section, "model_name": str(bare)}).tokenizer


def test_pretrained_weights_are_loaded_from_a_folder(tmp_path: Path) -> None:
    section = tiny_generative_config(tmp_path / "llm", "opt")["language_model"]
    torch.manual_seed(1)
    donor = build_language_model(section)
    donor.model.save_pretrained(section["model_name"])
    loaded = build_language_model({**section, "config": None, "pretrained": True})
    assert next(loaded.parameters()).is_meta
    loaded.load_pretrained()
    for name, tensor in donor.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    low = build_language_model({**section, "config": None, "pretrained": True, "precision": "bf16"})
    low.load_pretrained()
    assert (
        low.dtype == torch.bfloat16
        and low.answer_losses(visual_of(low), PROMPTS, TARGETS, max_length=9).isfinite().all()
    )


def test_lora_is_all_that_is_trained(tmp_path: Path) -> None:
    section = tiny_generative_config(tmp_path / "t", "opt")["language_model"]
    try:
        import peft  # noqa: F401
    except ImportError:
        with pytest.raises(MissingDependencyError, match=r"lavis-lite\[lora\]"):
            build_language_model({**section, "lora": {}})
        return
    lm = build_language_model({**section, "lora": {"rank": 2}}).train()
    trained = [name for name, parameter in lm.named_parameters() if parameter.requires_grad]
    assert trained and all("lora" in name for name in trained)
    lm.answer_losses(visual_of(lm), PROMPTS, TARGETS, max_length=9).mean().backward()


@pytest.mark.parametrize(("kind", "ends"), [("opt", True), ("gpt2", True), ("gptj", True), ("llama", False)])
def test_only_tables_of_positions_end(kind: str, ends: bool) -> None:
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 40}
    config = {
        "opt": lambda: OPTConfig(**sizes, ffn_dim=16, word_embed_proj_dim=16, max_position_embeddings=40),
        "gpt2": lambda: GPT2Config(**sizes, n_positions=40),
        "gptj": lambda: GPTJConfig(**sizes, n_positions=40, rotary_dim=4),
        "llama": lambda: LlamaConfig(**sizes, intermediate_size=16, max_position_embeddings=40),
    }[kind]()
    model = AutoModelForCausalLM.from_config(config)
    check_positions(model, 40)
    if ends:
        with pytest.raises(InputError, match="take 41 places and the language model has 40: shorten"):
            check_positions(model, 41)
    else:
        check_positions(model, 41)


def test_room_for_new_tokens_is_checked_before_the_first_is_computed(lm: LanguageModel) -> None:
    visual = visual_of(lm, 1)
    places = QUERIES + len(lm.tokenizer("a")["input_ids"])
    limit = 96
    lm.decoder(visual, ["a"], rows_per_input=1, new_tokens=limit - places + 1)
    if lm.model.config.model_type != "opt":  # relative and rotary positions go on
        lm.decoder(visual, ["a"], rows_per_input=1, new_tokens=200)
        return
    with pytest.raises(
        InputError, match=r"take 97 places and the language model has 96: .* fewer new tokens"
    ):
        lm.decoder(visual, ["a"], rows_per_input=1, new_tokens=limit - places + 2)
