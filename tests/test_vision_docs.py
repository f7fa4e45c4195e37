"""docs/encoders.md: its encoder, its YAML and its table of encoders are true."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lavis_lite import registry
from lavis_lite.models.vision.tower import TOWER_KEYS, TowerConfig, validate_vision_config

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "encoders.md").read_text()

USE = """
import torch
from lavis_lite.common.config import load_config
from lavis_lite.models.vision.tower import build_vision_tower

section = load_config("mine.yaml").model["vision_encoder"]
torch.save(build_vision_tower(section).encoder.state_dict(), "mine.pth")
tower = build_vision_tower({**section, "pretrained": "mine.pth"})
tower.load_pretrained()
features = tower.train()(torch.randn(2, 3, 64, 64))
features.sum().backward()
assert all(parameter.grad is not None for parameter in tower.parameters())
scales = [tower.lr_scale(f"encoder.{name}", 0.5) for name in ("positions", "blocks.1.norm1.bias")]
print(tuple(features.shape), *scales)
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def test_the_encoder_of_your_own_runs(tmp_path: Path) -> None:
    [code] = blocks("python")
    project = blocks("yaml")[1].replace("base: ", f"base: {ROOT}/")
    (tmp_path / "my_encoder.py").write_text(code)
    (tmp_path / "mine.yaml").write_text(project)
    (tmp_path / "use.py").write_text(USE)
    # As installed: the package from this repository, the files from the user's folder.
    result = subprocess.run(
        [sys.executable, "use.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.strip() == "(2, 64, 128) 0.125 0.5"


def test_the_first_example_is_valid() -> None:
    import yaml

    validate_vision_config(yaml.safe_load(blocks("yaml")[0])["model"]["vision_encoder"])


def table(heading: str) -> list[list[str]]:
    section = TEXT.split(f"## {heading}")[1].split("\n## ")[0]
    rows = [row.split("|") for row in section.splitlines() if row.startswith("| `")]
    return [[cell.strip() for cell in row[1:-1]] for row in rows if row[1].strip() != "`name`"]


def test_the_table_of_encoders() -> None:
    rows = {row[0].strip("`"): row for row in table("What there is")}
    assert list(rows) == ["eva_clip_g", "clip_L", "timm", "shapes_vit"]
    for name, row in rows.items():
        build = registry.get_vision_encoder_class(name)
        assert re.findall(r"`(\w+)`", row[3]) == list(inspect.signature(build).parameters)


@pytest.mark.parametrize("row", table("Keys of every encoder"), ids=lambda row: row[0])
def test_the_table_of_keys(row: list[str]) -> None:
    key, default = row[0].strip("`"), row[1].strip("`")
    assert str(getattr(TowerConfig(name="x"), key)).lower() == default
    assert {*TOWER_KEYS} == {"name", *(row[0].strip("`") for row in table("Keys of every encoder"))}
