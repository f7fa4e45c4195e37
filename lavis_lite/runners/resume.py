"""Where a run starts: anew, at a checkpoint, or nowhere because it is already finished."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import lavis_lite
from lavis_lite.common import checkpoint as ckpt
from lavis_lite.common.config import Config, read_yaml
from lavis_lite.common.errors import CheckpointError, ConfigError
from lavis_lite.common.io import atomic_write
from lavis_lite.common.logging import get_logger
from lavis_lite.common.model_recipe import CONFIG_FILE
from lavis_lite.common.run_config import RunConfig
from lavis_lite.runners.state import TrainState

LOG_FILE, SUMMARY_FILE = "log.jsonl", "summary.json"
# What a checkpoint belongs to. Other settings may change when a run continues: max_steps, for one.
FIXED_SECTIONS = ("model", "datasets", "task")
FIXED_RUN_KEYS = ("seed", "train_split", "batch_size_train", "accum_grad_iters")
# Of run.features, where the run reads stored features.
FIXED_FEATURE_KEYS = ("views", "precision", "seed")
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
)

RUN_DEFAULTS = asdict(RunConfig())

logger = get_logger(__name__)


@dataclass
class StartPoint:
    """checkpoint: where to continue, None for a new run. summary: the closing lines of a finished run."""

    checkpoint: Path | None = None
    state: TrainState = field(default_factory=TrainState)
    summary: list[str] | None = None


def find_start(cfg: Config) -> StartPoint:
    """Decide by run.resume where to start, and leave the run's folder ready for it; for the main process.

    `auto` continues the newest complete checkpoint in output_dir, if there is one. A path continues that
    checkpoint in output_dir (and, called again, what has come of it since). `never` starts anew. Files that
    no longer belong to the run are moved to previous_<n>/, never deleted.

    Raises ConfigError when output_dir can't be made, or the checkpoint in it was made with another model,
    data, task, seed or batch; CheckpointError when run.resume names no checkpoint.
    """
    run_dir = Path(cfg.run.output_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run.output_dir: can't make the folder '{run_dir}': {error.strerror}") from error
    for path in ckpt.clean(run_dir):
        logger.info("removed an incomplete write: %s", path)
    last = ckpt.newest(run_dir)
    if cfg.run.resume == "never":
        if last is not None:
            _set_aside(run_dir, [CONFIG_FILE, LOG_FILE, SUMMARY_FILE, ckpt.FOLDER])
        start = StartPoint()
    elif cfg.run.resume == "auto":
        start = _continue(cfg, last) if last is not None else StartPoint()
    else:
        start = _start_from(cfg, Path(cfg.run.resume).expanduser().resolve(), last)
    start.summary = _finished_summary(cfg, start)
    atomic_write(run_dir / CONFIG_FILE, cfg.to_yaml())
    return start


def _continue(cfg: Config, checkpoint: Path) -> StartPoint:
    saved_file = Path(cfg.run.output_dir) / CONFIG_FILE
    saved = read_yaml(saved_file) if saved_file.is_file() else {}
    changed = differing_keys(_fixed(saved), _fixed(cfg.to_dict())) if saved else []
    if changed:
        raise ConfigError(
            f"'{cfg.run.output_dir}' holds a run that differs in {', '.join(changed)}; use another folder "
            "with run.output_dir=<folder>, or start anew here with run.resume=never (the old run is kept)"
        )
    for key in differing_keys(saved.get("run", {}), cfg.to_dict()["run"]):
        if key not in FREE_RUN_KEYS:
            logger.info(
                "run.%s is now %s (was %s)", key, cfg.to_dict()["run"][key], saved.get("run", {}).get(key)
            )
    return StartPoint(checkpoint, TrainState.from_dict(ckpt.load_state(checkpoint)))


def _start_from(cfg: Config, path: Path, last: Path | None) -> StartPoint:
    if last is not None and ckpt.load_state(last).get("started_from") == str(path):
        return _continue(cfg, last)
    checkpoint = ckpt.newest(path) or path
    if not checkpoint.is_dir():
        raise CheckpointError(
            f"run.resume: '{path}' is no checkpoint folder ({ckpt.STATE} with {ckpt.MODEL} or {ckpt.PARTS}); "
            "to begin with its weights alone set model.pretrained"
        )
    state = TrainState.from_dict(ckpt.load_state(checkpoint))
    state.started_from = str(path)
    run_dir = Path(cfg.run.output_dir)
    if checkpoint.parent == (run_dir / ckpt.FOLDER).resolve():
        newer = [p for step, p in ckpt.list_checkpoints(checkpoint.parent) if step > state.step]
        _set_aside(run_dir, [f"{ckpt.FOLDER}/{p.name}" for p in newer])
        if state.best and not ckpt.step_dir(checkpoint.parent, state.best["step"]).is_dir():
            state.best = None
    else:
        if last is not None:
            _set_aside(run_dir, [CONFIG_FILE, LOG_FILE, SUMMARY_FILE, ckpt.FOLDER])
        state.best = None  # it lies in the other folder
    return StartPoint(checkpoint, state)


def _set_aside(run_dir: Path, names: list[str]) -> None:
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


def _fixed(content: Mapping[str, Any]) -> dict[str, Any]:
    run = content.get("run", {})
    fixed_run = {key: run[key] for key in FIXED_RUN_KEYS if key in run}
    # False also for a run that older versions saved.
    fixed_run["cache_features"] = run.get("cache_features", False)
    if fixed_run["cache_features"]:
        fixed_run["features"] = {key: run["features"][key] for key in FIXED_FEATURE_KEYS}
    return {**{name: content.get(name, {}) for name in FIXED_SECTIONS}, "run": fixed_run}


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
    content = cfg.to_dict()
    run = {key: value for key, value in content["run"].items() if key not in FREE_RUN_KEYS}
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
    same = content.get("step") == start.state.step and _same_run(content.get("fingerprint"), fingerprint(cfg))
    return list(content["lines"]) if same else None


def _same_run(saved: Any, now: str) -> bool:
    """Whether two fingerprints are of one run; a setting that one of them doesn't know has its default there."""
    try:
        contents = [json.loads(text) for text in (saved, now)]
        for content in contents:
            content["run"] = {key: value for key, value in content["run"].items() if _tells(key, value)}
    except (TypeError, ValueError, KeyError, AttributeError):  # another version's idea of a fingerprint
        return False
    return bool(contents[0] == contents[1])


def _tells(key: str, value: Any) -> bool:
    return key not in FREE_RUN_KEYS and value != RUN_DEFAULTS.get(key)
