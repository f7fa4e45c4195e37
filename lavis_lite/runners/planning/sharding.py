"""What each strategy, with its options, leaves on a process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from lavis_lite.common.binding import bind
from lavis_lite.common.registry import registry


@dataclass(frozen=True)
class Sharding:
    """What a strategy leaves on every process its share of.

    weights: none; frozen_blocks, those of an encoder without gradients that fairscale can flatten (on CUDA alone); all,
        whose blocks are whole while they run and whose rest is whole from the forward's beginning to the backward's end
        (parallel/fsdp2.py).
    optimizer: its state, and gradients once they are exchanged. buckets: of gradients, which stay.
    offloaded: those shares are in the machine's own memory. recomputed: blocks keep no activations.
    """

    weights: Literal["none", "frozen_blocks", "all"] = "none"
    optimizer: bool = False
    buckets: bool = False
    offloaded: bool = False
    recomputed: bool = False

    def share(self, world_size: int) -> float:
        """The fraction of what is shared out that a process has on its device."""
        return 0.0 if self.offloaded else 1 / world_size


SHARDINGS = {
    "single": Sharding(),
    "ddp": Sharding(buckets=True),
    # Frozen blocks by its FullyShardedDataParallel, the trained part by OSS and ShardedDataParallel.
    "fairscale": Sharding(weights="frozen_blocks", optimizer=True),
    "fsdp2": Sharding(weights="all", optimizer=True),
}


def sharding_of(name: str, options: Mapping[str, Any], device_type: str) -> Sharding:
    """What a strategy leaves with `run.strategy_options`; ConfigError for those it hasn't."""
    given = bind(registry.get_strategy_class(name), options, where="run.strategy_options")
    # On a CPU the machine's own memory is the device's.
    offloaded = bool(given.get("cpu_offload")) and device_type != "cpu"
    return replace(SHARDINGS[name], offloaded=offloaded, recomputed=bool(given.get("checkpoint_blocks")))
