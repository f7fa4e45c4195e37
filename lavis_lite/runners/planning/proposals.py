"""What would make a run fit: settings of its configuration, each with what it saves on its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lavis_lite.common.config import Config
from lavis_lite.common.errors import ConfigError
from lavis_lite.parallel.base import CUTTING, is_quantized
from lavis_lite.runners.features import check_storable
from lavis_lite.runners.planning.account import Plan, Planner, Target
from lavis_lite.runners.planning.sharding import SHARDINGS

Load = Callable[[Sequence[str]], Config]


@dataclass(frozen=True)
class Proposal:
    """options: as for --options. saves: bytes a process, this setting alone. why: what is given for it."""

    options: tuple[str, ...]
    saves: int
    why: str


@dataclass(frozen=True)
class Remedy:
    """Proposals that together make the run fit (or do the most there is), and the plan with all of them."""

    proposals: tuple[Proposal, ...]
    together: tuple[str, ...]
    plan: Plan


@dataclass(frozen=True)
class _Setting:
    options: tuple[str, ...]
    why: str
    target: Callable[[Target], Target] = lambda target: target

    @property
    def keys(self) -> list[str]:
        """What it sets."""
        return [option.partition("=")[0] for option in self.options]


def propose(load: Load, planner: Planner, plan: Plan) -> Remedy:
    """Settings that save memory, cheapest first, and those of them without any of which the run would not fit.

    Args:
        load: gives the configuration with more options laid over it.
    """
    found = []
    for setting in _settings(planner):
        changed = _planner(load, planner, [setting]).plan(plan.batch)
        if changed.total < plan.total:
            found.append((setting, Proposal(setting.options, plan.total - changed.total, setting.why)))
    taken: list[_Setting] = []
    best = plan
    for setting, _ in found:
        if best.fits:
            break
        if _exclude_each_other([*taken, setting]):
            continue
        taken = [*(one for one in taken if one.keys != setting.keys), setting]
        best = _planner(load, planner, taken).plan(plan.batch)
    proposals = [proposal for _, proposal in found]
    in_parts: tuple[str, ...] = ()
    if not best.fits:
        smaller = _smaller_batch(_planner(load, planner, taken), plan)
        if smaller is not None:
            proposal, best = smaller
            proposals.append(proposal)
            in_parts = proposal.options
    for setting in reversed(taken if best.fits else []):  # the dearest first
        fewer = [one for one in taken if one is not setting]
        without = _planner(load, planner, fewer).plan(best.batch)
        if without.fits:
            taken, best = fewer, without
    together = [option for setting in taken for option in setting.options]
    return Remedy(tuple(proposals), (*together, *in_parts), best)


def _settings(planner: Planner) -> Iterator[_Setting]:
    """What this configuration has not chosen yet, in the order of what it costs."""
    cfg, target = planner.cfg, planner.target
    model = cfg.model
    encoder, llm = model["vision_encoder"], model.get("language_model")
    low = "bf16"
    if target.precision == "fp32":
        yield _Setting(
            (f"run.precision={low}",), "arithmetic in 16 bits", lambda t: replace(t, precision=low)
        )
    if encoder.get("freeze", True) and encoder.get("precision", "fp32") in ("fp32", "auto"):
        yield _Setting((f"model.vision_encoder.precision={low}",), "frozen weights in 16 bits")
    if llm and llm.get("precision", "auto") in ("fp32", "auto"):
        yield _Setting((f"model.language_model.precision={low}",), "frozen weights in 16 bits")
    # Options belong to the strategy they were written for, and --options can't take a mapping's keys away.
    if target.world_size > 1 and not is_quantized(model) and not cfg.run.strategy_options:
        for name in ("fairscale", "fsdp2"):
            if _saves_more(name, planner.strategy):
                yield _Setting(
                    (f"run.strategy={name}",),
                    "weights and optimiser spread over the processes, which exchange more",
                    lambda t, name=name: replace(t, strategy=name),  # type: ignore[misc]
                )
    if not encoder.get("freeze", True) and not encoder.get("grad_checkpointing"):
        yield _Setting(
            ("model.vision_encoder.grad_checkpointing=true",),
            "its forward is computed twice (+33% of its time)",
        )
    if llm and not llm.get("grad_checkpointing"):
        yield _Setting(
            ("model.language_model.grad_checkpointing=true",),
            "its forward is computed twice (+50% of its time)",
        )
    can_quantize = target.device_type == "cuda" and target.strategy not in CUTTING
    if llm and not is_quantized(model) and can_quantize:
        yield _Setting(
            ("model.language_model.quantize=int8",), "the language model in 8 bits (extra `quantize`)"
        )
    if not target.stored_features and _can_store_features(cfg):
        yield _Setting(
            ("run.cache_features=true",),
            "the frozen encoder's features are read from disk",
            lambda t: replace(t, stored_features=True),
        )


def _can_store_features(cfg: Config) -> bool:
    try:
        check_storable(cfg)
    except ConfigError:
        return False
    return True


def _exclude_each_other(settings: Sequence[_Setting]) -> bool:
    """What is quantized can't be sharded."""
    options = " ".join(option for setting in settings for option in setting.options)
    return "run.strategy=" in options and "quantize=" in options


def _saves_more(name: str, than: str) -> bool:
    order = list(SHARDINGS)
    return order.index(name) > order.index(than)


def _planner(load: Load, planner: Planner, settings: Sequence[_Setting]) -> Planner:
    target = planner.target
    options: list[str] = []
    for setting in settings:
        target = setting.target(target)
        options += setting.options
    same_shapes = target.stored_features == planner.target.stored_features
    if same_shapes and all(option.startswith("run.strategy") for option in options):
        return planner.for_strategy(target.strategy)
    return Planner(load(options), target)


def _smaller_batch(planner: Planner, plan: Plan) -> tuple[Proposal, Plan] | None:
    """The largest part of the batch that divides it and fits, accumulated to the same; None if even one doesn't.

    Accumulated gradients are there all the time: where no part fits for them, a part alone is proposed.
    """
    run = planner.cfg.run
    whole = planner.plan(plan.batch).total
    counts = [parts for parts in range(2, plan.batch + 1) if plan.batch % parts == 0]
    for parts in counts:
        accumulated = parts * run.accum_grad_iters
        smaller = planner.accumulating(accumulated).plan(plan.batch // parts)
        if smaller.fits:
            options = (f"run.batch_size_train={smaller.batch}", f"run.accum_grad_iters={accumulated}")
            why = "the same batch in parts"
            if not planner.cfg.model.get("language_model"):
                why += "; the contrastive loss then sees fewer negatives"
            return Proposal(options, whole - smaller.total, why), smaller
    for parts in counts:
        smaller = planner.plan(plan.batch // parts)
        if smaller.fits:
            why = f"a smaller batch; {parts} times as many processes make it the same"
            return Proposal((f"run.batch_size_train={smaller.batch}",), whole - smaller.total, why), smaller
    return None


def as_dict(remedy: Remedy) -> dict[str, Any]:
    """For JSON."""
    return {
        "proposals": [vars(proposal) for proposal in remedy.proposals],
        "together": list(remedy.together),
        "fits": remedy.plan.fits,
        "total": remedy.plan.total,
    }
