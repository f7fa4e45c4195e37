"""The training loop: train_step -> log -> save -> validate, one optimiser step after another.

Randomness. Every forward pass begins with a seed made from (run.seed, number of the batch, rank), and the
loader's n-th batch depends on (run.seed, n) alone, so a checkpoint needs no generator states: continuing at
step n does what going on would have done, bit for bit, with any number of loader workers.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lavis_lite.common import checkpoint as ckpt
from lavis_lite.common import dist, optim
from lavis_lite.common.config import Config
from lavis_lite.common.device import autocast
from lavis_lite.common.errors import TrainingError
from lavis_lite.common.logging import ProgressDisplay, RunLog, get_logger, read_rows
from lavis_lite.common.registry import registry
from lavis_lite.common.signals import StopSignals
from lavis_lite.models.frozen import name_from_checkpoint
from lavis_lite.runners import evaluation as ev
from lavis_lite.runners import resume
from lavis_lite.runners.compiling import backward_errors
from lavis_lite.runners.faults import speaking_once
from lavis_lite.runners.saving import CheckpointSaver
from lavis_lite.runners.setup import build_for_evaluation, build_parts, describe, to_device, to_evaluate
from lavis_lite.runners.state import RunResult, TrainState, Window, mix_seed, straggling
from lavis_lite.tasks.base import RunFacts

logger = get_logger(__name__)

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


@registry.register_runner("runner_base")
class Runner:
    """Trains and evaluates what a configuration describes; one process, or several under torchrun."""

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self.run_dir = Path(cfg.run.output_dir)
        self.results: list[ev.Result] = []
        self.saved: Path | None = None
        self.log_file: RunLog | None = None
        # Closed after a run and after an error: a rank may end without another chance.
        self.files = ExitStack()
        self.state = TrainState()
        self.max_steps = 0
        self.stopping = self.save_wished = False
        self.window = Window()
        self.signals = StopSignals()
        self._began = self._saved_at = time.monotonic()

    def train(self) -> RunResult:
        """Train to run.max_steps (or max_epochs), from where run.resume says, then evaluate and report.

        The first SIGTERM or Ctrl-C lets the current step finish and saves. After SIGTERM the call then
        returns with `finished` false (the command exits with 0); after Ctrl-C it raises KeyboardInterrupt
        (exit code 130).

        Raises ConfigError, DataError, CheckpointError (also when the disk is full: the checkpoint before
        stays good) and TrainingError (another process trains in the folder, more than run.max_skipped non-finite steps
        in a row, or a lost rank); of several ranks with the same error one raises it and the others SystemExit, and
        they ignore SIGTERM from then on.
        """
        dist.init(self.cfg.run.timeout)
        with self.files, speaking_once(self._where):
            if self._set_up():
                with self.signals, self.progress:
                    # Before an evaluation that may save: the loader then knows where its streams are.
                    batches = self._batches()
                    if self._owes_evaluation():
                        self.validate()
                    while not self.finished and not self.stopping:
                        self.train_step(batches)
                        self.log()
                        # Before the evaluation, whose failure then loses nothing.
                        if self._save_is_due():
                            self.save()
                        if self._is_due(self.cfg.run.eval_every):
                            self.validate()
                    batches.close()
                    self.saver.wait()
                    if not self.finished:
                        # torchrun ends all processes when one ends: not before all is saved, whatever signals come.
                        dist.barrier()
                self._finish()
        # Not after an error: other ranks may be waiting in a collective, and end because this one does.
        dist.shutdown()
        return RunResult(self.finished, self.state.step, self.saved, dict(self.state.metrics))

    def _batches(self) -> Generator[dict[str, Any], None, None]:
        """This rank's batches from where the run is."""
        return self.parts.loader.batches(
            self.state.step * self.cfg.run.accum_grad_iters, self.state.stream_places
        )

    def _where(self) -> str:
        """Where the run is, for the message of one that can't go on."""
        kept = ckpt.newest(self.run_dir)
        step = self.state.step
        # max_steps isn't known before all is built.
        place = f"after step {step}, the last" if self.max_steps and self.finished else f"at step {step + 1}"
        return f"{place}; last good checkpoint: {kept or 'none yet'}; the same command continues it"

    def _set_up(self) -> bool:
        """Find where to start and build everything; False for a finished run, whose summary is printed."""
        start = None
        if dist.is_main():
            self.files.enter_context(resume.alone(self.cfg))
            start = resume.find_start(self.cfg)
        start = dist.broadcast_object(start)
        assert start is not None
        self.state = start.state
        self.saved = start.checkpoint
        if start.summary is not None:
            self.max_steps = self.state.step
            self._print([f"this run is finished: {self.saved}", *start.summary])
            return False
        run = self.cfg.run
        if dist.is_main():
            self.log_file = RunLog(
                self.run_dir,
                last_step=self.state.step,
                last_evaluation=self.state.evaluated_step or 0,
                tensorboard=run.tensorboard,
            )
            self.files.callback(self.log_file.close)
        self.parts = build_parts(self.cfg, start)
        self.saver = CheckpointSaver(self.run_dir, run, self.parts.strategy, self.parts.device)
        self.files.callback(self.saver.close)
        self.max_steps = self.parts.max_steps
        ev.check_splits(self.parts.datasets, run.valid_splits, where="run.valid_splits", required=False)
        if self.saved is not None:
            logger.info("continuing %s at step %d", self.saved, self.state.step)
            resume.warn_of_changes(self.state, self.max_steps, streams=self.parts.loader.has_streams)
        self.state.num_threads, self.state.world_size = torch.get_num_threads(), dist.world_size()
        logger.info(describe(self.parts))
        self.progress = ProgressDisplay(self.max_steps, self.state.step, shown=dist.is_main())
        self.parts.wrapped.train()
        return True

    @property
    def finished(self) -> bool:
        """Whether the run has reached its length."""
        return self.state.step >= self.max_steps

    def train_step(self, batches: Iterator[Mapping[str, Any]]) -> None:
        """One optimiser step on the mean loss of accum_grad_iters batches per rank."""
        parts, accum = self.parts, self.cfg.run.accum_grad_iters
        began = time.monotonic()
        optim.set_lr(parts.optimizer, parts.schedule(self.state.step))
        sums: dict[str, Tensor] = {}
        for micro in range(accum):
            samples = self._next(batches)
            torch.manual_seed(mix_seed(self.cfg.run.seed, self.state.step * accum + micro, dist.rank()))
            # Gradients are exchanged once per step, in the backward of its last batch.
            with nullcontext() if micro == accum - 1 else parts.strategy.no_sync(parts.wrapped):
                with autocast(parts.device, parts.precision):
                    losses = parts.wrapped(samples)
                with backward_errors():
                    parts.scaler.scale(losses["loss"] / accum).backward()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value.detach().float() / accum
        self._update(sums)
        self.state.step += 1
        self.window.steps += 1
        self.window.seconds += time.monotonic() - began

    def _next(self, batches: Iterator[Mapping[str, Any]]) -> dict[str, Any]:
        began = time.monotonic()
        samples = next(batches)
        self.window.wait += time.monotonic() - began
        return to_device(samples, self.parts.device)

    def _update(self, sums: Mapping[str, Tensor]) -> None:
        """Clip, check and apply the gradients. What ranks must agree on travels in one collective:
        the scalars, whether to skip (a value not finite on one rank is so in the mean), stop, save and give up."""
        parts, run = self.parts, self.cfg.run
        parts.scaler.unscale_(parts.optimizer)
        norm = parts.strategy.clip_gradients(parts.optimizer, run.max_grad_norm)
        wishes = {
            "_stop": float(self.signals.received is not None),
            "_save": float(self._minutes_are_over()),
            "_end": float(self.saver.failed),
        }
        values = dist.reduce_mean({**sums, "grad_norm": norm, **wishes})
        if values.pop("_end") > 0.0:
            self.saver.end()
        self.stopping = values.pop("_stop") > 0.0
        self.save_wished = values.pop("_save") > 0.0
        finite = math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])
        if finite:
            parts.scaler.step(parts.optimizer)
        scale = parts.scaler.get_scale()
        parts.scaler.update()
        parts.optimizer.zero_grad(set_to_none=True)
        self._count(values, finite, searching=math.isfinite(values["loss"]) and scale > 1.0)

    def _count(self, values: Mapping[str, float], finite: bool, *, searching: bool) -> None:
        """Book a step as done or skipped. searching: fp16's loss scale is coming down, which is no fault."""
        state = self.state
        if finite:
            state.skipped_in_row = 0
            state.means.add(values)
            return
        state.skipped += 1
        state.skipped_in_row += 0 if searching else 1
        if self.log_file is not None:  # the values are those of all ranks
            logger.warning(
                "step %d skipped: loss %s, gradient norm %s",
                state.step + 1,
                values["loss"],
                values["grad_norm"],
            )
            self.log_file.write("skipped", state.step + 1, values)
        if state.skipped_in_row > self.cfg.run.max_skipped:
            raise TrainingError(
                f"{state.skipped_in_row} steps in a row up to step {state.step + 1} had a loss or gradient "
                f"that is not finite (run.max_skipped={self.cfg.run.max_skipped}); last good checkpoint: "
                f"{ckpt.newest(self.run_dir) or 'none yet'}; try a lower run.init_lr, run.max_grad_norm=1.0 or "
                "run.precision=fp32"
            )

    def log(self) -> None:
        """Every log_every steps, and at the first and last, write and show the means since the row before."""
        run, parts, step = self.cfg.run, self.parts, self.state.step
        self.progress.advance(step)
        if not (step == 1 or step % run.log_every == 0 or step == self.max_steps):
            return
        window, self.window = self.window, Window()
        means = self.state.means.take()
        images = window.steps * run.accum_grad_iters * run.batch_size_train * dist.world_size()
        row: dict[str, Any] = {
            "epoch": round(self._epoch(), 4),
            **means,
            "lr": parts.schedule(step - 1),
            "images_per_s": round(images / window.seconds, 2),
            "data_wait": round(window.wait / window.steps, 5),
            "data_wait_share": round(window.wait / window.seconds, 4),
            **self._waits_of_ranks(window),
            "elapsed_s": round(self._elapsed(), 2),
            "skipped": self.state.skipped,
            "bad_images": parts.loader.bad_images,
        }
        if parts.scaler.is_enabled():
            row["grad_scale"] = parts.scaler.get_scale()
        if self.log_file is not None:
            self.log_file.write("train", step, row)
        self.progress.show(row)

    def _waits_of_ranks(self, window: Window) -> dict[str, Any]:
        """How long each rank waits for data a step, and which longest; a warning where the others wait for it."""
        if dist.world_size() == 1:
            return {}
        waits = [wait / window.steps for wait in dist.gather_objects(window.wait)]
        slowest = max(range(len(waits)), key=waits.__getitem__)
        if dist.is_main() and (straggler := straggling(waits, window.seconds / window.steps)):
            logger.warning(straggler)
        return {
            "data_waits": [round(wait, 5) for wait in waits],
            "slowest_data_rank": slowest,
            "slowest_data_wait": round(waits[slowest], 5),
        }

    def _epoch(self) -> float:
        return self.state.step * self.cfg.run.accum_grad_iters / self.parts.loader.batches_per_epoch

    def _elapsed(self) -> float:
        """Wall time of all of the run's parts up to now."""
        return self.state.elapsed_s + time.monotonic() - self._began

    def validate(self) -> None:
        """Evaluate the validation splits, log their metrics, and note them and a new best in the checkpoint."""
        run, state = self.cfg.run, self.state
        self.saver.wait()  # evaluation forks workers, which must not happen in the middle of a write
        with self.parts.strategy.whole(self.parts.wrapped):
            self.results = ev.evaluate_splits(
                self.parts, run.valid_splits, seed=run.seed, final=self.finished, folder=self.run_dir
            )
        if not self.results:
            return
        known, state.evaluated_step = state.evaluated_step == state.step, state.step
        state.metrics = ev.named_metrics(self.results)
        for split in dict.fromkeys(result.split for result in self.results):
            own = {name: value for name, value in state.metrics.items() if name.startswith(f"{split}/")}
            if self.log_file is not None and not known:
                self.log_file.write("eval", state.step, {"split": split, **own})
        value = state.metrics.get(run.best_metric) if run.best_metric else None
        if value is not None and ckpt.is_better(
            value, state.best["value"] if state.best else None, run.best_mode
        ):
            state.best = {
                "metric": run.best_metric,
                "mode": run.best_mode,
                "value": value,
                "step": state.step,
            }
            logger.info("best so far: %s %.4f at step %d", run.best_metric, value, state.step)
        self._keep_evaluation(needed=run.best_metric is not None and value is None)
        if run.best_metric is not None:
            ev.check_best_metric(run.best_metric, state.metrics)

    def _keep_evaluation(self, *, needed: bool) -> None:
        """Add the evaluation to this step's checkpoint; the best step has one, and one where it is `needed`."""
        state = self.state
        best_step = state.best["step"] if state.best else None
        # A run that run.resume continues from elsewhere has its first checkpoint in the other run's folder.
        own = ckpt.step_dir(self.run_dir / ckpt.FOLDER, state.step).resolve()
        if self.saved is not None and self.saved.resolve() == own:
            self.saver.amend(
                state.step, {**state.evaluation(), "elapsed_s": self._elapsed()}, best_step=best_step
            )
        elif needed or best_step == state.step:
            self.save()

    def save(self) -> None:
        """Write this step's checkpoint, or begin to; keep the newest keep_last and the best."""
        state, parts = self.state, self.parts
        self._saved_at = time.monotonic()
        if parts.loader.has_streams:
            ranks = dist.gather_objects(parts.loader.places)
            state.stream_places = {key: tuple(place) for places in ranks for key, place in places.items()}
        state.scaler = parts.scaler.state_dict()
        content = {
            **state.to_dict(),
            "elapsed_s": self._elapsed(),
            "epoch": self._epoch(),
            "batches": state.step * self.cfg.run.accum_grad_iters,
            "max_steps": self.max_steps,
            "versions": resume.versions(),
            "frozen_from": name_from_checkpoint(self.run_dir, parts.model.frozen_from),  # type: ignore[arg-type]
        }
        best_step = state.best["step"] if state.best else None
        self.saved = self.saver.save(state.step, parts.model, parts.optimizer, content, best_step=best_step)

    def _is_due(self, every: int) -> bool:
        """Whether something done every so many steps (0: only at the end) is to be done after this one."""
        if self.stopping and not self.finished:
            return False
        return self.finished or (every > 0 and self.state.step % every == 0)

    def _owes_evaluation(self) -> bool:
        """Whether the run ended after a step whose evaluation was due, and before it: it is made up for first."""
        started, state = self.saved is not None, self.state
        return (
            started
            and not self.finished
            and self._is_due(self.cfg.run.eval_every)
            and (state.evaluated_step != state.step)
        )

    def _save_is_due(self) -> bool:
        return self._is_due(self.cfg.run.save_every) or self.save_wished or self.stopping

    def _minutes_are_over(self) -> bool:
        minutes = self.cfg.run.save_minutes
        return minutes is not None and time.monotonic() - self._saved_at >= 60.0 * minutes

    def _finish(self) -> None:
        """After the loop: report a finished run, or say how to continue a stopped one."""
        if self.finished:
            if not self.results:  # the run was finished before, but not reported
                self.validate()
            self._report()
        else:
            self._say_stopped()

    def _report(self) -> None:
        if not dist.is_main():
            return
        files = {
            "config": self.run_dir / resume.CONFIG_FILE,
            "log": self.run_dir / resume.LOG_FILE,
            "checkpoint": self.saved or self.run_dir / ckpt.FOLDER,
        }
        facts = RunFacts(self.run_dir, self._elapsed(), config=self.cfg.to_yaml(), files=files)
        rows = read_rows(self.run_dir / resume.LOG_FILE)
        said = ev.closing(self.parts, self.results, rows, facts, expected=self.cfg.expected)
        if said.error is None:
            try:
                resume.save_summary(self.cfg, self.state.step, said.lines, self.state.metrics)
            except OSError as error:
                said = replace(said, error=error)
        self._tell(said)

    def _say_stopped(self) -> None:
        received = self.signals.received
        name = "a signal to another process" if received is None else NAMES[received]
        continued = "the same command continues it"
        if self.cfg.run.resume != "auto":
            continued += " with run.resume=auto"
        step, length = self.state.step, self.max_steps
        logger.info("stopped by %s after step %d of %d: %s; %s", name, step, length, self.saved, continued)
        if received == signal.SIGINT:
            raise KeyboardInterrupt

    def evaluate(self) -> dict[str, float]:
        """Evaluate a checkpoint on the test splits; the metrics. Which one: see `to_evaluate`.

        Prints the summary and writes metrics.json and the report to <output_dir>/evaluation/.

        Raises ConfigError, before anything is evaluated, where nothing can be written there.
        """
        dist.init(self.cfg.run.timeout)
        with speaking_once(lambda: "in the evaluation; the same command evaluates again"):
            metrics = self._evaluate()
        dist.shutdown()
        return metrics

    def _evaluate(self) -> dict[str, float]:
        run = self.cfg.run
        source, folder = to_evaluate(self.cfg), self.run_dir / "evaluation"
        if dist.is_main():
            ev.make_folder(folder, source)
        dist.barrier()  # no rank loads a model for nothing
        base = build_for_evaluation(self.cfg, source)
        ev.check_splits(base.datasets, run.test_splits, where="run.test_splits", required=True)
        logger.info("evaluating %s on %s", source, ", ".join(run.test_splits))
        results = ev.evaluate_splits(base, run.test_splits, seed=run.seed, final=True, folder=folder)
        if dist.is_main():
            facts = RunFacts(folder, self._elapsed(), config=self.cfg.to_yaml())
            rows = read_rows(self.run_dir / resume.LOG_FILE)
            self._tell(ev.close_evaluation(base, results, source, rows, facts, expected=self.cfg.expected))
        return ev.named_metrics(results)

    def _tell(self, said: ev.Closing) -> None:
        """Print the closing lines, also where a full disk took no report; that is raised then."""
        self._print(said.lines)
        if said.error is not None:
            raise said.error

    def _print(self, lines: list[str]) -> None:
        if dist.is_main():
            print("\n".join(lines), flush=True)
