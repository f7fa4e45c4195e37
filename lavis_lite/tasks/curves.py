"""Curves of a run from its log: losses, learning rate and held-out metrics over optimiser steps."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

TITLES = {
    "loss": "Loss (sum)",
    "loss_itc": "Contrastive loss, ITC",
    "loss_itm": "Matching loss, ITM",
    "loss_itg": "Generation loss, ITG",
    "itm_acc": "Matching accuracy, ITM",
    "lr": "Learning rate",
}
LEGENDS = {
    "itc/tr_r1": "TR@1 by ITC",
    "itc/ir_r1": "IR@1 by ITC",
    "rerank/tr_r1": "TR@1 re-ranked",
    "rerank/ir_r1": "IR@1 re-ranked",
}
# Okabe and Ito's colours: told apart by colour-blind readers, on white and on black.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
MAX_SCORES = 6


@dataclass
class Series:
    """Points by step; a step logged twice (a run that was resumed) counts as it was logged last."""

    points: dict[int, float] = field(default_factory=dict)

    def xy(self) -> tuple[list[int], list[float]]:
        """Steps in order, and their values."""
        steps = sorted(self.points)
        return steps, [self.points[step] for step in steps]


@dataclass
class Panel:
    """One plot: lines of training, and lines with markers of held-out metrics, by label."""

    title: str
    training: dict[str, Series] = field(default_factory=dict)
    held_out: dict[str, Series] = field(default_factory=dict)
    unit_range: bool = False


def panels(log_rows: Iterable[Mapping[str, Any]]) -> list[Panel]:
    """What there is to plot: a panel per training loss and accuracy, recalls, other scores, the rate."""
    rows = list(log_rows)
    train = _series(row for row in rows if row.get("kind") == "train")
    held_out = _held_out(rows)
    result = []
    order = [*TITLES, *sorted(set(train) - set(TITLES))]
    for name in [n for n in order if n in train and (n.startswith("loss") or n.endswith("_acc"))]:
        panel = Panel(TITLES.get(name, name), {"training": train[name]}, unit_range=name.endswith("_acc"))
        panel.held_out = {f"held out ({split})": by[name] for split, by in held_out.items() if name in by}
        result.append(panel)
    recalls = _labelled(held_out, LEGENDS, LEGENDS)
    if recalls:
        result.append(Panel("Held-out retrieval", held_out=recalls, unit_range=True))
    others = [name for by in held_out.values() for name in by if _is_other_score(name, train)]
    if others:
        scores = _labelled(held_out, list(dict.fromkeys(others))[:MAX_SCORES], {})
        result.append(Panel("Held-out scores", held_out=scores))
    if "lr" in train:
        result.append(Panel(TITLES["lr"], {"learning rate": train["lr"]}))
    return result


def _series(rows: Iterable[Mapping[str, Any]]) -> dict[str, Series]:
    result: dict[str, Series] = {}
    for row in rows:
        for name, value in row.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if number and math.isfinite(value) and isinstance(row.get("step"), int):
                result.setdefault(name, Series()).points[row["step"]] = float(value)
    return result


def _held_out(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Series]]:
    """Metrics by split, without the split in their names."""
    evals = [row for row in rows if row.get("kind") == "eval"]
    result: dict[str, dict[str, Series]] = {}
    for split in dict.fromkeys(str(row.get("split", "")) for row in evals):
        series = _series(row for row in evals if str(row.get("split", "")) == split)
        result[split] = {name.removeprefix(f"{split}/"): by for name, by in series.items() if name != "step"}
    return result


def _is_other_score(name: str, train: Mapping[str, Series]) -> bool:
    counts = name.startswith(("num_", "unreadable", "chance", "itc/", "rerank", "loss")) or name.endswith(
        "_rank"
    )
    return not counts and name not in train and name not in ("epoch", "wall_time", "seconds")


def _labelled(
    held_out: Mapping[str, Mapping[str, Series]], names: Iterable[str], labels: Mapping[str, str]
) -> dict[str, Series]:
    wanted = list(names)
    return {
        labels.get(name, name) + (f" ({split})" if len(held_out) > 1 else ""): by[name]
        for split, by in held_out.items()
        for name in wanted
        if name in by
    }


def draw(log_rows: Sequence[Mapping[str, Any]], *, dark: bool = False) -> bytes:
    """PNG bytes of all panels, three to a row; of a note where nothing is logged yet."""
    ink, paper, grid = ("#e6e6e6", "#16191d", "#3a3f45") if dark else ("#222222", "#ffffff", "#dddddd")
    shown = panels(log_rows)
    columns = min(3 if len(shown) < 7 else 4, max(1, len(shown)))
    last_step = max((row["step"] for row in log_rows if isinstance(row.get("step"), int)), default=1)
    lines = math.ceil(max(1, len(shown)) / columns)
    figure = Figure(figsize=(4.3 * columns, 3.1 * lines), dpi=120, layout="constrained", facecolor=paper)
    if not shown:
        figure.text(0.5, 0.5, "no step logged yet", ha="center", va="center", color=ink, fontsize=12)
    for number, panel in enumerate(shown):
        axes = figure.add_subplot(lines, columns, number + 1, facecolor=paper)
        _draw_panel(axes, panel, ink=ink, paper=paper, grid=grid)
        axes.set_xlim(-0.02 * last_step, 1.03 * last_step)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=paper)
    return buffer.getvalue()


def _draw_panel(axes: Axes, panel: Panel, *, ink: str, paper: str, grid: str) -> None:
    # Blue and sky blue change places where the page is dark.
    colours = iter((COLOURS if paper == "#ffffff" else COLOURS[5:6] + COLOURS[1:5] + COLOURS[:1]) * 3)
    for label, series in panel.training.items():
        steps, values = series.xy()
        colour = next(colours)
        smooth = [] if panel.title == TITLES["lr"] else smoothed(values)
        axes.plot(
            steps,
            values,
            color=colour,
            linewidth=0.9,
            alpha=0.35 if smooth else 1.0,
            label=None if smooth else label,
        )
        if smooth:
            axes.plot(steps, smooth, color=colour, linewidth=1.7, label=label)
    for (label, series), marker in zip(panel.held_out.items(), "osD^v<>ph*" * 3, strict=False):
        steps, values = series.xy()
        axes.plot(
            steps, values, color=next(colours), marker=marker, markersize=4.5, linewidth=1.3, label=label
        )
    axes.set_title(panel.title, color=ink, fontsize=11, loc="left")
    axes.set_xlabel("step", color=ink, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.tick_params(colors=ink, labelsize=9)
    axes.grid(color=grid, linewidth=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(ink)
    if panel.unit_range:
        axes.set_ylim(-0.02, 1.04)
    if panel.title == TITLES["lr"]:
        axes.yaxis.set_major_formatter("{x:g}")
        return
    legend = axes.legend(fontsize=8, facecolor=paper, edgecolor="none", labelcolor=ink, framealpha=0.8)
    legend.set_zorder(5)


def smoothed(values: Sequence[float]) -> list[float]:
    """A centred moving mean over a twentieth of the points; empty for fewer than 20, which need none."""
    reach = len(values) // 40
    if len(values) < 20 or reach == 0:
        return []
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    windows = [(max(0, at - reach), min(len(values), at + reach + 1)) for at in range(len(values))]
    return [(sums[end] - sums[start]) / (end - start) for start, end in windows]
