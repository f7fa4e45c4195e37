from __future__ import annotations

import errno
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lavis_lite.common import checkpoint as ckpt
from lavis_lite.common.errors import CheckpointError, ConfigError, TrainingError
from lavis_lite.common.logging import read_rows
from lavis_lite.common.registry import registry
from lavis_lite.runners import runner as runner_module
from lavis_lite.runners.runner import Runner
from lavis_lite.tasks.base import Evaluation
from tests.runner_helpers import ROOT, assert_same_bits, config, weights


def rows(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in read_rows(run_dir / "log.jsonl") if row["kind"] == kind]


def test_a_run_leaves_its_files_and_prints_its_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = Runner(config(tmp_path, max_steps=5, eval_every=2, save_every=2)).train()
    run_dir = tmp_path / "run"
    assert (result.finished, result.step) == (True, 5)
    assert result.checkpoint == run_dir / "checkpoints" / "step_000005"
    assert [step for step, _ in ckpt.list_checkpoints(run_dir / "checkpoints")] == [4, 5]
    assert {path.name for path in run_dir.iterdir() if not path.match("frozen-*.safetensors")} == {
        ".lock", "config.yaml", "log.jsonl", "checkpoints", "summary.json", "report.txt"
    }  # fmt: skip
    assert [row["step"] for row in rows(run_dir, "train")] == [1, 2, 4, 5]
    assert [row["step"] for row in rows(run_dir, "eval")] == [2, 4, 5]
    row = rows(run_dir, "train")[1]
    assert row["loss"] == pytest.approx(row["loss_mse"] + row["loss_l1"])
    assert row["epoch"] == pytest.approx(2 * 4 / 24, abs=1e-4)
    assert row["lr"] == pytest.approx(0.5 * (0.01 + 1e-6), rel=1e-3)
    timings = {"images_per_s", "data_wait", "data_wait_share", "elapsed_s"}
    assert {"grad_norm", "skipped", "bad_images", *timings} <= row.keys()
    assert 0.0 <= row["data_wait_share"] <= 1.0
    out = capsys.readouterr().out
    assert "held-out split: val" in out and str(run_dir / "log.jsonl") in out and "wall time" in out


def test_a_checkpoint_holds_what_is_trained_and_nothing_frozen(tmp_path: Path) -> None:
    result = Runner(config(tmp_path, max_steps=1)).train()
    assert result.checkpoint is not None
    held = ckpt.load_tensors(result.checkpoint / ckpt.MODEL)
    assert "first.weight" in held and torch.equal(held["first.weight"], held["second.weight"])
    assert not any(name.startswith("frozen") for name in held)
    state = ckpt.load_state(result.checkpoint)
    assert state["versions"]["torch"] == torch.__version__ and state["batches"] == 1


def test_frozen_parts_stay_and_trained_parts_move(tmp_path: Path) -> None:
    runner = Runner(config(tmp_path, max_steps=3))
    runner.train()
    assert torch.all(runner.parts.model.frozen.weight == 0.3)
    assert not torch.all(runner.parts.model.norm.weight == 1.0)


def test_epochs_become_steps_once(tmp_path: Path) -> None:
    # 24 rows in batches of 4 are 6 batches; 3 epochs of them, 4 to a step, are 4.5 steps.
    result = Runner(config(tmp_path, max_steps=None, max_epochs=3, accum_grad_iters=4)).train()
    assert result.step == 5


def test_a_run_needs_a_length_and_its_splits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match=r"run\.max_steps or run\.max_epochs"):
        Runner(config(tmp_path / "a", max_steps=None)).train()
    with pytest.raises(ConfigError, match=r"no dataset has a split 'trian'; did you mean 'train'"):
        Runner(config(tmp_path / "b", train_split="trian")).train()
    with pytest.raises(ConfigError, match=r"run\.test_splits: no dataset has a split 'tset'"):
        Runner(config(tmp_path / "c", max_steps=1)).train()
        Runner(config(tmp_path / "c", max_steps=1, test_splits=["tset"])).evaluate()
    with pytest.raises(ConfigError, match=r"run\.test_splits is empty: there is nothing to evaluate"):
        Runner(config(tmp_path / "c", max_steps=1, test_splits=[])).evaluate()


def test_a_run_without_a_validation_split_just_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = Runner(config(tmp_path, valid_splits=["dev"], max_steps=2)).train()
    assert result.finished and result.metrics == {}
    assert "no dataset has a split 'dev'" in capsys.readouterr().err


