"""A plan as a table to read, and as plain containers for JSON."""

from __future__ import annotations

from typing import Any

from lavis_lite.runners.planning.account import Plan
from lavis_lite.runners.planning.proposals import Remedy, as_dict

COLUMNS = ("parameters", "optimizer", "gradients", "activations")


def gib(size: float) -> str:
    """Bytes in GiB, small ones with more digits."""
    return f"{size / 2**30:.2f}" if size >= 2**30 / 10 else f"{size / 2**30:.3f}"


def lines_of(plan: Plan, remedy: Remedy | None = None) -> list[str]:
    """The table by part, what fits, and what is proposed."""
    lines = [f"{'GiB at the peak of a step':28}" + "".join(f"{name:>13}" for name in (*COLUMNS, "all"))]
    for part in plan.parts:
        numbers = [getattr(part, name) for name in COLUMNS]
        state = "" if not part.numbers else ", trained" if part.trained else ", frozen"
        label = f"{part.name}{state}" + (f" ({part.numbers / 1e6:,.0f}M)" if part.numbers >= 1e6 else "")
        lines.append(f"{label:28}" + "".join(f"{gib(size):>13}" for size in (*numbers, sum(numbers))))
    for label, size in (
        ("copies of weights (autocast)", plan.copies),
        ("passing results of backward", plan.temporaries),
        ("blocks gathered from shards", plan.gathered),
        ("gaps of the allocator", plan.gaps),
        ("process without tensors", plan.runtime),
    ):
        if size:
            lines.append(f"{label:28}" + " " * 13 * len(COLUMNS) + f"{gib(size):>13}")
    lines.append(f"{'all':28}" + " " * 13 * len(COLUMNS) + f"{gib(plan.total):>13}")
    return [*lines, "", _verdict(plan), *(_proposed(remedy) if remedy is not None else [])]


def _verdict(plan: Plan) -> str:
    settings = f"batch {plan.batch} in {plan.precision} with strategy {plan.strategy}"
    if plan.limit is None:
        return f"{settings}: {gib(plan.total)} GiB a process"
    word = "fits" if plan.fits else "does not fit"
    verdict = f"{settings} {word} {gib(plan.limit)} GiB a process: {gib(plan.total)} GiB"
    if plan.largest_batch is None:
        return verdict
    return verdict + (
        f"; largest batch that fits: {plan.largest_batch}" if plan.largest_batch else "; no batch fits"
    )


def _proposed(remedy: Remedy) -> list[str]:
    lines = ["", "what would save memory, each alone:"]
    for proposal in remedy.proposals:
        lines.append(f"  {' '.join(proposal.options):52} {gib(proposal.saves):>7} GiB  {proposal.why}")
    if not remedy.proposals:
        lines.append("  nothing that this configuration has not chosen already")
    if remedy.together:
        word = "fits" if remedy.plan.fits else "does not fit even"
        lines.append(f"{word} with --options {' '.join(remedy.together)}: {gib(remedy.plan.total)} GiB")
    return lines


def dict_of(plan: Plan, remedy: Remedy | None = None) -> dict[str, Any]:
    """Bytes throughout."""
    result = {name: value for name, value in vars(plan).items() if name != "parts"}
    result |= {"total": plan.total, "fits": plan.fits, "parts": [vars(part) for part in plan.parts]}
    return result if remedy is None else {**result, "remedy": as_dict(remedy)}
