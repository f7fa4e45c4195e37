"""Published numbers beside measured ones: the `expected:` section of a project file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lavis_lite.common.errors import ConfigError, closest


@dataclass(frozen=True)
class Expected:
    """What somebody else measured.

    source: where it is written, such as "BLIP-2, table 2".
    metrics: values by the names of metrics.json, such as `test/accuracy`, on the scale used there (0.525, not 52.5).

    Raises ConfigError without any.
    """

    source: str
    metrics: Mapping[str, float]

    def __post_init__(self) -> None:
        if not self.metrics:
            raise ConfigError("expected.metrics: give at least one, such as {test/accuracy: 0.525}")

    def rows(self, measured: Mapping[str, float]) -> tuple[list[str], list[list[str]]]:
        """Header and a row for each metric: expected, measured ("-" where it was not) and the difference."""
        header = [f"expected ({self.source})", "expected", "measured", "difference"]
        rows = []
        for name, value in self.metrics.items():
            if name in measured:
                rows.append([name, f"{value:.4f}", f"{measured[name]:.4f}", f"{measured[name] - value:+.4f}"])
            else:
                hint = closest(name, measured)
                rows.append([f"{name} (not measured{f'; {hint}' if hint else ''})", f"{value:.4f}", "-", "-"])
        return header, rows
