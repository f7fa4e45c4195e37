"""Lessons for a T5's encoder at the words of questions."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_shapes_language import ROOT, TINY, scenes

from lavis_lite.common.config import load_config
from lavis_lite.worlds.shapes.lm_data import SceneDocumentsBuilder
from lavis_lite.worlds.shapes.lm_documents import TYPE_WEIGHTS, document
from lavis_lite.worlds.shapes.lm_hints import FALSE, TRUE, hints
from lavis_lite.worlds.shapes.lm_pretrain import ShapesLMPretrain
from lavis_lite.worlds.shapes.lm_tokenizers import build_tokenizer
from lavis_lite.worlds.shapes.questions import answer
from lavis_lite.worlds.shapes.scene import CELLS
from lavis_lite.worlds.shapes.words import RELATIONS

pytest.importorskip("transformers")


def test_hints_are_what_the_context_says_of_the_objects_in_questions() -> None:
    tokenizer = build_tokenizer("t5")
    relations = places = 0
    for index, scene in enumerate(scenes(80)):
        text = document(
            scene, random.Random(index), replies=6, contexts={"full": 1.0}, reply_weights={"answer": 1},
            type_weights={**TYPE_WEIGHTS, "relation": 30},
        )  # fmt: skip
        asked = [reply for reply in text.replies if reply.kind == "answer"]
        words = f"{text.context} {' '.join(reply.prompt for reply in asked)}"
        ids = tokenizer(words)["input_ids"]
        read = tokenizer.convert_ids_to_tokens(ids)
        found = hints(read, scene)
        start = read.index("question") if asked else len(read)
        assert not found[:start].any()
        expected = {"yes": TRUE, "no": FALSE}
        told = [
            expected[reply.text]
            for reply in asked
            if any(f" {relation} the " in reply.prompt for relation in RELATIONS)
        ]
        assert [value for value in found.tolist() if value >= FALSE] == told
        relations += len(told)
        for place in ((found > 0) & (found < FALSE)).nonzero()[:, 0].tolist():
            name = f"{read[place - 1]} {read[place]}"
            assert answer(f"where is the {name}?", text.context) == CELLS[found[place] - 1]
            places += 1
    assert relations > 100 and places > 2 * relations


def test_hints_reach_the_encoder_and_padding_does_not_change_them() -> None:
    weights: dict[str, Any] = {"type_weights": {"relation": 30}, "reply_weights": {"answer": 50}}
    dataset = SceneDocumentsBuilder(name="texts", family="t5", **weights).build_datasets()["train"]
    model = ShapesLMPretrain(family="t5", **TINY, hint_weight=2.0).eval()
    rows = [dataset.load(index, seed=index) for index in range(6)]
    together = model(dataset.collate(rows))
    head, losses = model.hint_head, []
    for row in rows:
        batch = dataset.collate([row])
        embedded = {"inputs_embeds": model._embed(batch), "attention_mask": batch["attention_mask"].long()}
        logits = head(model.lm.encoder(**embedded).last_hidden_state[0])
        of = row["hints"]
        losses.append([-logits[at].log_softmax(-1)[of[at]] for at in range(len(of)) if of[at] > 0])
    kinds = [value for row in rows for value in row["hints"].tolist() if value]
    flat = torch.stack([loss for one in losses for loss in one])
    apart = torch.tensor(kinds) >= FALSE
    assert apart.sum() > 4 and (~apart).sum() > 8
    expected = 0.5 * flat[~apart].mean() + flat[apart].mean()
    torch.testing.assert_close(together["loss_hint"], expected)
    plain = ShapesLMPretrain(family="t5", **TINY).eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "hint_head" not in k})
    without = plain(dataset.collate(rows))
    assert "loss_hint" not in without
    torch.testing.assert_close(together["loss"], without["loss"] + 2 * together["loss_hint"])


def test_second_recipe_goes_on_with_the_first_ones_model(tmp_path: Path) -> None:
    first, second = (load_config(ROOT / f"projects/shapes/pretrain_t5{name}.yaml") for name in ("", "_hints"))
    assert second.model["pretrained"] == first.run.output_dir and second.model["hint_weight"] > 0
    torch.manual_seed(0)
    model = ShapesLMPretrain(family="t5", **TINY)
    save_file({k: v.clone() for k, v in model.trainable_state_dict().items()}, tmp_path / "model.safetensors")
    hinted = ShapesLMPretrain(family="t5", **TINY, hint_weight=1.0)
    hinted.load_checkpoint(tmp_path / "model.safetensors")
    assert torch.equal(hinted.lm.state_dict()["shared.weight"], model.lm.state_dict()["shared.weight"])
