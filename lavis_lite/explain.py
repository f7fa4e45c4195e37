"""`lavis-lite explain`: where in a picture file a model finds the evidence for texts, as a page of HTML."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from lavis_lite.api import build_recipe, load_preprocess
from lavis_lite.common.device import choose_device
from lavis_lite.common.errors import ConfigError, DataError
from lavis_lite.common.io import atomic_write, check_writable
from lavis_lite.common.model_recipe import model_recipe
from lavis_lite.common.registry import registry
from lavis_lite.datasets.base import UnreadableSample
from lavis_lite.datasets.images import read_image
from lavis_lite.models.explain import Explanation, Method, Score, check_request
from lavis_lite.tasks.explain_page import explain_page


def explain_file(
    model: str,
    image: str,
    texts: Sequence[str],
    out: str,
    *,
    checkpoint: str | None = None,
    device: str = "auto",
    method: Method = "gradcam",
    score: Score = "itg",
    per_word: bool = False,
) -> list[Explanation]:
    """Write the page about a picture and texts.

    Args:
        model: name/type, e.g. "blip2/shapes", or a run's folder. Others as of `Blip2QFormer.explain`.

    Returns: what the page shows.
    Raises ConfigError for a malformed name, a model without a matching head or a page that can't be written, DataError
    for a picture that can't be read, InputError as `Blip2QFormer.explain`; all before the model is built.
    """
    recipe = model_recipe(model, checkpoint=checkpoint)
    if not hasattr(registry.get_model_class(recipe.arch), "explain"):
        raise ConfigError(
            f"--model '{model}': only a model with a matching head can be explained, that is one of stage 1 "
            "such as blip2/pretrain (this one's weights come from such a model)"
        )
    check_request(texts, method, score, per_word)
    try:
        shown = read_image(image)
    except UnreadableSample as error:
        raise DataError(f"--image '{image}': {error.reason}") from error
    check_writable(out, where="--out")
    built = build_recipe(recipe, True, str(choose_device(device, where="--device")))
    vision, language = load_preprocess(recipe.preprocess)
    stack = vision["eval"](shown).expand(len(texts), -1, -1, -1)
    found: list[Explanation] = cast(Any, built).explain(
        stack, [language["eval"](text) for text in texts], method=method, score=score, per_word=per_word
    )
    page = explain_page(Path(image).name, shown, found, method=method, score=score)
    atomic_write(out, page)
    return found
