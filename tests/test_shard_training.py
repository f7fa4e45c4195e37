"""Whole runs on shards and streams: interrupted and continued they are what they would have been, bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from data_helpers import warnings_logged
from runner_helpers import assert_same_bits, logged, run_ranks, train_command, weights
from shard_helpers import section, write_shards

from lavis_lite.common.config import load_config
from lavis_lite.common.errors import ConfigError
from lavis_lite.common.logging import progress_text
from lavis_lite.datasets.builders import build_datasets
from lavis_lite.datasets.content import content_of
from lavis_lite.runners.changed_data import note_data
from lavis_lite.runners.runner import Runner
from lavis_lite.runners.state import TrainState

TESTS = Path(__file__).resolve().parent


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAVIS_LITE_CACHE", str(tmp_path / "cache"))


def project(folder: Path, **run: Any) -> Path:
    """Local shards and a stream, mixed 1:2; the run's output goes to folder/run."""
    local = write_shards(folder.parent / "local", 2, 9)
    streamed = write_shards(folder.parent / "streamed", 5, 7)
    stream = {"stream": True, "samples": 35, "shuffle": 4}
    content = {
        "imports": [str(TESTS / "shard_fakes.py"), str(TESTS / "runner_fakes.py")],
        "model": {"arch": "fake_pictures"},
        "datasets": {
            "local": {**section(local), "ratio": 1},
            "streamed": {**section(streamed, **stream), "ratio": 2},
        },
        "task": {"name": "fake_loss"},
        "run": {
            "output_dir": str(folder / "run"),
            "max_steps": 8,
            "save_every": 4,
            "batch_size_train": 3,
            "num_threads": 1,
            "num_workers": 0,
            "valid_splits": [],
            "test_splits": [],
            "warmup_steps": 2,
            "log_every": 4,
            "init_lr": 0.01,
            "precision": "fp32",
            "max_bad_fraction": 0.5,
            **run,
        },
    }
    folder.mkdir(parents=True)
    path = folder / "project.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def back_to_step_4(folder: Path) -> dict[str, Any]:
    """Leave a finished run as it was after four steps; returns what it was after eight."""
    finished = folder / "run/checkpoints/step_000008"
    bits = weights(finished)
    shutil.rmtree(finished)
    (folder / "run/summary.json").unlink(missing_ok=True)
    return bits


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_continues_in_mid_epoch_of_a_mix(tmp_path: Path, workers: int) -> None:
    path = project(tmp_path / "one", num_workers=workers)
    (tmp_path / "streamed/00002.tar").write_bytes(b"broken" * 1000)
    whole = Runner(load_config(path)).train()
    assert whole.finished
    log, bits = logged(tmp_path / "one/run"), back_to_step_4(tmp_path / "one")
    again = Runner(load_config(path)).train()
    assert again.finished and again.checkpoint == whole.checkpoint
    assert_same_bits(weights(again.checkpoint), bits)
    assert [row for row in logged(tmp_path / "one/run") if "loss" in row] == [
        row for row in log if "loss" in row
    ]


def test_an_evaluation_made_up_for_in_another_folder_keeps_the_place_of_a_stream(tmp_path: Path) -> None:
    path = project(tmp_path / "one")
    whole = Runner(load_config(path)).train()
    start = tmp_path / "one/run/checkpoints/step_000004"
    val = f"datasets.local.val.shards={write_shards(tmp_path / 'val', 1, 6)}"
    validated = [
        val,
        "run.eval_every=4",
        "run.valid_splits=[val]",
        "run.best_metric=val/loss",
        "run.best_mode=min",
    ]
    other = f"run.output_dir={tmp_path / 'other'}"
    again = Runner(load_config(path, [f"run.resume={start}", other, *validated])).train()
    kept = json.loads((tmp_path / "other/checkpoints/step_000004/state.json").read_text())
    assert kept["stream_places"] == json.loads((start / "state.json").read_text())["stream_places"] != {}
    assert_same_bits(weights(again.checkpoint), weights(whole.checkpoint))


