"""Every code block of the README is run, in order, in a copy of the checkout's layout, at a small size."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

REPOSITORY = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(
    r"^```(\w+)\n(.*?)^```", (REPOSITORY / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL
)

# What makes a block small or offline; laid over the block's own options, never over what it shows.
SMALL = (
    "run.max_steps=2 run.max_epochs=null run.batch_size_train=4 run.batch_size_eval=8 run.num_workers=0 "
    "run.warmup_steps=1"
)
SMALL_WORLD = (
    f"{SMALL} datasets.shapes_caption.train=32 datasets.shapes_caption.val=8 datasets.shapes_caption.test=8"
)
OFFLINE = (
    "model.vision_encoder.pretrained=false model.vision_encoder.model_name=vit_tiny_patch16_224 "
    "model.qformer.pretrained=null model.qformer.num_layers=2 model.qformer.hidden_size=32 "
    "model.qformer.num_heads=2 model.qformer.intermediate_size=64 "
    "model.tokenizer=shapes"
)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files a user has beside them, and the ones the README says they have."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("train.py", "evaluate.py", "pyproject.toml", "setup.py"):
        shutil.copy(REPOSITORY / name, folder / name)
    for name in ("projects", "run_scripts", "lavis_lite"):
        (folder / name).symlink_to(REPOSITORY / name)
    photos = folder / "photos"
    photos.mkdir()
    rows = []
    for index in range(8):
        Image.new("RGB", (40 + index, 32), (30 * index, 90, 200)).save(photos / f"{index}.jpg")
        rows.append(json.dumps({"image": f"{index}.jpg", "caption": f"a photo of number {index}"}))
    (folder / "captions.jsonl").write_text("\n".join(rows))
    Image.new("RGB", (64, 64), (200, 30, 30)).save(folder / "scene.png")
    return folder


def run(command: list[str], folder: Path, cache: Path) -> None:
    environment = {
        **os.environ,
        "LAVIS_LITE_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(folder),
    }
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def prepared(block: str) -> str:
    """The block's shell command at a small size."""
    command = block.replace("\\\n", " ").strip()
    if "quickstart.sh" in command:
        # The script's own work is the environment this test runs in; its command is run as it stands there.
        script = (REPOSITORY / "run_scripts/quickstart.sh").read_text().splitlines()[-1]
        return script.replace("exec .venv/bin/python", "python").replace('"$@"', f"--options {SMALL_WORLD}")
    if "test.sh" in command:
        return "bash -n run_scripts/test.sh"
    if "own_images" in command:
        return f"{command} {SMALL} {OFFLINE}"
    return f"{command} --options {SMALL_WORLD}"


@pytest.mark.slow
def test_every_block_of_the_readme_runs(checkout: Path, tmp_path: Path) -> None:
    languages = []
    for language, block in BLOCKS:
        languages.append(language)
        if language == "bash":
            run(["bash", "-ec", prepared(block)], checkout, tmp_path)
        elif language == "python" and "register_vision_encoder" in block:
            (checkout / "my_encoder.py").write_text(block)
        elif language == "python":
            run([sys.executable, "-c", block], checkout, tmp_path)
        else:
            assert language == "yaml"
            (checkout / "mine.yaml").write_text(block)
    assert sorted(languages) == ["bash"] * 5 + ["python"] * 3 + ["yaml"]
    assert (checkout / "output/pretrain_stage1/report.html").is_file()
    assert (checkout / "output/pretrain_stage2/report.html").is_file()
    assert (checkout / "output/own_images/log.jsonl").is_file()
    assert "mine" in (checkout / "output/mine/config.yaml").read_text()


def test_every_relative_link_leads_somewhere() -> None:
    documents = [
        REPOSITORY / "README.md",
        REPOSITORY / "CONTRIBUTING.md",
        *(REPOSITORY / "docs").glob("*.md"),
    ]
    broken = []
    for document in documents:
        prose = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", prose):
            if not (document.parent / target).exists():
                broken.append(f"{document.name}: {target}")
    assert len(documents) >= 4 and not broken
