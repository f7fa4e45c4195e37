"""CapFilt's processes: any number of them, killed whenever; disks that are full. Nothing lost, nothing done twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import warm_python
from capfilt_helpers import MODELS, FakeCaptioner, fake_models, web_shards
from runner_helpers import environment

from lavis_lite.capfilt.claims import Claims
from lavis_lite.commands.capfilt import capfilt_main

REPOSITORY = Path(__file__).resolve().parent.parent
SHARDS, PICTURES = 8, 24


def helper(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(REPOSITORY / "tests" / "capfilt_helpers.py"), *arguments]
    return warm_python.run(command, env=environment(), cwd=REPOSITORY, timeout=200)


def contents(folder: Path) -> dict[str, bytes]:
    """What must not depend on who did it: all files but who was how fast and when it was reported."""
    names = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name[:3] == "000"]
    return {path.name: path.read_bytes() for path in names}


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_workers_leave_what_an_undisturbed_run_leaves(tmp_path: Path, seed: int) -> None:
    pattern = web_shards(tmp_path / "web", SHARDS, PICTURES)
    arguments = ["--shards", pattern, *MODELS, "--batch-size", "4", "--device", "cpu"]
    with fake_models():
        capfilt_main([*arguments, "--out", str(tmp_path / "calm")])
    done = helper("kills", str(seed), "14", *arguments, "--out", str(tmp_path / "killed"))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["killed"] > 5 and set(result["codes"]) == {0}, (result, done.stderr)
    assert contents(tmp_path / "killed") == contents(tmp_path / "calm")
    assert len(contents(tmp_path / "calm")) == 2 * SHARDS
    summaries = [json.loads((tmp_path / run / "summary.json").read_text()) for run in ("calm", "killed")]
    assert summaries[0]["tally"] == summaries[1]["tally"]
    # No shard was finished twice, and nothing half done is left.
    rows = [json.loads(line) for path in (tmp_path / "killed/workers").iterdir() for line in path.open()]
    assert max(Counter(row["shard"] for row in rows).values()) == 1
    assert not list((tmp_path / "killed").glob(".tmp-*")) and not list((tmp_path / "killed/claims").iterdir())


def test_processes_share_what_a_shard_that_cant_be_read_cost_them(tmp_path: Path) -> None:
    """It breaks off after some pictures: each attempt captions them in vain."""
    web_shards(tmp_path / "web", 3, 9)
    log, broken = tmp_path / "log", tmp_path / "web/00000.tar"
    stream = f"pipe:echo tried >>{log}; head -c {broken.read_bytes().index(b'0000003.jpg') + 600} {broken}"
    pattern = f"{stream}::{tmp_path}/web/00001.tar::{tmp_path}/web/00002.tar"
    arguments = ["--shards", pattern, *MODELS, "--device", "cpu", "--out", str(tmp_path / "out")]
    done = helper("kills", "0", "0", *arguments)
    assert json.loads(done.stdout)["codes"] == [1, 1, 1], done.stderr
    assert "Traceback" not in done.stderr and "1 of 3 shards could not be read" in done.stderr
    assert log.read_text().split() == ["tried"] * 3
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["shards"] == 2 and "can't be read: " in summary["unreadable"][stream]
    assert sorted(contents(tmp_path / "out")) == [
        *("000000.failed", "000001.json", "000001.tar", "000002.json", "000002.tar")
    ]


def test_a_full_disk_is_one_line_and_finished_shards_stay(tmp_path: Path) -> None:
    web_shards(tmp_path / "web", 2, 3)
    web_shards(tmp_path / "more", 1, 200)
    pattern = f"{tmp_path}/web/00000.tar::{tmp_path}/web/00001.tar::{tmp_path}/more/00000.tar"
    arguments = ["--shards", pattern, *MODELS, "--device", "cpu", "--out", str(tmp_path / "out")]
    full = helper("limited", "60000", *arguments)
    assert full.returncode == 1 and "Traceback" not in full.stderr, full.stderr
    line = full.stderr.strip().splitlines()[-1]
    assert "can't write to" in line and "2 shards are done and stay" in line, full.stderr
    kept = contents(tmp_path / "out")
    assert sorted(kept) == ["000000.json", "000000.tar", "000001.json", "000001.tar"]
    assert not list((tmp_path / "out").glob(".tmp-*"))
    with fake_models() as built:
        capfilt_main(arguments)
    assert sum(built[0].batches) == 199  # the third shard's readable pictures, no others again
    assert kept.items() <= contents(tmp_path / "out").items()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_work_between_batches_and_lets_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    arguments = [
        "--shards",
        web_shards(tmp_path / "web", 2, 9),
        *MODELS,
        "--batch-size",
        "4",
        "--device",
        "cpu",
    ]
    answer = FakeCaptioner.captions

    def told_to_end(self: FakeCaptioner, *given: Any) -> list[list[str]]:
        if len(self.batches) == 4:  # in the second shard
            os.kill(os.getpid(), number)
        return answer(self, *given)

    with monkeypatch.context() as patched, fake_models(), pytest.raises(SystemExit) as ended:
        patched.setattr(FakeCaptioner, "captions", told_to_end)
        capfilt_main([*arguments, "--out", str(tmp_path / "out")])
    assert ended.value.code == code
    assert sorted(contents(tmp_path / "out")) == ["000000.json", "000000.tar"]
    assert not list((tmp_path / "out").glob(".tmp-*")) and not list((tmp_path / "out/claims").iterdir())
    with fake_models() as built:
        capfilt_main([*arguments, "--out", str(tmp_path / "out")])
    assert sum(built[0].batches) == 9


def test_an_output_that_cant_be_made_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pattern = web_shards(tmp_path / "web", 1, 3)
    (tmp_path / "file").write_text("")
    with fake_models(), pytest.raises(SystemExit) as ended:
        capfilt_main(["--shards", pattern, *MODELS, "--out", str(tmp_path / "file" / "out")])
    assert ended.value.code == 1 and "can't write to" in capsys.readouterr().err


# Claims


def make_claims(folder: Path, **changes: Any) -> Claims:
    claims = Claims(folder, stale_after=changes.pop("stale_after", 60.0))
    claims._me.update(changes)
    return claims


def test_a_claim_is_held_by_one_until_it_is_released(tmp_path: Path) -> None:
    mine, yours = make_claims(tmp_path), make_claims(tmp_path)
    claim = mine.take("a")
    assert claim is not None and claim.holds()
    assert yours.take("a") is None and yours.take("b") is not None and mine.take("b") is None
    claim.release()
    again = yours.take("a")
    assert again is not None and again.holds() and not claim.holds()


@pytest.mark.parametrize(
    "death", ["no such process", "its number was given again", "silent elsewhere", "torn file"]
)
def test_a_dead_process_loses_its_claim_to_one_other(tmp_path: Path, death: str) -> None:
    changes = {
        "no such process": {"pid": 2**22 + 1},
        "its number was given again": {"started": "1"},
        "silent elsewhere": {"host": "another"},
        "torn file": {},
    }[death]
    dead = make_claims(tmp_path, **changes).take("a")
    assert dead is not None
    if death in ("silent elsewhere", "torn file"):
        if death == "torn file":
            dead.path.write_text("")
        assert make_claims(tmp_path).take("a") is None  # it may live
        os.utime(dead.path, (time.time() - 100, time.time() - 100))
    first, second = make_claims(tmp_path), make_claims(tmp_path)
    claim = first.take("a")
    assert claim is not None and claim.number == 2 and second.take("a") is None
    assert claim.holds() and not dead.holds()
    # Its old owner, only slow after all, takes nothing from the new one by letting go.
    dead.release()
    assert claim.holds() and second.take("a") is None


def test_signs_of_life_keep_a_claim(tmp_path: Path) -> None:
    owner, other = make_claims(tmp_path, host="another"), make_claims(tmp_path)
    claim = owner.take("a")
    assert claim is not None
    os.utime(claim.path, (time.time() - 100, time.time() - 100))
    claim.beat()
    assert other.take("a") is None
