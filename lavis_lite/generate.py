"""`lavis-lite generate`: texts for picture files, a line of JSON each."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import torch
from rich.progress import track

from lavis_lite.api import load_model_and_preprocess
from lavis_lite.common.device import choose_device
from lavis_lite.common.errors import ConfigError, DataError
from lavis_lite.common.logging import console
from lavis_lite.datasets.base import UnreadableSample
from lavis_lite.datasets.images import SUFFIXES, read_image


def generate_files(
    model: str,
    images: Sequence[str],
    *,
    out: str | None = None,
    prompt: str | None = None,
    checkpoint: str | None = None,
    device: str = "auto",
    batch_size: int = 16,
    **settings: Any,
) -> int:
    """Write {"image", "text"} of every picture, in order, as JSON lines; a picture that can't be read gets "error".

    Args:
        model: name/type, e.g. "blip2_t5/shapes".
        images: files, and folders whose pictures are taken in alphabetical order.
        out: the file to write; standard output without one.
        settings: of the model's `generate`.

    Returns: how many pictures couldn't be read.
    Raises ConfigError for a model without `generate` or a malformed name, DataError when there is no picture.
    """
    name, slash, model_type = model.partition("/")
    if not slash:
        raise ConfigError(
            f"--model '{model}': give a name and a type, e.g. blip2_t5/shapes (see lavis-lite names model)"
        )
    paths = list(_files(images))
    place = str(choose_device(device))
    built, processors, _ = load_model_and_preprocess(name, model_type, True, place, checkpoint)
    if not hasattr(built, "generate"):
        raise ConfigError(f"--model '{model}': this model generates no text")
    prompted = {} if prompt is None else {"prompt": prompt}
    bad = 0
    with ExitStack() as stack:
        file: IO[str] = stack.enter_context(open(out, "w", encoding="utf-8")) if out else sys.stdout
        batches = range(0, len(paths), batch_size)
        shown = console().is_terminal and out is not None
        for start in track(batches, "generating", console=console(), disable=not shown):
            for row in _rows(
                built, processors["eval"], paths[start : start + batch_size], prompted, settings
            ):
                bad += "error" in row
                print(json.dumps(row, ensure_ascii=False), file=file, flush=True)
    return bad


def _files(images: Sequence[str]) -> Iterator[Path]:
    for name in images:
        path = Path(name).expanduser()
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
            if not found:
                raise DataError(f"no picture in the folder '{path}'")
            yield from found
        else:
            yield path


def _rows(
    model: Any,
    processor: Callable[..., torch.Tensor],
    paths: Sequence[Path],
    prompted: dict[str, str],
    settings: dict[str, Any],
) -> Iterator[dict[str, str]]:
    """One batch's rows, in order; the readable pictures go through the model together."""
    read: dict[Path, torch.Tensor] = {}
    errors: dict[Path, str] = {}
    for path in paths:
        try:
            read[path] = processor(read_image(path))
        except UnreadableSample as error:
            errors[path] = error.reason
    texts: dict[Path, list[str]] = {}
    if read:
        image = torch.stack(list(read.values())).to(model.device)
        said = model.generate({"image": image, **prompted}, **settings)
        each = len(said) // len(read)
        texts = {path: said[i * each : (i + 1) * each] for i, path in enumerate(read)}
    for path in paths:
        if path in errors:
            yield {"image": str(path), "error": errors[path]}
        for text in texts.get(path, ()):
            yield {"image": str(path), "text": text}
