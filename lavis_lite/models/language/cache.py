"""What differs between versions of transformers about caches of keys and values."""

from __future__ import annotations

from collections.abc import Collection


def cache_keyword(parameters: Collection[str]) -> str:
    """The name under which a model's forward takes its cache: renamed in the course of transformers 5."""
    return "cache" if "cache" in parameters else "past_key_values"
