"""What a run holds in memory, part by part and process by process, and the largest batch for which it fits."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.distributed import destroy_process_group, init_process_group

from lavis_lite.common import optim
from lavis_lite.common.config import Config
from lavis_lite.common.errors import ConfigError
from lavis_lite.models.blocks import recompute_blocks, transformer_blocks
from lavis_lite.parallel.auto import choose, state_bytes
from lavis_lite.parallel.base import AUTO, check_quantized, check_strategy, is_quantized
from lavis_lite.parallel.blocks import flattenable_blocks
from lavis_lite.runners.planning.shapes import Shape, build_shape
from lavis_lite.runners.planning.sharding import SHARDINGS, sharding_of
from lavis_lite.runners.planning.trace import HEADS, INPUTS, Book, Kind, part_of, trace_step

ORDER = ("image encoder", "Q-Former", "language model", HEADS, INPUTS)
# Layers of bitsandbytes' int8 keep a byte a weight and four a row; in 4 bits half a byte and one scale for 64 weights.
QUANTIZED = {"int8": (1.0, 4.0), "int4": (0.5 + 4 / 64, 0.0)}


# What an allocator holds beyond the tensors that are alive, as a fraction of these. CPU: of glibc's heap,
# fitted to benchmarks/plan.py. CUDA: torch's allocator rounds up and keeps pieces apart; an allowance, not measured.
ALLOCATOR_GAPS = {"cpu": 0.25, "cuda": 0.05}


@dataclass(frozen=True)
class Target:
    """What the run is to fit into: one process's memory, in bytes.

    device_type: cpu or cuda. limit: None for no limit. memory: what `auto` takes its share of, by default the limit.
    runtime: what a process holds besides tensors. text_tokens: of every text, None for the longest. stored_features:
    the frozen encoder's features are read from disk, while it stays for validation.
    """

    device_type: str
    limit: int | None
    runtime: int
    world_size: int = 1
    strategy: str = "auto"
    precision: str = "fp32"
    text_tokens: int | None = None
    stored_features: bool = False
    memory: int | None = None

    def resolved_strategy(
        self, needed: int, *, quantized: bool = False, options: Mapping[str, Any] | None = None
    ) -> str:
        """The strategy's name, `auto` as a run chooses it for a model whose state takes so many bytes.

        Raises ConfigError for one whose memory isn't known, or that such a run would refuse.
        """
        name = self.strategy
        if name == AUTO:
            check_strategy(name, self.world_size, options=options)
            memory = self.limit if self.memory is None else self.memory
            name = choose(needed, memory, self.world_size, quantized=quantized)
        if name not in SHARDINGS:
            raise ConfigError(f"run.strategy: no plan for '{name}'; known: {', '.join(SHARDINGS)}")
        if name != "single" and self.world_size == 1:
            raise ConfigError(f"run.strategy: '{name}' needs several processes: give --world-size")
        check_strategy(name, self.world_size)
        check_quantized(name, quantized=quantized)
        return name


@dataclass(frozen=True)
class Part:
    """Bytes of one part on one process at the moment of the peak; gradients_whole is what they come to in the end."""

    name: str
    trained: bool
    numbers: int
    parameters: int
    optimizer: int
    gradients: int
    activations: int
    gradients_whole: int


@dataclass(frozen=True)
class Plan:
    """Bytes of one process at the peak of a step; `total` is the sum of all.

    copies: of weights in autocast's precision. gathered: blocks of sharded weights that are whole at one moment.
    temporaries: results that come and go in the backward pass. largest_batch: None where it wasn't asked for.
    """

    batch: int
    strategy: str
    precision: str
    parts: tuple[Part, ...]
    copies: int
    temporaries: int
    gathered: int
    runtime: int
    limit: int | None
    gap: float = 0.0
    largest_batch: int | None = None

    @property
    def tensors(self) -> int:
        """All that is in tensors."""
        parts = sum(p.parameters + p.optimizer + p.gradients + p.activations for p in self.parts)
        return parts + self.copies + self.temporaries + self.gathered

    @property
    def gaps(self) -> int:
        """What the allocator holds between them."""
        return round(self.gap * self.tensors)

    @property
    def total(self) -> int:
        """All of it."""
        return self.tensors + self.gaps + self.runtime

    @property
    def fits(self) -> bool:
        """Whether it is within the limit."""
        return self.limit is None or self.total <= self.limit


class Planner:
    """Plans of one configuration for one target; a batch size is traced once."""

    def __init__(self, cfg: Config, target: Target) -> None:
        self.cfg, self.target = cfg, target
        self.shape: Shape = build_shape(
            cfg, text_tokens=target.text_tokens, stored_features=target.stored_features
        )
        self.strategy = target.resolved_strategy(
            self._needed(), quantized=is_quantized(cfg.model), options=cfg.run.strategy_options
        )
        self.sharding = sharding_of(self.strategy, cfg.run.strategy_options, target.device_type)
        if self.sharding.recomputed:
            # As fairscale's `checkpoint_wrapper`, which need not be installed.
            recompute_blocks(self.shape.model)
        self._books: dict[tuple[int, bool], Book] = {}
        self._states = _optimizer_bytes(self.shape, cfg)

    def for_strategy(self, strategy: str) -> Planner:
        """The same shapes and traces under another strategy without options."""
        if strategy == self.target.strategy:
            return self
        target = replace(self.target, strategy=strategy)
        if self.sharding.recomputed:
            return Planner(replace(self.cfg, run=replace(self.cfg.run, strategy_options={})), target)
        other = copy.copy(self)
        other.target = target
        other.strategy = other.target.resolved_strategy(
            self._needed(), quantized=is_quantized(self.cfg.model)
        )
        other.sharding = sharding_of(other.strategy, {}, target.device_type)
        return other

    def accumulating(self, batches: int) -> Planner:
        """The same with so many batches a step."""
        other = copy.copy(self)
        other.cfg = replace(self.cfg, run=replace(self.cfg.run, accum_grad_iters=batches))
        return other

    def _needed(self) -> int:
        """What `auto` looks at."""
        return state_bytes(self.shape.model) - _saved_by_quantizing(self.shape.model, self.cfg)

    @property
    def gradients_stay(self) -> bool:
        """Whether gradients are there all the time: DDP's buckets, or accumulation over several batches."""
        return self.sharding.buckets or self.cfg.run.accum_grad_iters > 1

    def plan(self, batch: int | None = None) -> Plan:
        """The plan of a batch size, by default the configuration's."""
        batch = batch or self.cfg.run.batch_size_train
        share: dict[tuple[Kind, str], float] = {
            ("gradient", name): self._gradient_share(name) for name in ORDER
        }
        _, at_peak = self._book(batch).followed_by(self._exchanged_at_the_end()).peak(share)
        held: Counter[tuple[str, str]] = Counter(
            {(kind, part): size for (kind, part), size in at_peak.items()}
        )
        parts = tuple(self._part(name, held) for name in ORDER)
        return Plan(
            batch=batch,
            strategy=self.strategy,
            precision=self.target.precision,
            parts=tuple(p for p in parts if p.numbers or p.activations),
            copies=sum(size for (kind, _), size in held.items() if kind == "copy"),
            temporaries=sum(size for (kind, _), size in held.items() if kind == "temporary")
            + self._exchanged(),
            gathered=self._gathered(),
            runtime=self.target.runtime,
            limit=self.target.limit,
            gap=ALLOCATOR_GAPS[self.target.device_type],
        )

    def with_largest_batch(self) -> Plan:
        """The plan of the configuration's batch size, with the largest that fits; 0 if none does."""
        plan = self.plan()
        if plan.limit is None:
            return plan
        largest = largest_batch(lambda batch: self.plan(batch).total, plan.limit, plan.batch)
        return replace(plan, largest_batch=largest)

    def _book(self, batch: int) -> Book:
        key = (batch, self.gradients_stay)
        if key not in self._books:
            with _pretended_processes(self.target.world_size):
                self._books[key] = trace_step(
                    self.shape,
                    batch,
                    precision=self.target.precision,
                    device_type=self.target.device_type,
                    gradients_stay=self.gradients_stay,
                )
        return self._books[key]

    def _part(self, name: str, held: Mapping[tuple[str, str], int]) -> Part:
        own = [(n, p) for n, p in self.shape.model.named_parameters() if part_of(n) == name]
        trained = sum(p.numel() * p.element_size() for _, p in own if p.requires_grad)
        frozen = sum(p.numel() * p.element_size() for _, p in own) - trained
        buffers = sum(
            b.numel() * b.element_size() for n, b in self.shape.model.named_buffers() if part_of(n) == name
        )
        if name == "language model":
            frozen -= _saved_by_quantizing(self.shape.model, self.cfg)
        share, sharded = self.sharding.share(self.target.world_size), self._sharded()
        spread = sum(p.numel() * p.element_size() for _, p in own if p in sharded)
        gradients = held.get(("gradient", name), 0)
        if self.gradients_stay:
            gradients += round(trained * self._gradient_share(name))
        return Part(
            name=name,
            trained=trained > 0,
            numbers=sum(p.numel() for _, p in own),
            parameters=round(frozen + trained - spread + spread * share) + buffers,
            optimizer=round(self._states[name] * (share if self.sharding.optimizer else 1.0)),
            gradients=gradients,
            activations=held.get(("activation", name), 0),
            gradients_whole=trained,
        )

    def _blocks(self) -> list[nn.Module]:
        """What the strategy shards block by block."""
        if self.sharding.weights == "all":
            return transformer_blocks(self.shape.model)
        # fairscale's needs CUDA, and a backward pass through a block leaves it whole until its next forward: of the
        # blocks that it cuts, those of a language model count as whole.
        tower = self.shape.model.visual_encoder
        cut = self.sharding.weights == "frozen_blocks" and self.target.device_type == "cuda" and tower.freeze
        return flattenable_blocks(tower) if cut else []

    def _sharded(self) -> set[nn.Parameter]:
        """Weights of which a process keeps its share."""
        if self.sharding.weights == "all":
            return {p for p in self.shape.model.parameters() if p.dim()}
        return {p for block in self._blocks() for p in block.parameters()}

    def _gradient_share(self, name: str) -> float:
        """The fraction of a part's gradients that a process has in the backward pass.

        They are exchanged as they come, but under accumulation at the last batch, and under fsdp2 all that lies outside
        of blocks at the end.
        """
        if not self.sharding.optimizer or self.cfg.run.accum_grad_iters > 1:
            return 1.0
        exchanged = None
        if self.sharding.weights == "all":
            exchanged = {p for block in self._blocks() for p in block.parameters()}
        trained = [(p.numel(), p) for n, p in self.shape.model.named_parameters() if part_of(n) == name]
        trained = [(size, p) for size, p in trained if p.requires_grad]
        early = sum(size for size, p in trained if exchanged is None or p in exchanged)
        total = sum(size for size, _ in trained)
        kept = early * self.sharding.share(self.target.world_size)
        return (total - early + kept) / total if total else 1.0

    def _exchanged(self) -> int:
        """Gradients of the largest trained block that fsdp2 exchanges: whole as they come (accumulated ones are so
        anyway), while the block before them waits in a buffer of the same size."""
        if self.sharding.weights != "all":
            return 0
        largest = max((_bytes(block, trained=True) for block in self._blocks()), default=0)
        return largest * (1 if self.cfg.run.accum_grad_iters > 1 else 2)

    def _exchanged_at_the_end(self) -> int:
        """The buffer for all that fsdp2 exchanges at the end of the backward pass: what lies outside of blocks."""
        if self.sharding.weights != "all":
            return 0
        within = sum(_bytes(block, trained=True) for block in self._blocks())
        return _bytes(self.shape.model, trained=True) - within

    def _gathered(self) -> int:
        """Sharded weights that are whole at one moment, in their own precision: the largest block and the
        next one, which is fetched meanwhile, and what lies outside of blocks."""
        blocks = self._blocks()
        within = {p for block in blocks for p in block.parameters()}
        total = sum(p.numel() * p.element_size() for p in self._sharded() if p not in within)
        sizes = sorted((_bytes(block) for block in blocks), reverse=True)
        return total + sum(sizes[:2])


