"""Stage 1 on several processes that are killed again and again, against the same run left alone.

    python run_scripts/experiments/kills.py --kills 20 --strategy fsdp2 --options run.save_async=true

The run left alone is timed: its start, its steps, its last evaluation. The moments of kills are drawn uniformly over
the time that it would take with a new start after each of them, whatever the processes do: start, load, train or save.
Only the last one is drawn from the last evaluation, which is too short to be hit by chance. A process drawn at random
gets SIGKILL; torchrun starts all of them again, and they go on from the newest checkpoint. In the end every tensor of
the last checkpoint must be that of the undisturbed run, bit for bit: else the command fails.

`--out` gets kills.json: where each process was hit, how long the others took to end and the lines they said, the
command, the commit and the machine. Needs /proc.
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
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from seeds import REPOSITORY, surroundings

from lavis_lite.common.checkpoint import FOLDER, list_checkpoints, load_tensors, open_optimizer, weights_file
from lavis_lite.common.logging import read_rows

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
    parser.add_argument("--strategy", default="auto", help="run.strategy: ddp, fsdp2, fairscale")
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, help="by default output/kills/<strategy>")
    args = parser.parse_args()
    args.out = args.out or Path("output/kills") / args.strategy
    args.out.mkdir(parents=True, exist_ok=True)
    calm, disturbed = args.out / "calm", args.out / "disturbed"
    times_file = args.out / "calm.json"
    if not (times_file.is_file() and list_checkpoints(calm / FOLDER)):
        shutil.rmtree(calm, ignore_errors=True)
        times_file.write_text(json.dumps(timed(launch(calm, args), calm)) + "\n")
    times = json.loads(times_file.read_text())
    shutil.rmtree(disturbed, ignore_errors=True)
    hits = Disturbance(launch(disturbed, args), disturbed, last_step=newest(calm)).run(times, args)
    different = compare(calm, disturbed)
    facts = {"command": " ".join(sys.argv), **surroundings(), "undisturbed": times, "hits": hits}
    facts["different_tensors"] = different
    (args.out / "kills.json").write_text(json.dumps(facts, indent=1) + "\n")
    report(hits, args.kills)
    print(f"tensors that differ: {len(different)}")
    if different:
        raise SystemExit(f"not the undisturbed run's: {', '.join(different[:5])}")


def report(hits: list[dict[str, Any]], wanted: int) -> None:
    """Say where processes were hit, and how the others ended."""
    places = Counter(hit["place"] for hit in hits)
    print(f"{len(hits)} kills of {wanted}:", ", ".join(f"{n} {place}" for place, n in places.most_common()))
    if not hits:
        return
    seconds = [hit["seconds_to_exit"] for hit in hits]
    print(
        f"from a kill to the end of the others {statistics.median(seconds):.1f} s, at most {max(seconds):.1f} s"
    )
    lines = Counter(len(hit["said"]) for hit in hits)
    print(
        "lines said after a kill:", ", ".join(f"{n} in {times} kills" for n, times in sorted(lines.items()))
    )


def launch(folder: Path, args: argparse.Namespace) -> subprocess.Popen[bytes]:
    """torchrun, which starts the processes again after each kill; what it says goes to a file beside the run."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={args.processes}", f"--max-restarts={args.kills}"]
    options = [*SMALL, f"run.strategy={args.strategy}", *args.options]
    command += ["train.py", "--cfg-path", CONFIG, "--options", *options]
    with folder.with_suffix(".log").open("wb") as said:
        return subprocess.Popen(
            [*command, f"run.output_dir={folder.resolve()}"], stdout=said, stderr=said, cwd=REPOSITORY
        )


def timed(agent: subprocess.Popen[bytes], folder: Path) -> dict[str, float]:
    """Let a run end; the seconds until its first step was done, its last, its last evaluation, and all."""
    began = time.monotonic()
    seconds: dict[str, float] = {}
    step = 0
    while agent.poll() is None:
        now = last_logged(folder)
        if now > step:
            step, seconds["last_step"] = now, time.monotonic() - began
            seconds.setdefault("first_step", seconds["last_step"])
        if last_logged(folder, "eval") < step or not step:
            seconds["evaluated"] = time.monotonic() - began
        time.sleep(0.05)
    wait_well(agent)
    seconds["end"] = time.monotonic() - began
    return {name: round(value, 2) for name, value in seconds.items()}