def test_accumulated_batches_are_one_large_batch(tmp_path: Path) -> None:
    options = ("model.dropout=0.0",)
    large = Runner(config(tmp_path / "a", *options, batch_size_train=4)).train()
    small = Runner(config(tmp_path / "b", *options, batch_size_train=2, accum_grad_iters=2)).train()
    one, two = weights(large.checkpoint), weights(small.checkpoint)
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)
    losses = [[row["loss"] for row in rows(tmp_path / name / "run", "train")] for name in ("a", "b")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_results_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    results = [
        Runner(config(tmp_path / str(n), num_workers=n, accum_grad_iters=2, max_steps=3)).train()
        for n in (0, 2)
    ]
    assert_same_bits(weights(results[0].checkpoint), weights(results[1].checkpoint))


def test_seeds_matter(tmp_path: Path) -> None:
    results = [Runner(config(tmp_path / str(seed), seed=seed, max_steps=2)).train() for seed in (1, 2)]
    one, two = (weights(result.checkpoint) for result in results)
    assert not torch.equal(one["head.weight"], two["head.weight"])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_trains_fp32_weights(tmp_path: Path, precision: str) -> None:
    runner = Runner(config(tmp_path, precision=precision, max_steps=4, log_every=1))
    seen: list[torch.dtype] = []
    original = torch.nn.functional.layer_norm

    def watch(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(x.dtype)
        return original(x, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "layer_norm", watch)
        result = runner.train()
    assert {"bf16": torch.bfloat16, "fp16": torch.float16}[precision] in seen
    assert all(tensor.dtype == torch.float32 for tensor in weights(result.checkpoint).values())
    assert all(math.isfinite(row.get("loss", 0.0)) for row in rows(tmp_path / "run", "train"))
    assert ("grad_scale" in rows(tmp_path / "run", "train")[-1]) == (precision == "fp16")


def test_clipping_bounds_the_step_and_logs_the_true_norm(tmp_path: Path) -> None:
    norms = []
    for limit in (None, 1e-3):
        runner = Runner(config(tmp_path / str(limit), max_steps=1, max_grad_norm=limit))
        runner.train()
        moments = [s["exp_avg"] for s in runner.parts.optimizer.state.values()]
        # After one step AdamW's first moment is (1 - beta1) times the gradient that was applied.
        norms.append(torch.sqrt(sum((m / 0.1).square().sum() for m in moments)).item())
    logged_norms = [rows(tmp_path / n / "run", "train")[0]["grad_norm"] for n in ("None", "0.001")]
    assert logged_norms[0] == pytest.approx(logged_norms[1]) == pytest.approx(norms[0], rel=1e-4)
    assert norms[1] == pytest.approx(1e-3, rel=1e-2)


def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path: Path) -> None:
    runner = Runner(
        config(tmp_path, "model.bad_steps=[2,3]", max_steps=4, log_every=1, save_every=1, keep_last=9)
    )
    runner.train()
    steps = [weights(path) for _, path in ckpt.list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert_same_bits(steps[0], steps[2])
    assert not torch.equal(steps[2]["head.weight"], steps[3]["head.weight"])
    assert [(row["step"], row["loss"]) for row in rows(tmp_path / "run", "skipped")] == [
        (2, "nan"),
        (3, "nan"),
    ]
    assert [row.get("loss") is None for row in rows(tmp_path / "run", "train")] == [False, True, True, False]
    assert rows(tmp_path / "run", "train")[-1]["skipped"] == 2


def test_too_many_skipped_steps_end_the_run_and_name_the_good_checkpoint(tmp_path: Path) -> None:
    cfg = config(tmp_path, "model.bad_steps=[2,4,5,6,7]", max_steps=9, save_every=3, max_skipped=2)
    with pytest.raises(TrainingError, match=r"3 steps in a row up to step 6 .*step_000003"):
        Runner(cfg).train()
    assert torch.isfinite(weights(tmp_path / "run/checkpoints/step_000003")["head.weight"]).all()


def test_fp16_search_for_a_scale_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.amp.GradScaler, "get_scale", lambda self: 65536.0)
    runner = Runner(config(tmp_path, max_skipped=0))
    runner._count({"loss": 1.0, "grad_norm": math.inf}, False, searching=True)
    assert (runner.state.skipped, runner.state.skipped_in_row) == (1, 0)
    with pytest.raises(TrainingError):
        runner._count({"loss": math.nan, "grad_norm": math.inf}, False, searching=False)


def test_the_best_checkpoint_is_kept_and_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config(tmp_path, max_steps=6, eval_every=1, keep_last=1, best_metric="val/loss", best_mode="min")
    values = iter([0.9, 0.2, math.nan, 0.5, 0.4, 0.3])
    runner = Runner(cfg)
    evaluations = []

    def evaluate(self: Any, model: Any, dataset: Any, *, loader_args: Any, final: bool = True) -> Any:
        evaluations.append(final)
        return Evaluation({"loss": next(values)})

    monkeypatch.setattr(registry.get_task_class("fake_loss"), "evaluate", evaluate)
    runner.train()
    folder = tmp_path / "run" / "checkpoints"
    assert [step for step, _ in ckpt.list_checkpoints(folder)] == [2, 6]
    assert ckpt.load_state(folder / "step_000006")["best"] == {
        "metric": "val/loss",
        "mode": "min",
        "value": 0.2,
        "step": 2,
    }
    assert ckpt.best_or_newest(tmp_path / "run") == folder / "step_000002"
    assert evaluations == [False] * 5 + [True]
    monkeypatch.undo()
    metrics = Runner(cfg).evaluate()
    written = json.loads((tmp_path / "run/evaluation/metrics.json").read_text())
    assert written == {"checkpoint": str(folder / "step_000002"), "metrics": metrics}
    assert metrics.keys() == {"test/loss", "test/loss_mse", "test/loss_l1"}


def test_an_evaluation_whose_folder_cannot_be_written_to_does_not_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Runner(config(tmp_path, max_steps=1)).train().checkpoint
    monkeypatch.setattr(runner_module, "build_for_evaluation", None)
    advice = f"; set another one, and run.checkpoint={checkpoint}"
    (tmp_path / "file").touch()
    elsewhere = (f"run.output_dir={tmp_path / 'file'}", f"run.checkpoint={checkpoint}")
    with pytest.raises(
        ConfigError, match=r"can't make the folder '.*file/evaluation': Not a directory"
    ) as raised:
        Runner(config(tmp_path, *elsewhere)).evaluate()
    assert str(raised.value).endswith(advice)
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: _refuse())
    with pytest.raises(
        ConfigError, match=r"can't write to the folder '.*/evaluation': No space left"
    ) as raised:
        Runner(config(tmp_path)).evaluate()
    assert str(raised.value).endswith(advice)