def largest_batch(total: Callable[[int], int], limit: int, start: int) -> int:
    """The largest batch size whose total is within the limit, to half a per cent of memory; 0 for none.

    Found by straight lines, which memory nearly follows, and tried. They are drawn from batches of at least 8: texts of
    a smaller one need not contain the longest.
    """
    low = max(8, start)
    tried = {batch: total(batch) for batch in (low, 2 * low)}
    for turn in range(12):
        good = max((batch for batch, size in tried.items() if size <= limit), default=0)
        bad = min((batch for batch, size in tried.items() if size > limit), default=0)
        ends = (good, bad) if good and bad else tuple(sorted(tried)[-2:] if good else sorted(tried)[:2])
        slope = max(1.0, (tried[ends[1]] - tried[ends[0]]) / (ends[1] - ends[0]))
        if good and (bad == good + 1 or tried[good] * 1.005 + slope > limit):
            return good
        guess = int(ends[0] + (limit - tried[ends[0]]) / slope)
        if good and bad:
            # By turns the mean of both ends, lest one of them never moves.
            guess = min(max(guess if turn % 2 == 0 else math.isqrt(good * bad), good + 1), bad - 1)
        elif guess < 1:
            return 0
        tried[guess] = total(guess)
    return good


def _bytes(module: nn.Module, *, trained: bool = False) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad or not trained)


