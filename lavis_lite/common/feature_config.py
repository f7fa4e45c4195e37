"""The `run.features` section: what a run with `run.cache_features` stores of its frozen image encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lavis_lite.common.errors import ConfigError
from lavis_lite.common.sizes import parse_bytes


@dataclass(frozen=True)
class FeatureConfig:
    """Stored features; see docs/cached_features.md.

    views: augmented views of each picture, one of which is drawn whenever the picture is read.
    precision: of the stored numbers; int8 with a scale for each token.
    seed: of the views; not run.seed, so that runs with other seeds share what is stored.
    folder: where they lie; by default `features` in the cache folder.
    max_bytes: the disk space they may take, such as 20GB; without it a terminal is asked, and nothing else is.
    evaluation: also store one view of the validation splits' pictures.
    """

    views: int = 4
    precision: Literal["bf16", "fp16", "int8"] = "bf16"
    seed: int = 0
    folder: str | None = None
    max_bytes: int | str | None = None
    evaluation: bool = False

    def __post_init__(self) -> None:
        if self.views < 1:
            raise ConfigError(f"run.features.views must be at least 1, got {self.views}")
        try:
            parse_bytes(0 if self.max_bytes is None else self.max_bytes)
        except ValueError as error:
            raise ConfigError(f"run.features.max_bytes: {error}") from error

    @property
    def limit(self) -> int | None:
        """The disk space in bytes that the features may take; None where nothing is said."""
        return None if self.max_bytes is None else parse_bytes(self.max_bytes)
