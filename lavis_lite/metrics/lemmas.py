"""Answers by their dictionary forms, for data whose truths are stemmed, as those of OK-VQA."""

from __future__ import annotations

from lavis_lite.common.errors import ConfigError


def lemmatise(answer: str) -> str:
    """Each word in lower case by its dictionary form: "Riding horses" -> "ride horse".

    Words are what blanks separate, so punctuation has to be gone already. Those with an apostrophe stay as they are:
    the dictionary takes "don't" for "do". A word's form doesn't depend on its neighbours, and rare ones may come out
    wrong.

    Raises ConfigError without simplemma.
    """
    try:
        from simplemma import lemmatize
    except ImportError as error:
        raise ConfigError(
            "task.lemmatize needs simplemma: pip install 'lavis-lite[eval]', or leave task.lemmatize out"
        ) from error
    return " ".join(word if "'" in word else lemmatize(word, lang="en") for word in answer.lower().split())
