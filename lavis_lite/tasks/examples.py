"""A few held-out images and captions with what was retrieved for them, small enough for a report."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lavis_lite.tasks.gallery import Gallery
from lavis_lite.tasks.predictions import evenly

ANSWERS = 5
THUMBNAIL = 160


@dataclass(frozen=True)
class ImageExample:
    """An image, a caption of its own for those who can't see it, and its first texts: is each right?"""

    image: int
    description: str
    answers: list[tuple[str, bool]]


@dataclass(frozen=True)
class TextExample:
    """A caption, its image, and its first images with whether each is right."""

    text: str
    image: int
    answers: list[tuple[int, bool]]


@dataclass(frozen=True)
class Examples:
    """Evenly drawn examples and mistakes; JPEG thumbnails and a describing caption by image position."""

    images: list[ImageExample]
    wrong_images: list[ImageExample]
    texts: list[TextExample]
    wrong_texts: list[TextExample]
    thumbnails: dict[int, bytes]
    descriptions: dict[int, str]


def draw_examples(
    gallery: Gallery, relevant: Tensor, first_texts: Tensor, first_images: Tensor, dataset: Any, number: int
) -> Examples:
    """`number` images and captions at even distances through the split, and half as many that went wrong.

    relevant: bool[N, M]. first_texts: int64[N, K], first_images: int64[M, K'], best first.
    """
    with_text = relevant.any(dim=1)
    wrong_image = with_text & ~relevant.gather(1, first_texts[:, :1])[:, 0]
    wrong_text = first_images[:, 0] != gallery.image_of_text
    descriptions = {
        image: gallery.texts[text]
        for text, image in reversed(list(enumerate(gallery.image_of_text.tolist())))
    }

    def image_example(image: int) -> ImageExample:
        texts = first_texts[image, :ANSWERS].tolist()
        answers = [(gallery.texts[text], bool(relevant[image, text])) for text in texts]
        return ImageExample(image, descriptions[image], answers)

    def text_example(text: int) -> TextExample:
        images, right = first_images[text, :ANSWERS].tolist(), int(gallery.image_of_text[text])
        return TextExample(gallery.texts[text], right, [(image, image == right) for image in images])

    images = [image_example(image) for image in _evenly(with_text, number)]
    wrong_images = [image_example(image) for image in _evenly(wrong_image, (number + 1) // 2)]
    texts = [text_example(text) for text in _evenly(torch.ones_like(wrong_text), number)]
    wrong_texts = [text_example(text) for text in _evenly(wrong_text, (number + 1) // 2)]
    shown = {example.image for example in images + wrong_images}
    shown |= {image for example in texts + wrong_texts for image, _ in example.answers}
    shown |= {example.image for example in texts + wrong_texts}
    thumbnails = {image: thumbnail(dataset, gallery.rows[image]) for image in sorted(shown)}
    return Examples(images, wrong_images, texts, wrong_texts, thumbnails, descriptions)


def _evenly(chosen: Tensor, number: int) -> list[int]:
    """At most `number` of the positions where `chosen` is true, at even distances."""
    return evenly(chosen.nonzero()[:, 0].tolist(), number)


def thumbnail(dataset: Any, row: int) -> bytes:
    """A JPEG of a row's picture, at most 160 pixels a side."""
    return small_jpeg(dataset.image(row).convert("RGB"))


def small_jpeg(picture: Image.Image) -> bytes:
    """A JPEG of a picture in RGB, made at most 160 pixels a side."""
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return jpeg(picture)


def jpeg(picture: Image.Image) -> bytes:
    """A picture as a report embeds it."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85, optimize=True)
    return buffer.getvalue()
