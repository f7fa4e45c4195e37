"""From the members of a sample in a shard to a row: which is the picture, where the captions are."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lavis_lite.datasets.base import UnreadableSample
from lavis_lite.datasets.folder import PICTURES, Kind
from lavis_lite.datasets.readers import Asked, Fields, Row, bad_text

# A list of captions, such as a web caption and generated ones, before the one it was made from.
CAPTION_NAMES = ("captions", "caption", "text")


@dataclass(frozen=True)
class SampleForm:
    """What the members of a sample are.

    image: the picture's (or clip's) extension; None: the first that is one of its kind. fields: names in the .json
    member. kind: what a sample shows.
    """

    image: str | None = None
    fields: Fields = field(default_factory=Fields)
    kind: Kind = PICTURES

    def shown(self, extensions: Mapping[str, Any]) -> str | None:
        """The extension of the picture's (or clip's) member; None without one."""
        if self.image is not None:
            return self.image if self.image in extensions else None
        return next((extension for extension in extensions if f".{extension}" in self.kind.suffixes), None)

    def row(self, image: str, place: str, extensions: Mapping[str, Any], read: Callable[[str], bytes]) -> Row:
        """The row of a sample; its `problem` says what is missing or broken.

        image: the picture's path or address. place: shard and key, for messages. extensions: of its members.
        read: the bytes of the member with an extension; may raise UnreadableSample.
        """
        if self.shown(extensions) is None:
            wanted = f"no .{self.image}" if self.image else f"no {self.kind.one}"
            return Row(image, problem=f"{place}: {wanted} among its members ({', '.join(extensions)})")
        if not {"json", "txt"} & extensions.keys():
            return Row(
                image, problem=f"{place}: no .json or .txt among its members ({', '.join(extensions)})"
            )
        try:
            texts, about = self.told(place, extensions, read)
        except UnreadableSample as error:
            return Row(image, problem=f"{place}: {error.reason}")
        question = _question(about, place)
        problem = None if texts or question else f"{place}: no caption in its .json or .txt"
        group = about.get(self.fields.group or "group")
        number = about.get(self.fields.image_id or "image_id")
        return Row(image, texts, number, problem, None if group in (None, "") else str(group), question)

    def told(
        self, place: str, extensions: Mapping[str, Any], read: Callable[[str], bytes]
    ) -> tuple[list[str], dict[str, Any]]:
        """A sample's captions, of which there may be none, and the fields of its .json that hold none.

        Arguments as of `row`. Raises UnreadableSample for texts that are broken.
        """
        about = read_json(read("json"), place) if "json" in extensions else {}
        names = (self.fields.caption,) if self.fields.caption else CAPTION_NAMES
        texts = next(filter(None, (_texts(about.get(name), place) for name in names)), [])
        if not texts and "txt" in extensions:
            texts = _texts(_text(read("txt"), place).splitlines(), place)
        rest = {name: value for name, value in about.items() if name not in names}
        return texts, rest


def _texts(captions: Any, place: str) -> list[str]:
    captions = [] if captions is None else [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not all(isinstance(text, str) for text in captions):
        raise UnreadableSample(place, f"captions must be text or a list of texts, got {captions!r:.60}")
    if any(bad_text(text) for text in captions):
        raise UnreadableSample(place, "a caption with a lone surrogate (broken UTF-16)")
    return [text.strip() for text in captions if text.strip()]


def _question(about: Mapping[str, Any], place: str) -> Asked | None:
    """What is asked of the picture: `question` and `answers`, as `lavis-lite shards make` writes them."""
    text, answers = about.get("question"), about.get("answers", about.get("answer", []))
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(text, str) or not text.strip() or not isinstance(answers, list):
        return None
    kinds = {name: about.get(name) for name in ("answer_type", "question_type")}
    return Asked(
        text.strip(),
        json.dumps(about.get("question_id", place)),
        [str(answer) for answer in answers],
        **{name: None if kind is None else str(kind) for name, kind in kinds.items()},
    )


def _text(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnreadableSample(place, f"its text is not valid UTF-8 (byte {error.start})") from error


def read_json(data: bytes, place: str) -> dict[str, Any]:
    """The fields of a .json member; UnreadableSample for a broken one."""
    try:
        about = json.loads(_text(data, place))
    except (ValueError, RecursionError) as error:
        raise UnreadableSample(place, f"broken json: {error}") from error
    if not isinstance(about, dict):
        raise UnreadableSample(place, f"its json is {type(about).__name__}, not an object with fields")
    return about
