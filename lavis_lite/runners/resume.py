"""Where a run starts: anew, at a checkpoint, or nowhere because it is already finished."""

from __future__ import annotations

import contextlib
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import lavis_lite
from lavis_lite.common import checkpoint as ckpt
from lavis_lite.common import dist
from lavis_lite.common.config import Config, read_yaml
from lavis_lite.common.errors import CheckpointError, ConfigError, TrainingError
from lavis_lite.common.io import atomic_write
from lavis_lite.common.local_paths import absolute_paths, as_moved, with_absolute_paths
from lavis_lite.common.locks import GRACE_SECONDS, held
from lavis_lite.common.logging import get_logger
from lavis_lite.common.model_recipe import CONFIG_FILE, enclosing_run
from lavis_lite.common.run_config import RunConfig
from lavis_lite.runners.state import TrainState

LOG_FILE, SUMMARY_FILE, LOCK_FILE = "log.jsonl", "summary.json", ".lock"
RUN_FILES = (CONFIG_FILE, LOG_FILE, SUMMARY_FILE, ckpt.FOLDER)
# What a checkpoint belongs to. Other settings may change when a run continues: max_steps, for one.
FIXED_SECTIONS = ("model", "datasets", "task")
FIXED_RUN_KEYS = ("seed", "train_split", "batch_size_train", "accum_grad_iters")
# Where the run reads stored features.
FIXED_FEATURE_KEYS = ("features.views", "features.precision", "features.seed")
# What changes neither weights nor results, so a finished run stays finished.
FREE_RUN_KEYS = (
    "resume",
    "output_dir",
    "device",
    "num_threads",
    "num_workers",
    "tensorboard",
    "runner",
    "keep_last",
    "save_format",
    "save_async",
    "timeout",
    "allow_changed_data",
    "features.folder",
    "features.max_bytes",
)

logger = get_logger(__name__)


@dataclass
class StartPoint:
    """checkpoint: where to continue, None for a new run. summary: the closing lines of a finished run."""

    checkpoint: Path | None = None
    state: TrainState = field(default_factory=TrainState)
    summary: list[str] | None = None


