"""Answers by their dictionary forms, for data whose truths are stemmed, as those of OK-VQA."""

from __future__ import annotations

from lavis_lite.common.errors import ConfigError


def lemmatise(answer: str) -> str:
    """Each word in lower case by its dictionary form: "Riding horses" -> "ride horse".

    A word's form doesn't depend on its neighbours, and rare ones may come out wrong, so both sides of a comparison
    have to go through it.

    Raises ConfigError without simplemma.
    """
    try:
        from simplemma import lemmatize
    except ImportError as error:
        raise ConfigError(
            "task.lemmatize needs simplemma: pip install 'lavis-lite[eval]', or leave task.lemmatize out"
        ) from error
    return " ".join(lemmatize(word, lang="en") for word in answer.lower().split())
