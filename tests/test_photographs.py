"""The main job on real photographs, some of them damaged: by options alone, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from data_helpers import COCO_MINI, needs_coco_mini
from PIL import Image

REPOSITORY = Path(__file__).resolve().parent.parent
SMALL_MODEL = (
    "model.vision_encoder.pretrained=false",
    "model.vision_encoder.model_name=vit_tiny_patch16_224",
    "model.qformer.pretrained=null",
    "model.qformer.num_layers=2",
    "model.qformer.hidden_size=64",
    "model.qformer.num_heads=2",
    "model.qformer.intermediate_size=128",
)
SHORT_RUN = (
    "run.max_epochs=null",
    "run.max_steps=3",
    "run.batch_size_train=8",
    "run.batch_size_eval=8",
    "run.num_workers=1",
    "run.warmup_steps=1",
    "run.max_bad_fraction=0.2",
    "task.loss_batches=1",
    "task.loss_batch_size=8",
    "task.k_test=4",
)


def run(*arguments: str, cache: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "LAVIS_LITE_CACHE": str(cache)},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture
def damaged(tmp_path: Path) -> tuple[Path, Path]:
    """Twelve photographs and their captions: one truncated, one grey, one CMYK, one missing."""
    content = json.loads((COCO_MINI / "annotations/captions_val2017.json").read_text())
    content["images"] = content["images"][:12]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [row for row in content["annotations"] if row["image_id"] in kept]
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, image in enumerate(content["images"]):
        original, target = COCO_MINI / "val2017" / image["file_name"], folder / image["file_name"]
        if number == 0:
            target.write_bytes(original.read_bytes()[:9000])
        elif number in (1, 2):
            Image.open(original).convert("L" if number == 1 else "CMYK").save(target)
        elif number != 3:
            target.write_bytes(original.read_bytes())
    annotations = tmp_path / "captions.json"
    annotations.write_text(json.dumps(content))
    return annotations, folder


@needs_coco_mini
@pytest.mark.slow
def test_photographs_train_evaluate_and_report(damaged: tuple[Path, Path], tmp_path: Path) -> None:
    annotations, folder = damaged
    cache = tmp_path / "cache"
    learned = run(
        *("-m", "lavis_lite.cli", "tokenizer", "--vocab-size", "400"),
        *("--captions", str(annotations), "--out", str(tmp_path / "tokenizer")),
        cache=cache,
    )
    assert learned.returncode == 0, learned.stderr
    done = run(
        *("train.py", "--cfg-path", "projects/blip2/own_images.yaml", "--options", *SMALL_MODEL, *SHORT_RUN),
        f"model.tokenizer={tmp_path / 'tokenizer'}",
        *(f"datasets.custom.{split}.annotations={annotations}" for split in ("train", "val")),
        *(f"datasets.custom.{split}.images={folder}" for split in ("train", "val")),
        f"run.output_dir={tmp_path / 'run'}",
        cache=cache,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    evaluation = next(row for row in rows if row["kind"] == "eval")
    assert evaluation["val/num_images"] == 10 and evaluation["val/unreadable_images"] == 2
    assert rows[-2]["bad_images"] > 0 or any(row.get("bad_images", 0) > 0 for row in rows)
    broken = sorted(path.name for path in folder.iterdir())[0]
    assert len(broken) == 16 and done.stderr.count("can't be read") + done.stderr.count("unreadable") >= 1
    report = (tmp_path / "run/report.html").read_text()
    assert "data:image/" in report and "http://" not in report.replace("http://www.w3.org", "")


def test_a_caption_file_that_is_not_utf8_is_one_line(tmp_path: Path) -> None:
    annotations = tmp_path / "captions.csv"
    annotations.write_bytes("image,caption\na.jpg,a caf\xe9\n".encode("latin-1"))
    done = run(
        *("train.py", "--cfg-path", "projects/blip2/own_images.yaml", "--options"),
        f"datasets.custom.train.annotations={annotations}",
        f"datasets.custom.train.images={tmp_path}",
        f"run.output_dir={tmp_path / 'run'}",
        cache=tmp_path / "cache",
    )
    assert done.returncode == 1 and str(annotations) in done.stderr and "UTF-8" in done.stderr
    assert "Traceback" not in done.stderr
