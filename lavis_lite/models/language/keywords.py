"""Which keywords a language model's forward takes: models differ, and so do versions of transformers."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from functools import cache
from typing import Any


def forward_keywords(model: Any) -> frozenset[str]:
    """The parameters of a model's forward by name; of a model with LoRA, those of the model below."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    model_class: type = type(base)
    return _keywords_of(model_class)


@cache
def _keywords_of(model_class: type) -> frozenset[str]:
    return frozenset(inspect.signature(model_class.forward).parameters)  # type: ignore[attr-defined]


def cache_keyword(keywords: Collection[str]) -> str:
    """The name under which a model's forward takes its cache: renamed in the course of transformers 5."""
    return "cache" if "cache" in keywords else "past_key_values"
