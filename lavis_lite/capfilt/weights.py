"""What tells a model's weights from others of the same name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lavis_lite.capfilt.settings import Settings, parse_model
from lavis_lite.common.checkpoint import resolve_checkpoint
from lavis_lite.common.errors import LavisLiteError
from lavis_lite.common.fingerprint import digest, file_digest
from lavis_lite.common.model_recipe import model_recipe
from lavis_lite.common.tensor_parts import PARTS
from lavis_lite.common.tensor_parts import SUFFIX as PARTS_SUFFIX

ROLES = ("captioner", "ranker")
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", PARTS_SUFFIX)


def weights_of(settings: Settings) -> dict[str, str | None]:
    """{role: text that is equal for equal weights}; None for a model whose weights are not here, or that has none."""
    return {role: _weights(getattr(settings, role), role) for role in ROLES}


def _weights(text: str, role: str) -> str | None:
    named = parse_model(text, role)
    if not named.ours:
        folder = Path(named.name).expanduser()
        return _digest(folder) if folder.is_dir() else _commit(named.name)
    try:
        source = model_recipe(named.name, checkpoint=named.checkpoint).model.get("pretrained")
        return _digest(resolve_checkpoint(source)) if source else None
    except LavisLiteError:  # building the model says what is wrong, if there is anything left to do
        return None


def _digest(place: Path) -> str | None:
    digests = [f"{path.name} {file_digest(path)}" for path in _files(place)]
    return digest("\n".join(digests)) if digests else None


def _files(place: Path) -> Iterator[Path]:
    """The weights of a folder, or of a file, which may be the list of several."""
    if place.suffix == ".json" or place.name == PARTS:
        place = place.parent
    if place.is_file():
        yield place
    else:
        yield from (path for path in sorted(place.iterdir()) if path.suffix in SUFFIXES)


def _commit(name: str) -> str | None:
    """The version of a hub's model that this machine has; None before it is fetched."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(found).parent.name if isinstance(found, str) else None
