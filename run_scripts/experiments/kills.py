"""Stage 1 on several processes that are killed again and again, against the same run left alone.

    python run_scripts/experiments/kills.py --kills 20 --options run.strategy=fsdp2 run.save_async=true

A process drawn at random gets SIGKILL, every third time while a checkpoint is being written, else at a random
moment after the run has made one; torchrun starts all of them again, and they go on from the newest checkpoint. In
the end every tensor of the last checkpoint must be that of the undisturbed run, bit for bit: else the command
fails. `--out` gets kills.json: where each process was hit, how long the run took to go on, the command, the commit
and the machine. Needs /proc.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from seeds import REPOSITORY, surroundings

from lavis_lite.common.checkpoint import FOLDER, list_checkpoints, load_tensors, open_optimizer, weights_file

CONFIG = str(REPOSITORY / "projects/blip2/pretrain_stage1.yaml")
# A small run that saves often: what is tested lies between its steps.
SMALL = ["run.max_steps=200", "run.save_every=2", "run.batch_size_train=16", "datasets.shapes_caption.val=50"]
SMALL += ["run.num_threads=1", "run.log_every=1"]
PATIENCE = 300.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, default=Path("output/kills"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    calm, disturbed = args.out / "calm", args.out / "disturbed"
    if not list_checkpoints(calm / FOLDER):
        wait_well(launch(calm, args))
    shutil.rmtree(disturbed, ignore_errors=True)
    hits = disturb(launch(disturbed, args), disturbed, args)
    different = compare(calm, disturbed)
    away = [hit["seconds_until_next_checkpoint"] for hit in hits]
    facts = {"command": " ".join(sys.argv), **surroundings(), "hits": hits, "different_tensors": different}
    (args.out / "kills.json").write_text(json.dumps(facts, indent=1) + "\n")
    writing = sum(hit["while_writing"] for hit in hits)
    print(f"{len(hits)} kills, {writing} of them while a checkpoint was written; until the next checkpoint")
    print(
        f"{statistics.median(away):.1f} s (at most {max(away):.1f} s); tensors that differ: {len(different)}"
    )
    if different:
        raise SystemExit(f"not the undisturbed run's: {', '.join(different[:5])}")


def launch(folder: Path, args: argparse.Namespace) -> subprocess.Popen[bytes]:
    """torchrun, which starts the processes again after each kill; what it says goes to a file beside the run."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={args.processes}", f"--max-restarts={args.kills}"]
    command += ["train.py", "--cfg-path", CONFIG, "--options", *SMALL, *args.options]
    with folder.with_suffix(".log").open("wb") as said:
        return subprocess.Popen(
            [*command, f"run.output_dir={folder.resolve()}"], stdout=said, stderr=said, cwd=REPOSITORY
        )


def disturb(agent: subprocess.Popen[bytes], folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Kill processes until all kills are spent, and let the run end."""
    rng = random.Random(args.seed)
    hits: list[dict[str, Any]] = []
    for number in range(args.kills):
        reached = newest(folder)
        until(agent, lambda reached=reached: newest(folder) > reached)
        if number % 3 == 2:
            until(agent, lambda: is_writing(folder))
        else:
            time.sleep(2.0 * rng.random())
        rank = rng.randrange(args.processes)
        step, writing, killed = newest(folder), is_writing(folder), time.monotonic()
        kill(agent, rank)
        until(agent, lambda step=step: newest(folder) > step)
        seconds = round(time.monotonic() - killed, 1)
        hits.append({"rank": rank, "after_step": step, "while_writing": writing})
        hits[-1]["seconds_until_next_checkpoint"] = seconds
        print(
            f"kill {number + 1}: rank {rank} after step {step}{', writing' * writing}, {seconds} s",
            flush=True,
        )
    wait_well(agent)
    return hits


def kill(agent: subprocess.Popen[bytes], rank: int) -> None:
    """SIGKILL for a rank; one that is just being started anew is waited for."""

    def hit() -> bool:
        try:
            os.kill(ranks_of(agent.pid)[rank], signal.SIGKILL)
        except (KeyError, OSError):
            return False
        return True

    until(agent, hit)


def wait_well(agent: subprocess.Popen[bytes]) -> None:
    """Until torchrun has ended, which must be without error."""
    if agent.wait() != 0:
        raise SystemExit(f"torchrun failed: {agent.args}")


def until(agent: subprocess.Popen[bytes], condition: Callable[[], bool]) -> None:
    """Wait for it; an error when the run ends before, or nothing happens for PATIENCE seconds."""
    end = time.monotonic() + PATIENCE
    while not condition():
        if agent.poll() is not None:
            raise SystemExit("the run ended before all kills were spent; give it more run.max_steps")
        if time.monotonic() > end:
            raise SystemExit(f"nothing happened for {PATIENCE:.0f} s")
        time.sleep(0.001)


def newest(folder: Path) -> int:
    """The step of the newest complete checkpoint, 0 before there is one."""
    checkpoints = list_checkpoints(folder / FOLDER)
    return checkpoints[-1][0] if checkpoints else 0


def is_writing(folder: Path) -> bool:
    """Whether a checkpoint has begun to be written and isn't complete."""
    return any((folder / FOLDER).glob(".tmp-step*"))


def ranks_of(agent: int) -> dict[int, int]:
    """Process ids of torchrun's processes by rank."""
    found = {}
    for pid in Path(f"/proc/{agent}/task/{agent}/children").read_text().split():
        try:
            rank = re.search(rb"\0RANK=(\d+)", Path(f"/proc/{pid}/environ").read_bytes())
        except OSError:  # it has just ended
            continue
        if rank:
            found[int(rank[1])] = int(pid)
    return found


def compare(calm: Path, disturbed: Path) -> list[str]:
    """Names of the tensors in which two runs' last checkpoints differ; other steps or names are an error."""
    ends = [list_checkpoints(folder / FOLDER)[-1] for folder in (calm, disturbed)]
    if ends[0][0] != ends[1][0]:
        raise SystemExit(f"the runs ended at different steps, {ends[0][0]} and {ends[1][0]}")
    one, other = ({**load_tensors(weights_file(path)), **open_optimizer(path)} for _, path in ends)
    if one.keys() != other.keys():
        raise SystemExit("the runs' checkpoints hold different names")
    return [name for name in one if not torch.equal(one[name], other[name])]


if __name__ == "__main__":
    main()
