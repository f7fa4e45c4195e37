"""Image and text processors, chosen by name and configured by keyword."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lavis_lite.common.binding import bind
from lavis_lite.common.errors import ConfigError
from lavis_lite.common.registry import registry


def build_processor(section: Mapping[str, Any], *, where: str) -> Callable[..., Any]:
    """The processor a config section describes: `name` and the keywords of that processor.

    where: the YAML path of the section, for messages.
    Raises ConfigError: no name, an unknown name, a keyword or value the processor doesn't take.
    """
    if not isinstance(section, Mapping) or "name" not in section:
        names = ", ".join(registry.names("processor"))
        raise ConfigError(f"{where}: missing {where}.name; processors: {names}")
    processor = registry.get_processor_class(section["name"])
    keywords = bind(processor, section, where=where, skip=("name",))
    try:
        built: Callable[..., Any] = processor(**keywords)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error
    return built