@pytest.mark.parametrize("what", ["metrics", "report"])
def test_an_evaluation_is_told_though_its_files_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    Runner(config(tmp_path, max_steps=1)).train()
    cfg = config(tmp_path)
    capsys.readouterr()
    Runner(cfg).evaluate()
    table = capsys.readouterr().out
    for path in (tmp_path / "run" / "evaluation").iterdir():
        path.unlink()
    if what == "metrics":
        monkeypatch.setattr("lavis_lite.runners.evaluation.atomic_write", lambda *_: _refuse())
    else:
        monkeypatch.setattr(registry.get_task_class("fake_loss"), "write_report", lambda *_: _refuse())
    with pytest.raises(OSError, match="No space left"):
        Runner(cfg).evaluate()
    told = capsys.readouterr().out
    without = [line for line in table.splitlines() if not line.startswith((what, "wall time"))]
    assert [line for line in told.splitlines() if not line.startswith("wall time")] == without
    assert [path.name for path in (tmp_path / "run" / "evaluation").iterdir()] == (
        ["report.txt"] if what == "metrics" else ["metrics.json"]
    )


def test_a_run_is_told_though_its_report_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(registry.get_task_class("fake_loss"), "write_report", lambda *_: _refuse())
        with pytest.raises(OSError, match="No space left"):
            Runner(config(tmp_path, max_steps=1)).train()
    told = capsys.readouterr().out
    assert "held-out split: val" in told and "report.txt" not in told
    Runner(config(tmp_path, max_steps=1)).train()
    assert (tmp_path / "run" / "summary.json").is_file() and "report.txt" in capsys.readouterr().out


