"""The lines a run prints at its end: plain aligned text that reads the same in a terminal and in a log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lavis_lite.tasks.rerank import FORMS

RECALLS = ("tr_r1", "tr_r5", "tr_r10", "ir_r1", "ir_r5", "ir_r10")
MEAN_RANKS = ("tr_mean_rank", "ir_mean_rank")


def table_lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns padded to their widest cell, the first to the left and the others to the right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        return "  ".join([row[0].ljust(len(first)), *others]).rstrip()

    return [line(header), "-" * len(line(["-" * width for width in widths])), *(line(row) for row in rows)]


def retrieval_table(metrics: Mapping[str, float]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of recalls and mean ranks before and after re-ranking, in each form, and by chance; '-' where not
    measured."""
    header = ["retrieval", *(name.upper().replace("_R", "@") for name in RECALLS), "TR rank", "IR rank"]
    forms = {f"rerank_{form}/": f"  as form {form}" for form in FORMS}
    names = {"itc/": "by ITC", "rerank/": "re-ranked by ITM", **forms, "chance_": "chance"}
    rows = [
        [
            label,
            *(_number(metrics.get(prefix + name), 3) for name in RECALLS),
            *(_number(metrics.get(prefix + name), 1) for name in MEAN_RANKS),
        ]
        for prefix, label in names.items()
        if any(prefix + name in metrics for name in RECALLS)
    ]
    return header, rows


def loss_table(metrics: Mapping[str, float]) -> tuple[list[str], list[list[str]]]:
    """Header and one row of held-out losses and ITM accuracy; empty rows when none was measured."""
    names = {
        "loss": "loss", "loss_itc": "ITC", "loss_itm": "ITM", "loss_itg": "ITG", "itm_acc": "ITM accuracy"
    }  # fmt: skip
    known = [name for name in names if name in metrics]
    row = ["sum of losses" if name == "loss" else names[name] for name in known]
    return ["held out", *row], [["mean", *(f"{metrics[name]:.3f}" for name in known)]] if known else []


def tail_lines(wall_time: float | None, files: Mapping[str, Path]) -> list[str]:
    """Wall time and where the run's files are."""
    lines = [f"wall time  {duration(wall_time)}"] if wall_time is not None else []
    width = max((len(label) for label in files), default=0)
    return lines + [f"{label.ljust(width)}  {path}" for label, path in files.items()]


def duration(seconds: float) -> str:
    """Seconds as people say them: `42 s`, `5 min 7 s`, `3 h 20 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _number(value: float | None, places: int) -> str:
    return "-" if value is None else f"{value:.{places}f}"
