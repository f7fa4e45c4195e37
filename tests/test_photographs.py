"""The main job on real photographs, some of them damaged: by options alone, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import warm_python
from data_helpers import COCO_MINI, needs_coco_mini
from generative_helpers import write_llm_tokenizer
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
    return warm_python.run(
        arguments,
        cwd=REPOSITORY,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "LAVIS_LITE_CACHE": str(cache)},
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


CAPTION_RUN = """
model:
  arch: blip2_opt
  prompt: a photo of
  vision_encoder: {{name: timm, model_name: vit_tiny_patch16_224, image_size: 224, freeze: false}}
  qformer: {{num_layers: 2, hidden_size: 64, num_heads: 2, intermediate_size: 128, num_query_token: 8}}
  language_model: {{name: opt, model_name: "{tokenizer}", end_of_text: "\\n", config: {{
    model_type: opt, vocab_size: 300, hidden_size: 32, word_embed_proj_dim: 32, ffn_dim: 64,
    num_hidden_layers: 2, num_attention_heads: 2, max_position_embeddings: 128}}}}
datasets:
  custom:
    train: {{annotations: "{annotations}", images: "{folder}"}}
    val: {{annotations: "{annotations}", images: "{folder}"}}
task: {{name: captioning, num_beams: 2, max_new_tokens: 6, min_length: 1, loss_batches: 1, loss_batch_size: 8}}
run:
  max_steps: 3
  batch_size_train: 8
  batch_size_eval: 8
  num_workers: 0
  warmup_steps: 1
  max_bad_fraction: 0.2
  lr_layer_decay: 0.9
  output_dir: "{run}"
"""


@needs_coco_mini
@pytest.mark.slow
def test_photographs_retrieval_fine_tuning_search_and_explanation(
    damaged: tuple[Path, Path], tmp_path: Path
) -> None:
    """All of it with the run's folder as the name of a model that no preset describes."""
    annotations, folder = damaged
    command, cache = ("-m", "lavis_lite.cli"), tmp_path / "cache"
    shaped = (
        *("tokenizer", "--vocab-size", "400", "--captions", str(annotations)),
        *("--out", str(tmp_path / "tokenizer")),
    )
    assert run(*command, *shaped, cache=cache).returncode == 0
    model = tmp_path / "run"
    options = (
        *("model.vision_encoder.freeze=false", "run.lr_layer_decay=0.9", "task.name=retrieval"),
        *(f"model.tokenizer={tmp_path / 'tokenizer'}", f"run.output_dir={model}"),
        *(f"datasets.custom.{split}.annotations={annotations}" for split in ("train", "val", "test")),
        *(f"datasets.custom.{split}.images={folder}" for split in ("train", "val", "test")),
        "datasets.custom.train.split_captions=true",
    )
    project = ("--cfg-path", "projects/blip2/own_images.yaml", "--options", *SMALL_MODEL, *SHORT_RUN)
    done = run("train.py", *project, *options, cache=cache)
    assert done.returncode == 0, done.stderr
    done = run("evaluate.py", *project, *options, cache=cache)
    assert done.returncode == 0 and "re-ranked" in done.stdout, done.stderr
    metrics = json.loads((model / "evaluation/metrics.json").read_text())["metrics"]
    assert metrics["test/num_images"] == 10 and 0 <= metrics["test/rerank/tr_r1"] <= 1
    index, sheet, page = tmp_path / "index", tmp_path / "sheet.html", tmp_path / "page.html"
    build = ("index", "build", "--images", str(folder), "--out", str(index), "--model", str(model))
    done = run(*command, *build, "--num-workers", "0", cache=cache)
    assert done.returncode == 0, done.stderr
    search = ("index", "search", str(index), "--text", "a man on a horse", "--top", "3", "--rerank")
    done = run(*command, *search, "--html", str(sheet), cache=cache)
    assert done.returncode == 0, done.stderr
    assert sheet.read_text().count("data:image/") == 3
    picture = sorted(folder.iterdir())[4]
    explain = (
        "explain",
        "--model",
        str(model),
        "--image",
        str(picture),
        "--text",
        "a horse",
        "--out",
        str(page),
    )
    done = run(*command, *explain, cache=cache)
    assert done.returncode == 0 and "data:image/" in page.read_text(), done.stderr


@needs_coco_mini
@pytest.mark.slow
def test_photographs_caption_fine_tuning(damaged: tuple[Path, Path], tmp_path: Path) -> None:
    annotations, folder = damaged
    write_llm_tokenizer(tmp_path / "llm", "opt")
    project = tmp_path / "captions.yaml"
    project.write_text(
        CAPTION_RUN.format(
            tokenizer=tmp_path / "llm", annotations=annotations, folder=folder, run=tmp_path / "run"
        )
    )
    done = run("train.py", "--cfg-path", str(project), cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    predictions = json.loads((tmp_path / "run/predictions_val.json").read_text())
    assert len(predictions) == 10 and all(isinstance(row["caption"], str) for row in predictions)
    rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    evaluation = next(row for row in rows if row["kind"] == "eval")
    assert {"val/cider", "val/bleu_4", "val/rouge_l"} <= evaluation.keys()
    assert evaluation["val/num_references"] == 50 and evaluation["val/unreadable_images"] == 2
    assert "a photo of" not in predictions[0]["caption"]
    assert "data:image/" in (tmp_path / "run/report.html").read_text()


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