def _refuse() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_task_is_told_where_it_may_leave_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[Path, str]] = []

    def evaluate(self: Any, model: Any, dataset: Any, *, loader_args: Any, final: bool = True) -> Any:
        told.append((loader_args.folder, loader_args.label))
        return Evaluation({"loss": 1.0})

    monkeypatch.setattr(registry.get_task_class("fake_loss"), "evaluate", evaluate)
    two = ("datasets.other.builder=fake_rows",)
    runner = Runner(config(tmp_path, *two, max_steps=2, test_splits=["test"]))
    runner.train()
    assert told == [(tmp_path / "run", "val_fake"), (tmp_path / "run", "val_other")]
    told.clear()
    Runner(config(tmp_path, max_steps=2)).evaluate()
    assert told == [(tmp_path / "run" / "evaluation", "test")]


def test_an_unknown_best_metric_keeps_the_work(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"run\.best_metric: 'val/los' was not measured; did you mean 'val/loss'"
    ):
        Runner(config(tmp_path, best_metric="val/los", eval_every=3)).train()
    assert Runner(config(tmp_path, best_metric="val/loss", best_mode="min")).train().finished
    assert [row["step"] for row in rows(tmp_path / "run", "train")] == [1, 2, 4, 6]


def test_evaluation_uses_the_weights_it_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing to evaluate"):
        Runner(config(tmp_path / "none")).evaluate()
    trained = Runner(config(tmp_path / "a", max_steps=6)).train()
    own = Runner(config(tmp_path / "a")).evaluate()
    told = Runner(config(tmp_path / "b", f"model.pretrained={trained.checkpoint}")).evaluate()
    assert own == told
    early = Runner(config(tmp_path / "c", max_steps=1)).train()
    assert Runner(config(tmp_path / "b", f"model.pretrained={early.checkpoint}")).evaluate() != own


def test_a_runs_own_checkpoint_comes_before_the_one_it_began_from(tmp_path: Path) -> None:
    early = Runner(config(tmp_path / "early", max_steps=1)).train().checkpoint
    Runner(config(tmp_path / "late", max_steps=6)).train()
    own = Runner(config(tmp_path / "late")).evaluate()
    assert Runner(config(tmp_path / "late", f"model.pretrained={early}")).evaluate() == own
    chosen = Runner(config(tmp_path / "late", f"run.checkpoint={early}")).evaluate()
    assert chosen == Runner(config(tmp_path / "early")).evaluate() != own


def test_measured_numbers_stand_beside_expected_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Runner(config(tmp_path, max_steps=2)).train()
    wanted = "expected={source: A Paper, metrics: {test/loss: 0.5, test/los: 1}}"
    loss = Runner(config(tmp_path, wanted)).evaluate()["test/loss"]
    table = capsys.readouterr().out
    assert ["test/loss", "0.5000", f"{loss:.4f}", f"{loss - 0.5:+.4f}"] in [
        line.split() for line in table.splitlines()
    ]
    assert "test/los (not measured; did you mean 'test/loss'" in table


def test_evaluation_does_not_change_training(tmp_path: Path) -> None:
    results = [Runner(config(tmp_path / str(every), eval_every=every)).train() for every in (0, 1)]
    assert_same_bits(weights(results[0].checkpoint), weights(results[1].checkpoint))


def test_minutes_also_save(tmp_path: Path) -> None:
    Runner(config(tmp_path, save_minutes=0.0, keep_last=9, max_steps=3)).train()
    assert [step for step, _ in ckpt.list_checkpoints(tmp_path / "run/checkpoints")] == [1, 2, 3]


def test_several_datasets_mix_and_are_evaluated_apart(tmp_path: Path) -> None:
    more = "datasets.more={builder: fake_rows, rows: 12}"
    result = Runner(config(tmp_path, more, "datasets.fake.ratio=3", "datasets.more.ratio=1")).train()
    apart = [result.metrics[f"val/{name}/loss"] for name in ("fake", "more")]
    assert result.metrics["val/loss"] == pytest.approx(sum(apart) / 2)
    with pytest.raises(ConfigError, match=r"missing datasets\.more\.ratio"):
        Runner(config(tmp_path / "b", more, "datasets.fake.ratio=3")).train()


def test_the_way_to_the_loss_is_short() -> None:
    source = (ROOT / "lavis_lite/runners/runner.py").read_text()
    body = source.split("def train(self)")[1].split("\n    def ")[0]
    assert "self.train_step(" in body and len(body.splitlines()) < 40
