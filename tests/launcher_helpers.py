"""A checkout of launchers for tests: with stubs, or with this Python and the real train.py."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from runner_helpers import FAKES, ROOT

# GPUS answers the launcher's question, which would import torch.
PYTHON = """#!/bin/sh
if [ "$1" = -c ] && [ -n "$GPUS" ]; then echo "$GPUS"; else exec "{}" "$@"; fi
"""
SHORT_ROLL_CALLS = f"imports=[{FAKES},{FAKES.with_name('short_roll_calls.py')}]"
LAUNCHERS = ("launch_node.sh", "launch_nodes.sh", "slurm.sh")


def write_script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def launchers(folder: Path) -> Path:
    """The launchers in `folder`, which is as if installed."""
    (folder / "run_scripts").mkdir(parents=True)
    for name in LAUNCHERS:
        shutil.copy(ROOT / "run_scripts" / name, folder / "run_scripts" / name)
    write_script(folder / "run_scripts" / "environment.sh", f'repository="{folder}"\n')
    return folder


def real_launchers(folder: Path) -> Path:
    """The launchers in `folder` with this Python, unless GPUS answers for it, and the real train.py."""
    launchers(folder)
    write_script(folder / ".venv" / "bin" / "python", PYTHON.format(sys.executable))
    (folder / "train.py").symlink_to(ROOT / "train.py")
    return folder