def _optimizer_bytes(shape: Shape, cfg: Config) -> Counter[str]:
    """Bytes of the optimiser's state by part: what one step of it makes."""
    run, sizes = cfg.run, Counter[str]()
    groups = optim.param_groups(shape.model, run.weight_decay, run.lr_layer_decay)
    optimizer = optim.build_optimizer(groups, run.betas, torch.device("cpu"))
    with shape.mode:
        for parameter in shape.model.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        optimizer.step()
    for name, parameter in shape.model.named_parameters():
        parameter.grad = None
        for value in optimizer.state.get(parameter, {}).values():
            sizes[part_of(name)] += value.numel() * value.element_size()
    return sizes


def _saved_by_quantizing(model: Any, cfg: Config) -> int:
    """Bytes by which the language model's linear layers shrink; its head and embeddings stay as they are."""
    section = cfg.model.get("language_model") or {}
    if section.get("quantize", "none") not in QUANTIZED:
        return 0
    per_weight, per_row = QUANTIZED[section["quantize"]]
    language_model = model.language_model.model
    head = language_model.get_output_embeddings()
    saved = 0.0
    for layer in language_model.modules():
        if isinstance(layer, nn.Linear) and layer is not head:
            weight = layer.weight
            saved += weight.numel() * (weight.element_size() - per_weight) - weight.shape[0] * per_row
    return round(saved)


class _pretended_processes:
    """Within the block this is rank 0 of so many processes, whose collectives give tensors of the right shapes."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size

    def __enter__(self) -> None:
        if self.world_size > 1:
            init_process_group("fake", rank=0, world_size=self.world_size)

    def __exit__(self, *error: object) -> None:
        if self.world_size > 1:
            destroy_process_group()