@contextlib.contextmanager
def alone(cfg: Config) -> Iterator[None]:
    """Make the run's folder, and let no other process train in it within the block; for the main process.

    Raises ConfigError when the folder can't be made, TrainingError while another process trains there.
    """
    run_dir = Path(cfg.run.output_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run.output_dir: can't make the folder '{run_dir}': {error.strerror}") from error
    # A loader's workers outlive a killed process by seconds, and write nothing.
    with held(
        run_dir / LOCK_FILE,
        what=f"trains in '{run_dir}'",
        refused=lambda busy: TrainingError(f"{busy}: wait for it to end, or set another run.output_dir"),
        wait=GRACE_SECONDS,
        with_children=False,
    ):
        yield


def find_start(cfg: Config) -> StartPoint:
    """Decide by run.resume where to start, and leave the run's folder ready for it; within `alone`.

    `auto` continues the newest complete checkpoint in output_dir, if there is one. A path continues that
    checkpoint in output_dir (and, called again, what has come of it since). `never` starts anew. Files that
    no longer belong to the run are moved to previous_<n>/, never deleted.

    Raises ConfigError when the checkpoint in output_dir was made with another model, data, task, seed or batch;
    CheckpointError when run.resume names no checkpoint.
    """
    run_dir = Path(cfg.run.output_dir)
    for path in ckpt.clean(run_dir):
        logger.info("removed an incomplete write: %s", path)
    last = ckpt.newest(run_dir)
    if cfg.run.resume == "never":
        if last is not None:
            _set_aside(run_dir, RUN_FILES)
        start = StartPoint()
    elif cfg.run.resume == "auto":
        start = _continue(cfg, last) if last is not None else StartPoint()
    else:
        start = _start_from(cfg, Path(cfg.run.resume).expanduser().resolve(), last)
    start.summary = _finished_summary(cfg, start)
    atomic_write(run_dir / CONFIG_FILE, with_absolute_paths(cfg).to_yaml())
    return start


def _continue(cfg: Config, checkpoint: Path) -> StartPoint:
    saved = _saved_config(Path(cfg.run.output_dir))
    changed = _changed(saved, cfg)
    if changed:
        raise ConfigError(
            f"'{cfg.run.output_dir}' holds a run that differs in {', '.join(changed)}; use another folder "
            "with run.output_dir=<folder>, or start anew here with run.resume=never (the old run is kept)"
        )
    before, now = _leaves(saved.get("run")), _leaves(cfg.to_dict()["run"])
    for key in differing_keys(before, now) if saved else []:
        if key not in FREE_RUN_KEYS:
            logger.info("run.%s is now %s (was %s)", key, now.get(key, "unset"), before.get(key, "unset"))
    state = _state_of(checkpoint)
    _forget_other_best(cfg, state)
    return StartPoint(checkpoint, state)


def _start_from(cfg: Config, path: Path, last: Path | None) -> StartPoint:
    if last is not None and ckpt.load_state(last).get("started_from") == str(path):
        return _continue(cfg, last)
    checkpoint = ckpt.newest(path) or path
    if not checkpoint.is_dir():
        raise CheckpointError(
            f"run.resume: '{path}' is no checkpoint folder ({ckpt.STATE} with {ckpt.MODEL} or {ckpt.PARTS}); "
            "to begin with its weights alone set model.pretrained"
        )
    state = _state_of(checkpoint)
    state.started_from = str(path)
    _warn_of_other_run(cfg, checkpoint)
    run_dir = Path(cfg.run.output_dir)
    if checkpoint.parent == (run_dir / ckpt.FOLDER).resolve():
        newer = [p for step, p in ckpt.list_checkpoints(checkpoint.parent) if step > state.step]
        _set_aside(run_dir, [f"{ckpt.FOLDER}/{p.name}" for p in newer])
        if state.best and not ckpt.step_dir(checkpoint.parent, state.best["step"]).is_dir():
            state.best = None
    else:
        if last is not None:
            _set_aside(run_dir, RUN_FILES)
        state.best = None  # it lies in the other folder
    _forget_other_best(cfg, state)
    return StartPoint(checkpoint, state)


def _state_of(checkpoint: Path) -> TrainState:
    """The state of a checkpoint; CheckpointError for one that isn't as this version understands it."""
    content = ckpt.load_state(checkpoint)
    try:
        return TrainState.from_dict(content)
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"'{checkpoint / ckpt.STATE}' is not as training writes it ({error}); begin with the checkpoint's weights "
            "by model.pretrained, or continue an earlier one by run.resume"
        ) from error


def _forget_other_best(cfg: Config, state: TrainState) -> None:
    """A best by another metric says nothing about what comes now."""
    run, best = cfg.run, state.best
    if best is None or run.best_metric is None:
        return
    # Older checkpoints don't tell the mode.
    if (best.get("metric"), best.get("mode", run.best_mode)) != (run.best_metric, run.best_mode):
        logger.info(
            "step %s was the best by %s; which is the best by %s is found out from now on",
            *(best.get("step"), best.get("metric"), run.best_metric),
        )
        state.best = None


def _warn_of_other_run(cfg: Config, checkpoint: Path) -> None:
    """Say in what a run differs whose checkpoint `run.resume` names: that is its user's business."""
    folder = enclosing_run(checkpoint)
    changed = _changed(_saved_config(folder), cfg) if folder is not None else []
    if changed:
        logger.warning(
            "run.resume: the run in '%s' differs in %s; its optimiser, step and place in the data are taken over "
            "all the same (model.pretrained takes weights alone)",
            *(folder, ", ".join(changed)),
        )


def warn_of_changes(state: TrainState, max_steps: int, *, streams: bool) -> None:
    """Say what is odd about where a run goes on: beyond its length, or with another number of processes."""
    if not dist.is_main():
        return
    if state.step > max_steps:
        logger.warning("the run is %d steps beyond its length of %d", state.step - max_steps, max_steps)
    before, now = state.world_size, dist.world_size()
    if before != now:
        # The n-th batch of another size is elsewhere in an epoch.
        order = "some samples of an epoch are left out" if now > before else "some samples come once more"
        more = "; streams go on with the shards that are left" if streams else ""
        logger.warning(
            "the run had %d processes and now has %d: its global batch changes, and as it goes on at the same "
            "number of batches, %s%s",
            *(before, now, order, more),
        )