@dataclass
class Disturbance:
    """A run under torchrun, its folder, and the last step it is to reach.

    resumed: the step that the processes alive now went on from. begun: when those before them had ended (time.time).
    """

    agent: subprocess.Popen[bytes]
    folder: Path
    last_step: int
    resumed: int = 0
    begun: float = 0.0

    def run(self, times: dict[str, float], args: argparse.Namespace) -> list[dict[str, Any]]:
        """Kill processes at moments drawn from `times`, and let the run end; what became of each kill."""
        rng = random.Random(args.seed)
        began = time.monotonic()
        hits: list[dict[str, Any]] = []
        for left in range(args.kills - 1, 0, -1):
            pause, start = self._pause(times, left, rng), time.monotonic()
            if not self._waited(lambda pause=pause, start=start: time.monotonic() - start >= pause):
                break
            hits += self._hit(rng.randrange(args.processes), began)
        if self._waited(lambda: self._place() == "evaluating"):
            # Not to the end: this evaluation may be a bit faster than that of the run left alone.
            time.sleep(rng.uniform(0.0, 0.8 * (times["evaluated"] - times["last_step"])))
            hits += self._hit(rng.randrange(args.processes), began)
        wait_well(self.agent)
        return hits

    def _pause(self, times: dict[str, float], left: int, rng: random.Random) -> float:
        """How long the processes that start now may live: until the first of the moments of all kills that are left.

        These are drawn over the time that the run would take with them, but so that the first comes before its end.
        """
        step_seconds = (times["last_step"] - times["first_step"]) / max(1, self.last_step - 1)
        steps = step_seconds * (self.last_step - self.resumed)
        whole = steps + (left + 1) * times["first_step"]
        while True:
            pause = min(rng.uniform(0.0, whole) for _ in range(left))
            if pause < steps + times["first_step"]:
                return pause

    def _waited(self, condition: Callable[[], bool]) -> bool:
        """Wait for a condition; whether the run goes on."""
        while not condition() and self.agent.poll() is None:
            time.sleep(0.02)
        return self.agent.poll() is None

    def _hit(self, rank: int, began: float) -> list[dict[str, Any]]:
        """SIGKILL for a rank, and what followed; nothing when the run ended before.

        A rank that is not there, because torchrun is starting it anew, is hit as soon as it is.
        """
        said = self.folder.with_suffix(".log")
        while self.agent.poll() is None:
            ranks, heard = ranks_of(self.agent.pid), said.stat().st_size
            hit = {"rank": rank, "after_step": newest(self.folder), "place": self._place()}
            killed = time.monotonic()
            if rank in ranks and _killed(ranks[rank]):
                break
            time.sleep(0.005)
        else:
            return []
        until(lambda: not set(ranks.values()) & set(ranks_of(self.agent.pid).values()))
        hit |= {"at_s": round(killed - began, 1), "seconds_to_exit": round(time.monotonic() - killed, 1)}
        hit["said"] = re.findall(
            r"^error: .*", said.read_bytes()[heard:].decode(errors="replace"), re.MULTILINE
        )
        self.resumed, self.begun = newest(self.folder), time.time()
        print(json.dumps(hit), flush=True)
        return [hit]

    def _place(self) -> str:
        """What the processes are at: starting, writing a checkpoint, training, evaluating at the end."""
        log = self.folder / "log.jsonl"
        step = last_logged(self.folder)
        # Until they open the log its last rows are those of the processes before; a step follows, if one is left.
        if (
            not log.is_file()
            or log.stat().st_mtime < self.begun
            or step <= min(self.resumed, self.last_step - 1)
        ):
            return "starting"
        if is_writing(self.folder):
            return "writing"
        return "training" if step < self.last_step else "evaluating"


def _killed(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def last_logged(folder: Path, kind: str = "train") -> int:
    """The last step of training, or of another kind of row, in a run's log, 0 before there is one."""
    return max((row["step"] for row in read_rows(folder / "log.jsonl") if row["kind"] == kind), default=0)


def wait_well(agent: subprocess.Popen[bytes]) -> None:
    """Until torchrun has ended, which must be without error."""
    if agent.wait() != 0:
        raise SystemExit(f"torchrun failed: {agent.args}")


def until(condition: Callable[[], bool]) -> None:
    """Wait for it; an error when it takes more than PATIENCE seconds."""
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            raise SystemExit(f"nothing happened for {PATIENCE:.0f} s")
        time.sleep(0.005)


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
