"""The captioning task with the models that people caption with: one call fits stage 1 and both kinds of stage 2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from generative_helpers import tiny_generative_config
from stage1_helpers import tiny_config, write_tokenizer

from lavis_lite.datasets.builders import build_dataset_from_preset
from lavis_lite.models.blip2_generative import Blip2Generative
from lavis_lite.models.blip2_qformer import Blip2QFormer
from lavis_lite.tasks.base import EvalArgs
from lavis_lite.worlds.shapes.caption_task import ShapesCaptioningTask


@pytest.mark.parametrize("family", ["stage1", "opt", "t5"])
def test_a_real_model_is_evaluated(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAVIS_LITE_CACHE", str(tmp_path / "cache"))
    if family == "stage1":
        model: Any = Blip2QFormer.from_config(tiny_config(write_tokenizer(tmp_path / "words")))
    else:
        model = Blip2Generative.from_config(tiny_generative_config(tmp_path / "llm", family))
    processor = {"eval": {"name": "shapes_image_eval", "image_size": 16}}
    sizes = {"train": 2, "val": 10, "test": 1, "image_size": 16, "vis_processor": processor}
    data: Any = build_dataset_from_preset("shapes_caption", sizes)["val"]
    task = ShapesCaptioningTask(
        metrics=["cider"], num_beams=2, max_new_tokens=6, min_length=2, loss_batch_size=4, loss_batches=1
    )
    arguments = EvalArgs(batch_size=4, folder=tmp_path, label="val")
    evaluation = task.evaluate(model, data, loader_args=arguments)
    written = json.loads((tmp_path / "predictions_val.json").read_text())
    assert len(written) == 10 and all(
        not item["caption"].startswith("a photo of a photo") for item in written
    )
    assert {"loss", "cider", "objects_right", "num_images"} <= set(evaluation.metrics)
