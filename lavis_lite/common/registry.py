"""Names for interchangeable parts: one generic table per kind, filled by decorators, imported on first use.

>>> @registry.register_vision_encoder("mine")
... def my_encoder(image_size: int = 224) -> nn.Module: ...
>>> registry.get_vision_encoder_class("mine")
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from lavis_lite.common.errors import ConfigError, UnknownNameError, closest

T = TypeVar("T")


class Table:
    """One kind of part: names mapped to classes or functions, or to the module that registers them."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, Any] = {}
        self._modules: dict[str, str] = {}

    def declare(self, modules: Mapping[str, str]) -> None:
        """Announce that importing `modules[name]` registers `name`, without importing anything now."""
        self._modules.update(modules)

    def register(self, name: str) -> Callable[[T], T]:
        """A decorator that registers its argument as `name`; a second owner of the name is an error."""

        def decorator(item: T) -> T:
            known = self._items.get(name)
            if known is not None and _origin(known) != _origin(item):
                raise ConfigError(
                    f"{self.kind} '{name}' is registered twice: by {_origin(known)} and by {_origin(item)}; "
                    "give one of them another name"
                )
            self._items[name] = item
            return item

        return decorator

    def get(self, name: str) -> Any:
        """The part registered as `name`, its module imported if needed; UnknownNameError names near ones."""
        if not isinstance(name, str):
            raise ConfigError(f"a {self.kind} is chosen by its name, got {name!r}; names: {self.names()}")
        if name not in self._items and name in self._modules:
            importlib.import_module(self._modules[name])
        if name not in self._items:
            names = self.names()
            hint = closest(name, names)
            raise UnknownNameError(
                f"unknown {self.kind} '{name}'"
                + (f", {hint}" if hint else ";")
                + f" registered: {', '.join(names) or 'none'}"
                + " (a file of your own is loaded with `imports: [my_file.py]` in the config)"
            )
        return self._items[name]

    def names(self) -> list[str]:
        """All names, declared or registered, in alphabetical order."""
        return sorted({*self._items, *self._modules})


def _origin(item: Any) -> tuple[str, str]:
    return (getattr(item, "__module__", ""), getattr(item, "__qualname__", repr(item)))


class Registry:
    """The tables of all kinds, with a `register_<kind>` decorator and a `get_<kind>_class` for each."""

    KINDS = (
        "model",
        "vision_encoder",
        "language_model",
        "processor",
        "builder",
        "task",
        "runner",
        "lr_scheduler",
        "strategy",
    )

    def __init__(self) -> None:
        self._tables = {kind: Table(kind.replace("_", " ")) for kind in self.KINDS}

    def table(self, kind: str) -> Table:
        """The table of one kind, one of `KINDS`."""
        if kind not in self._tables:
            raise UnknownNameError(f"unknown kind of part '{kind}'; kinds: {', '.join(self.KINDS)}")
        return self._tables[kind]

    def names(self, kind: str) -> list[str]:
        """The names of one kind, in alphabetical order."""
        return self.table(kind).names()

    def register_model(self, name: str) -> Callable[[T], T]:
        """Register a model class."""
        return self.table("model").register(name)

    def register_vision_encoder(self, name: str) -> Callable[[T], T]:
        """Register a function or class that builds a module mapping images [B,3,H,W] to features [B,P,D]."""
        return self.table("vision_encoder").register(name)

    def register_language_model(self, name: str) -> Callable[[T], T]:
        """Register a language-model adapter."""
        return self.table("language_model").register(name)

    def register_processor(self, name: str) -> Callable[[T], T]:
        """Register an image, text or video processor class."""
        return self.table("processor").register(name)

    def register_builder(self, name: str) -> Callable[[T], T]:
        """Register a dataset builder class."""
        return self.table("builder").register(name)

    def register_task(self, name: str) -> Callable[[T], T]:
        """Register a task class."""
        return self.table("task").register(name)

    def register_runner(self, name: str) -> Callable[[T], T]:
        """Register a runner class."""
        return self.table("runner").register(name)

    def register_lr_scheduler(self, name: str) -> Callable[[T], T]:
        """Register a learning-rate schedule, a pure function of the step."""
        return self.table("lr_scheduler").register(name)

    def register_strategy(self, name: str) -> Callable[[T], T]:
        """Register a parallel strategy class."""
        return self.table("strategy").register(name)

    def get_model_class(self, name: str) -> Any:
        """The model class registered as `name`."""
        return self.table("model").get(name)

    def get_vision_encoder_class(self, name: str) -> Any:
        """The vision-encoder function or class registered as `name`."""
        return self.table("vision_encoder").get(name)

    def get_language_model_class(self, name: str) -> Any:
        """The language-model adapter registered as `name`."""
        return self.table("language_model").get(name)

    def get_processor_class(self, name: str) -> Any:
        """The processor class registered as `name`."""
        return self.table("processor").get(name)

    def get_builder_class(self, name: str) -> Any:
        """The dataset builder class registered as `name`."""
        return self.table("builder").get(name)

    def get_task_class(self, name: str) -> Any:
        """The task class registered as `name`."""
        return self.table("task").get(name)

    def get_runner_class(self, name: str) -> Any:
        """The runner class registered as `name`."""
        return self.table("runner").get(name)

    def get_lr_scheduler_class(self, name: str) -> Any:
        """The learning-rate schedule registered as `name`."""
        return self.table("lr_scheduler").get(name)

    def get_strategy_class(self, name: str) -> Any:
        """The parallel strategy class registered as `name`."""
        return self.table("strategy").get(name)


registry = Registry()