def test_a_run_does_not_continue_on_other_shards_unless_told_to(tmp_path: Path) -> None:
    path = project(tmp_path / "one")
    stars = path.read_text().replace("{00000..00001}.tar", "*.tar").replace("{00000..00004}.tar", "*.tar")
    path.write_text(stars)
    Runner(load_config(path)).train()
    back_to_step_4(tmp_path / "one")
    before = (tmp_path / "one/run/checkpoints/step_000004/state.json").read_text()
    hidden = (tmp_path / "streamed/00001.tar").rename(tmp_path / "00001.tar")
    with pytest.raises(
        ConfigError, match=r"datasets\.streamed: .*trained on 5 shards .* there are 4 shards, so"
    ):
        Runner(load_config(path)).train()
    hidden.rename(tmp_path / "streamed/00001.tar")
    write_shards(tmp_path / "more", 1, 4)
    (tmp_path / "more/00000.tar").rename(tmp_path / "local/00002.tar")
    with pytest.raises(
        ConfigError, match=r"datasets\.local: .* 18 rows up to its checkpoint and now there are 22 rows"
    ):
        Runner(load_config(path)).train()
    (tmp_path / "local/00002.tar").rename(tmp_path / "local/00001.tar")
    (tmp_path / "streamed/00001.tar").rename(tmp_path / "streamed/0000x.tar")
    content = yaml.safe_load(path.read_text())
    content["run"]["allow_changed_data"] = True
    path.write_text(yaml.safe_dump(content))
    with warnings_logged() as lines:
        assert Runner(load_config(path)).train().finished
    assert len(lines) == 2 and "now there are 13 rows; some samples come twice" in lines[0]
    assert "now there are 5 other shards; its epoch 0 begins again" in lines[1]
    # A checkpoint of a version that didn't keep it continues.
    back_to_step_4(tmp_path / "one")
    state = {key: value for key, value in json.loads(before).items() if key != "data"}
    (tmp_path / "one/run/checkpoints/step_000004/state.json").write_text(json.dumps(state))
    content["run"]["allow_changed_data"] = False
    path.write_text(yaml.safe_dump(content))
    assert Runner(load_config(path)).train().finished


@pytest.mark.parametrize(
    ("stream", "told"), [(False, "some samples come twice"), (True, "it begins with its first epoch")]
)
def test_a_dataset_that_becomes_a_stream_or_ceases_to_be_one(tmp_path: Path, stream: bool, told: str) -> None:
    pattern = write_shards(tmp_path, 2, 3)
    options = {"stream": True, "samples": 6} if stream else {}
    dataset = build_datasets({"web": section(pattern, **options)})["web"]["train"]
    before = {"kind": "rows" if stream else "shards", "count": 2, "digest": "x"}
    places = {} if stream else {"web 0/1": (3, 1, 0, 2)}
    state = TrainState(data={"web": before}, stream_places=dict(places))
    with warnings_logged() as lines:
        note_data(state, [dataset], allowed=True)
    assert len(lines) == 1 and told in lines[0] and "begins again" not in lines[0]
    assert state.stream_places == places


def test_a_set_of_shards_stays_itself_when_it_moves(tmp_path: Path) -> None:
    def content(folder: str, **train: Any) -> list[dict[str, Any]]:
        pattern = write_shards(tmp_path / folder, 3, 2)
        stream = {"stream": True, "samples": 6}
        built = build_datasets({"one": section(pattern), "two": section(pattern, **stream)})
        return [content_of(splits["train"]) for splits in built.values()]

    rows, shards = content("here")
    assert [rows, shards] == content("there")
    assert (rows["kind"], rows["count"]) == ("rows", 6) and (shards["kind"], shards["count"]) == ("shards", 3)
    assert rows["digest"] and shards["digest"]


@pytest.mark.slow
def test_two_processes_continue_in_mid_epoch_of_a_mix(tmp_path: Path) -> None:
    path = project(tmp_path / "two", num_workers=1)
    run_ranks(train_command(path), timeout=300)
    bits = back_to_step_4(tmp_path / "two")
    run_ranks(train_command(path), timeout=300)
    assert_same_bits(weights(tmp_path / "two/run/checkpoints/step_000008"), bits)


def test_the_log_line_says_how_much_of_a_step_waits_for_data() -> None:
    row = {"loss": 1.0, "images_per_s": 100.0, "data_wait": 0.3, "data_wait_share": 0.26}
    assert progress_text(row) == "loss 1.000  100 images/s  26% waiting for data"
    assert progress_text({**row, "data_wait_share": 0.01}) == "loss 1.000  100 images/s"
