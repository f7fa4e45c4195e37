"""How CapFilt ends: one process makes the summary, the annotations and the report, the others find them made."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from capfilt_helpers import MODELS, fake_models, web_shards
from data_helpers import make_jsonl

from lavis_lite.capfilt import claims as claims_module
from lavis_lite.capfilt import run, summary
from lavis_lite.capfilt.claims import Claims
from lavis_lite.capfilt.output import Output
from lavis_lite.commands.capfilt import capfilt_main

SHARDS = 4
NAMES = [f"{number:06d}" for number in range(SHARDS)]


def done(folder: Path, *, images: bool) -> list[str]:
    """The arguments of a CapFilt whose output is complete, in folder/out."""
    if images:
        rows = make_jsonl(folder, 2 * SHARDS)
        given = ["--images", str(folder / "images"), "--annotations", str(rows), "--shard-size", "2"]
    else:
        given = ["--shards", web_shards(folder / "web", SHARDS, 3)]
    arguments = [*given, *MODELS, "--out", str(folder / "out")]
    with fake_models():
        capfilt_main(arguments)
    return arguments


def finish(folder: Path, *, images: bool = False) -> summary.Summary:
    output = Output(folder / "out", tars=True, annotations=images)
    claims = Claims(folder / "out" / "claims", stale_after=60.0)
    return summary.finish(output, NAMES, claims, inputs=None)  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    """What is in the output's files; of the report, whose drawing has random names in it, only that it is there."""
    files = (path for path in folder.iterdir() if path.is_file())
    return {path.name: b"" if path.name == "report.html" else path.read_bytes() for path in files}


@pytest.mark.parametrize("images", [False, True])
def test_what_belongs_to_the_summary_is_made_again_once_lost(tmp_path: Path, images: bool) -> None:
    arguments, out = done(tmp_path, images=images), tmp_path / "out"
    before = contents(out)
    assert {"report.html", "summary.json"} <= before.keys() and ("annotations.jsonl" in before) == images
    for lost in ("report.html", "annotations.jsonl") if images else ("report.html",):
        (out / lost).unlink()
        with fake_models() as built:
            capfilt_main(arguments)
        assert built == [] and contents(out) == before


def test_a_summary_that_is_there_is_read_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done(tmp_path, images=True)
    held = Claims(tmp_path / "out" / "claims", stale_after=60.0).take("summary")
    assert held is not None
    monkeypatch.setattr(Output, "manifest", lambda *_: pytest.fail("a manifest was read"))
    monkeypatch.setattr(summary.time, "sleep", lambda _: pytest.fail("waited for the claim"))
    assert finish(tmp_path, images=True).shards == SHARDS


def test_who_waits_looks_for_the_summary_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done(tmp_path, images=False)
    path, aside, waits = tmp_path / "out/summary.json", tmp_path / "aside.json", []
    path.rename(aside)
    held = Claims(tmp_path / "out" / "claims", stale_after=60.0).take("summary")
    assert held is not None

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) > 2:
            pytest.fail("still waiting for the claim")
        if len(waits) == 2:
            aside.rename(path)

    monkeypatch.setattr(summary.time, "sleep", wait)
    assert finish(tmp_path).shards == SHARDS and len(waits) == 2 and held.holds()


def test_a_process_that_makes_a_long_summary_is_not_taken_for_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each manifest takes longer than the time after which a process of another machine counts as gone."""
    arguments, out = done(tmp_path, images=True), tmp_path / "out"
    others, looks = Claims(out / "claims", stale_after=60.0), []

    class Elsewhere(Claims):
        def __init__(self, *given: Any, **settings: Any) -> None:
            super().__init__(*given, **settings)
            self._me["host"] = "another"

    def long_after(function: Any) -> Any:
        def called(*given: Any) -> Any:
            claims = list((out / "claims").glob("summary.claim.*"))
            if claims:
                looks.append(function.__name__)
                assert others.take("summary") is None
                os.utime(claims[0], (time.time() - 100, time.time() - 100))
            return function(*given)

        return called

    monkeypatch.setattr(claims_module, "BEAT_SECONDS", 0.0)
    monkeypatch.setattr(run, "Claims", Elsewhere)
    for owner, name in ((Output, "manifest"), (summary, "_samples"), (summary, "_page")):
        monkeypatch.setattr(owner, name, long_after(getattr(owner, name)))
    (out / "summary.json").unlink()
    with fake_models():
        capfilt_main(arguments)
    assert looks == [*["manifest"] * SHARDS, "_samples", "_page"]
