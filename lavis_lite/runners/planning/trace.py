"""One training step on tensors without storage, with a book of what is allocated and freed.

Every operation of forward and backward runs as it will, in the same order and the same precisions; only no number is
computed. So checkpointed activations, autocast's copies of weights, and gradients that come while activations go are
in the book because they happen, not because somebody thought of them.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

# torch's documented way to see every operation (notes, "Extending torch native API").
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lavis_lite.common.device import arranged_for, autocast
from lavis_lite.runners.planning.shapes import Shape

aten = torch.ops.aten
Kind = Literal["activation", "temporary", "gradient", "copy"]
PARTS = {
    "visual_encoder": "image encoder",
    "Qformer": "Q-Former",
    "query_tokens": "Q-Former",
    "language_model": "language model",
}
HEADS, INPUTS = "heads", "inputs"


def part_of(name: str) -> str:
    """The part of the model that a parameter or module of that name belongs to."""
    return PARTS.get(name.split(".")[0], HEADS)


@dataclass
class Block:
    """A storage. kind: what it is for: kept by the forward pass, passing in the backward, a gradient, or a weight's
    copy in another precision. part: of the model, whose module ran last when it came."""

    bytes: int
    kind: Kind
    part: str


@dataclass
class Book:
    """What came (1) and went (-1), in order."""

    events: list[tuple[int, Block]] = field(default_factory=list)

    def followed_by(self, size: int) -> Book:
        """The same with something of that size that comes and goes after all else."""
        block = Block(size, "temporary", HEADS)
        return Book([*self.events, (1, block), (-1, block)]) if size else self

    def peak(
        self, share: Mapping[tuple[Kind, str], float] | None = None
    ) -> tuple[int, dict[tuple[Kind, str], int]]:
        """The largest sum of bytes alive at one moment, and of what kinds and parts it is made.

        share: by kind and part the fraction of it that a process holds; by default all.
        """
        share = share or {}
        alive: dict[tuple[Kind, str], float] = {}
        total = highest = 0.0
        at_peak: dict[tuple[Kind, str], float] = {}
        rising = False
        for sign, block in self.events:
            key, size = (
                (block.kind, block.part),
                sign * block.bytes * share.get((block.kind, block.part), 1.0),
            )
            # Only where the sum is about to fall it can have been at its highest.
            if rising and size < 0 and total > highest:
                highest, at_peak = total, dict(alive)
            rising = size > 0 or (rising and size == 0)
            alive[key] = alive.get(key, 0.0) + size
            total += size
        if total > highest:
            highest, at_peak = total, alive
        return round(highest), {key: round(size) for key, size in at_peak.items() if round(size)}


def trace_step(
    shape: Shape, batch: int, *, precision: str, device_type: str, gradients_stay: bool = False
) -> Book:
    """The book of one step's forward and backward.

    Args:
        batch: B. precision: of autocast. device_type: whose kernels are chosen.
        gradients_stay: they are there before the step, as with DDP's buckets or accumulation; they are then no part of
            the book, but what is added to them is.
    """
    for parameter in shape.model.parameters():
        parameter.grad = None
        if gradients_stay and parameter.requires_grad:
            with shape.mode:
                parameter.grad = torch.empty_like(parameter)
    recorder = _Recorder(shape)
    with recorder.watching_parts(), arranged_for(device_type), torch.random.fork_rng(devices=[]), recorder:
        torch.manual_seed(0)
        samples = shape.samples(batch)
        recorder.part = HEADS
        with autocast(torch.device("cpu"), precision):
            loss = shape.model(samples)["loss"]
        recorder.backward = True
        loss.backward()
    book = recorder.finish()
    shape.model.zero_grad(set_to_none=True)
    return book


class _Recorder(TorchDispatchMode):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.part, self.backward = INPUTS, False
        self.book = Book()
        self._blocks: dict[int, Block] = {}
        model = shape.model
        standing = [*model.parameters(), *model.buffers()]
        standing += [p.grad for p in model.parameters() if p.grad is not None]
        # What is there before the step is no part of the book.
        self._standing = {id(tensor.untyped_storage()) for tensor in standing}
        self._held = [tensor.untyped_storage() for tensor in standing]
        self._weights = {id(parameter.untyped_storage()) for parameter in model.parameters()}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = self._of_values(func, args)
        if result is None:
            result = func(*self._with_places(func, args), **(kwargs or {}))
        copied = func is aten._to_copy.default and id(args[0].untyped_storage()) in self._weights
        for tensor in tree_leaves(result):
            # Of a sparse gradient only its rows are of any size, and those are another tensor's.
            if isinstance(tensor, FakeTensor) and tensor.layout == torch.strided:
                self._enter(tensor, copied)
        return result

    def _of_values(self, func: Any, args: tuple[Any, ...]) -> Any:
        """What an operation would read off values: in a plan no text has padding, and the longest text has the plan's
        length."""
        if not (args and isinstance(args[0], FakeTensor)):
            return None
        if func is aten.nonzero.default:
            mask = args[0]
            return mask.new_empty((mask.numel(), mask.dim()), dtype=torch.long)
        if func is aten._local_scalar_dense.default:
            return self.shape.text_tokens
        return None

    def _with_places(self, func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Arguments of an indexing with masks replaced by the places that they select."""
        if func is not aten.index.Tensor:
            return args
        places: list[Tensor | None] = []
        for index in args[1]:
            if index is None or index.dtype != torch.bool:
                places.append(index)
            elif isinstance(index, FakeTensor):
                places += [index.new_empty(index.numel(), dtype=torch.long) for _ in range(index.dim())]
            else:
                places += index.nonzero().unbind(1)
        return (args[0], places)

    def _enter(self, tensor: Tensor, copied: bool) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._standing or key in self._blocks:
            return
        kind: Kind = "copy" if copied else "temporary" if self.backward else "activation"
        block = Block(storage.nbytes(), kind, self.part)
        self._blocks[key] = block
        self.book.events.append((1, block))
        weakref.finalize(storage, self._leave, key)

    def _leave(self, key: int) -> None:
        block = self._blocks.pop(key, None)
        if block is not None:
            self.book.events.append((-1, block))

    @contextlib.contextmanager
    def watching_parts(self) -> Iterator[None]:
        """Note whose modules run: what comes until the next one's is booked to that part."""
        handles = []
        for name, module in self.shape.model.named_modules():
            if name:
                handles.append(module.register_forward_pre_hook(self._entering(part_of(name))))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _entering(self, part: str) -> Any:
        def note(module: nn.Module, inputs: Any) -> None:
            self.part = part

        return note

    def finish(self) -> Book:
        """The book, what became a gradient being called so, and nothing more being written into it."""
        for name, parameter in self.shape.model.named_parameters():
            block = None
            if parameter.grad is not None and parameter.grad.layout == torch.strided:
                block = self._blocks.get(id(parameter.grad.untyped_storage()))
            if block is not None:
                block.kind, block.part = "gradient", part_of(name)
        self._blocks.clear()
        return self.book
