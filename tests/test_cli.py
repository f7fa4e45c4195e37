"""The command line as a user meets it: real processes, exit codes, one line for a mistake."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import warm_python

REPOSITORY = Path(__file__).resolve().parent.parent
STAGE1 = "projects/blip2/pretrain_stage1.yaml"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    return warm_python.run(arguments, cwd=REPOSITORY, env=env)


def test_import_is_cheap_and_loads_no_heavy_library() -> None:
    heavy = ["torch", "timm", "transformers", "webdataset", "pyarrow", "matplotlib"]
    code = f"import sys, lavis_lite; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["--options", "run.max_stesp=3"], 2, "unknown key 'run.max_stesp'; did you mean 'max_steps'"),
        (["--options", "model.vision_encoder.name=eva"], 2, "unknown vision encoder 'eva'"),
        (["--options", "run.output_dir=7"], 2, "run.output_dir: expected str, got 7 (int)"),
    ],
)
def test_a_usage_error_is_one_line_and_exit_code_2(
    arguments: list[str], exit_code: int, message: str
) -> None:
    done = run("train.py", "--cfg-path", STAGE1, *arguments)
    assert done.returncode == exit_code, done.stderr
    assert message in done.stderr and done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_debug_shows_the_traceback() -> None:
    done = run("train.py", "--cfg-path", STAGE1, "--debug", "--options", "run.max_stesp=3")
    assert done.returncode != 0 and "Traceback" in done.stderr


def test_missing_data_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    missing = tmp_path / "captions.json"
    done = run(
        *("train.py", "--cfg-path", "projects/blip2/own_images.yaml", "--options"),
        f"datasets.custom.train.annotations={missing}",
        f"datasets.custom.train.images={tmp_path}",
        f"run.output_dir={tmp_path / 'run'}",
    )
    assert done.returncode == 1, done.stderr
    assert str(missing) in done.stderr and "datasets.custom.train.annotations" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_print_config_prints_a_config_that_loads(tmp_path: Path) -> None:
    done = run("train.py", "--cfg-path", STAGE1, "--print-config", "--options", "run.seed=7")
    assert done.returncode == 0, done.stderr
    (tmp_path / "printed.yaml").write_text(done.stdout)
    again = run("train.py", "--cfg-path", str(tmp_path / "printed.yaml"), "--print-config")
    assert again.stdout == done.stdout and "seed: 7" in done.stdout


def test_names_lists_what_the_registry_holds() -> None:
    done = run("-m", "lavis_lite.cli", "names", "vision_encoder")
    assert done.returncode == 0, done.stderr
    assert "clip_L" in done.stdout and "eva_clip_g" in done.stdout and "timm" in done.stdout