def _set_aside(run_dir: Path, names: Sequence[str]) -> None:
    """Move files of a run that is superseded to the next free previous_<n>/ beside them."""
    present = [name for name in names if (run_dir / name).exists()]
    if not present:
        return
    number = 1
    while (run_dir / f"previous_{number}").exists():
        number += 1
    target = run_dir / f"previous_{number}"
    for name in present:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (run_dir / name).rename(target / name)
    logger.info("moved %s of an earlier run to %s", ", ".join(present), target)


def _saved_config(run_dir: Path) -> dict[str, Any]:
    """What a run's folder says that it was; empty where it says nothing."""
    file = run_dir / CONFIG_FILE
    return read_yaml(file) if file.is_file() else {}


def _changed(saved: Mapping[str, Any], cfg: Config) -> list[str]:
    """What of a configuration can't be another when a run continues and is; nothing where nothing is known."""
    if not saved:
        return []
    moved = {**saved, "model": as_moved(saved.get("model"), cfg.model)}
    return differing_keys(_fixed(moved), _fixed(cfg.to_dict()))


def _fixed(content: Mapping[str, Any]) -> dict[str, Any]:
    # Settings that older versions didn't save, or a person took out, have their defaults.
    run = {**_leaves(asdict(RunConfig())), **_leaves(content.get("run"))}
    keys = (*FIXED_RUN_KEYS, "cache_features", *(FIXED_FEATURE_KEYS if run["cache_features"] else ()))
    sections = {name: content.get(name) or {} for name in FIXED_SECTIONS}
    sections["model"] = absolute_paths(sections["model"], existing=False)
    return {**sections, "run": {key: run[key] for key in keys}}


def _leaves(section: Any, prefix: str = "") -> dict[str, Any]:
    """The values of nested mappings by their dotted names; of what is no mapping none."""
    found: dict[str, Any] = {}
    for key, value in section.items() if isinstance(section, Mapping) else ():
        found.update(
            _leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
        )
    return found


def differing_keys(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Dotted paths of the leaves in which two nested mappings differ; a key that only one has counts."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = [*old, *(key for key in new if key not in old)]
        missing = object()
        return [
            path
            for key in keys
            for path in differing_keys(old.get(key, missing), new.get(key, missing), f"{prefix}{key}.")
        ]
    return [] if old == new else [prefix.rstrip(".")]


def fingerprint(cfg: Config) -> str:
    """The configuration, without what changes neither weights nor results, as canonical text."""
    content = with_absolute_paths(cfg).to_dict()
    run = {key: value for key, value in _leaves(content["run"]).items() if key not in FREE_RUN_KEYS}
    return json.dumps({**content, "run": run}, sort_keys=True, default=str)


def versions() -> dict[str, str]:
    """Versions that a checkpoint's numbers may depend on."""
    return {
        "lavis_lite": lavis_lite.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def save_summary(cfg: Config, step: int, lines: list[str], metrics: Mapping[str, float]) -> None:
    """Keep a finished run's closing lines, so that the same command again only prints them."""
    content = {"step": step, "metrics": dict(metrics), "lines": lines, "fingerprint": fingerprint(cfg)}
    atomic_write(Path(cfg.run.output_dir) / SUMMARY_FILE, json.dumps(content, indent=1) + "\n")


def _finished_summary(cfg: Config, start: StartPoint) -> list[str] | None:
    path = Path(cfg.run.output_dir) / SUMMARY_FILE
    if start.checkpoint is None or not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
    except ValueError:
        return None
    same = content.get("step") == start.state.step and _same_run(content.get("fingerprint"), cfg)
    return list(content["lines"]) if same else None


def _same_run(saved: Any, cfg: Config) -> bool:
    """Whether a fingerprint is of this run; a setting that it doesn't know has its default there."""
    try:
        contents = [json.loads(text) for text in (saved, fingerprint(cfg))]
        contents[0]["model"] = as_moved(contents[0]["model"], cfg.model)
        defaults = _leaves(asdict(RunConfig()))
        for content in contents:
            run = _leaves(content["run"])
            content["model"] = absolute_paths(content["model"], existing=False)
            content["run"] = {
                key: value
                for key, value in run.items()
                if key not in FREE_RUN_KEYS and value != defaults.get(key)
            }
    except (TypeError, ValueError, KeyError, AttributeError):  # another version's idea of a fingerprint
        return False
    return bool(contents[0] == contents[1])
