"""METEOR and SPICE: Java programs of pycocoevalcap (extra `eval`), used where they are there."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import shutil
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from lavis_lite.common.errors import MissingDependencyError
from lavis_lite.metrics.caption import Words

FETCH_SPICE = "from pycocoevalcap.spice.get_stanford_models import get_stanford_models as get; get()"


def meteor(predictions: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """METEOR 1.5 of the corpus (Denkowski and Lavie, 2014).

    Raises MissingDependencyError without Java or the package.
    """
    _need_java("METEOR")
    return _score(lambda: import_module("pycocoevalcap.meteor.meteor").Meteor(), predictions, references)


def spice(predictions: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """SPICE of the corpus (Anderson et al., ECCV 2016): F1 over objects, attributes and relations.

    It parses with Stanford CoreNLP, 400 MB which the package fetches in its own time; an evaluation never
    does, so that it neither waits for a network nor dies of one. Raises MissingDependencyError when any of it
    isn't there.
    """
    _need_java("SPICE")
    spec = importlib.util.find_spec("pycocoevalcap.spice")
    folder = Path(next(iter(spec.submodule_search_locations or []))) if spec else Path()
    if not list((folder / "lib").glob("stanford-corenlp-*-models.jar")):
        raise MissingDependencyError(
            f'SPICE needs Stanford CoreNLP (400 MB) in {folder / "lib"}: python -c "{FETCH_SPICE}"'
        )
    return _score(lambda: import_module("pycocoevalcap.spice.spice").Spice(), predictions, references)


def _need_java(name: str) -> None:
    if importlib.util.find_spec("pycocoevalcap") is None:
        raise MissingDependencyError(f"{name} needs pycocoevalcap: pip install 'lavis-lite[eval]'")
    if shutil.which("java") is None:
        raise MissingDependencyError(
            f"{name} needs Java (java on the PATH): for example apt install default-jre-headless"
        )


def _score(
    scorer: Callable[[], Any], predictions: Sequence[Words], references: Sequence[Sequence[Words]]
) -> float:
    # METEOR's protocol separates fields by bars and reads lines.
    texts = [" ".join(words).replace("|||", "") for words in predictions]
    own = [[" ".join(words).replace("|||", "") for words in several] for several in references]
    with contextlib.redirect_stdout(io.StringIO()):  # the package prints
        score, _ = scorer().compute_score(dict(enumerate(own)), {i: [text] for i, text in enumerate(texts)})
    return float(score)
