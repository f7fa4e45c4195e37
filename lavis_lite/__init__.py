"""lavis_lite: a lean, registry-based vision-language framework with BLIP-2 complete.

`import lavis_lite` is cheap: torch, timm and transformers are imported when a name that needs them is used.
"""

from __future__ import annotations

import importlib
from typing import Any

from lavis_lite.common.registry import registry
from lavis_lite.manifest import declare_all

__version__ = "0.1.0"

declare_all()

_API = ("load_model", "load_model_and_preprocess", "load_preprocess", "load_dataset", "model_zoo")

__all__ = ["__version__", "registry", *_API]


def __getattr__(name: str) -> Any:
    if name in _API:
        return getattr(importlib.import_module("lavis_lite.api"), name)
    raise AttributeError(f"module 'lavis_lite' has no attribute '{name}'")
