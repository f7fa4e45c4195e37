"""One process: the model as it is."""

from __future__ import annotations

from lavis_lite.common.registry import registry
from lavis_lite.parallel.base import Strategy


@registry.register_strategy("single")
class SingleStrategy(Strategy):
    """Trains the model itself."""
