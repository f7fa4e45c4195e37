"""What a batch is: the one contract between datasets and models, which never import each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias, TypedDict

import torch
from torch import Tensor

from lavis_lite.common import dist
from lavis_lite.common.errors import InputError
from lavis_lite.image_features import ImageFeatures

# Pictures as their encoder takes them, or what the frozen encoder made of them before.
Images: TypeAlias = Tensor | ImageFeatures


class ImageTextSamples(TypedDict):
    """A batch of image-text pairs, every field always present.

    image: float32[B, 3, H, W], normalised as the encoder expects, or the frozen encoder's features of such;
        float32[B, F, 3, H, W], the frames of clips, where the model takes them.
    text_input: B strings.
    image_id: int64[B]; rows with equal ids show the same picture.
    """

    image: Images
    text_input: list[str]
    image_id: Tensor


class QuestionSamples(ImageTextSamples):
    """A batch of questions about pictures with their answers, every field always present.

    text_input: the B questions. text_output: B answers, what a language model learns to say.
    """

    text_output: list[str]


def image_of(samples: Mapping[str, Any]) -> Images:
    """The images of a caller's dictionary; InputError when they are absent or not [B, 3, H, W]."""
    image = samples.get("image")
    if isinstance(image, ImageFeatures):
        return image
    if not isinstance(image, Tensor) or image.dim() != 4 or image.shape[1] != 3:
        found = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
        hint = "; this model takes no clips" if image is None and samples.get("video") is not None else ""
        raise InputError(f"samples['image'] must be a float tensor [B, 3, H, W], not {found}{hint}")
    return image


def visual_key(samples: Mapping[str, Any]) -> str:
    """Whether a caller's dictionary shows an "image" or a "video"; InputError when it has neither or both."""
    found = [key for key in ("image", "video") if samples.get(key) is not None]
    if len(found) != 1:
        raise InputError(
            "samples need 'image', a tensor [B, 3, H, W], or 'video', a tensor [B, F, 3, H, W]"
            + (", and not both" if found else f"; there are: {', '.join(map(str, samples)) or 'none'}")
        )
    return found[0]


def visual_of(samples: Mapping[str, Any]) -> Images:
    """The images [B, 3, H, W] or the clips' frames [B, F, 3, H, W] of a caller's dictionary.

    Raises InputError when there are none, or of another shape.
    """
    if visual_key(samples) == "image":
        return image_of(samples)
    video = samples["video"]
    if not isinstance(video, Tensor) or video.dim() != 5 or video.shape[2] != 3 or video.shape[1] == 0:
        found = list(video.shape) if isinstance(video, Tensor) else type(video).__name__
        raise InputError(f"samples['video'] must be a float tensor [B, F, 3, H, W], not {found}")
    return video


def complete_samples(samples: Mapping[str, Any], *, clips: bool = False) -> ImageTextSamples:
    """The typed batch behind a caller's dictionary: the only place where a missing field gets its meaning.

    clips: whether the model takes clips (`samples["video"]`) as well as images.

    `text_input` may be one string for all images. Without `image_id` every row is its own picture
    (negative ids, different on every rank, which no dataset gives).

    Raises InputError when `image` is absent or not [B, 3, H, W], texts are absent or no strings, or there are
    not as many texts and ids as images.
    """
    image = visual_of(samples) if clips else image_of(samples)
    batch = len(image)
    texts = texts_of(samples, "text_input", batch=batch)
    image_id = samples.get("image_id")
    if image_id is None:
        image_id = -1 - (torch.arange(batch) + dist.rank() * 2**32)
    ids = torch.as_tensor(image_id)
    if ids.shape != (batch,):
        raise InputError(
            f"samples['image_id'] must have {batch} numbers, one an image, not {list(ids.shape)}"
        )
    return {"image": image, "text_input": texts, "image_id": ids.to(image.device)}


def complete_questions(samples: Mapping[str, Any]) -> QuestionSamples:
    """The typed batch of questions about images or clips, and answers, behind a caller's dictionary.

    Raises InputError as `complete_samples`, and for an answer that is absent or empty: a batch of a split without
    answers can't be learnt from.
    """
    batch = complete_samples(samples, clips=True)
    answers = texts_of(samples, "text_output", batch=len(batch["image"]))
    if not all(answer.strip() for answer in answers):
        raise InputError("samples['text_output'] has an empty answer: these questions come without answers")
    return {**batch, "text_output": answers}


def texts_of(samples: Mapping[str, Any], key: str, *, batch: int) -> list[str]:
    """One text an image: `samples[key]`, a string for all or a list of one each; InputError for anything else."""
    texts = samples.get(key)
    texts = [texts] * batch if isinstance(texts, str) else texts
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise InputError(f"samples['{key}'] must be a string or a list of strings, one for each image")
    if len(texts) != batch:
        raise InputError(f"samples['{key}'] has {len(texts)} texts for {batch} images")
    return list(texts)


def prompts_of(samples: Mapping[str, Any], *, batch: int, default: str) -> list[str]:
    """One prompt an image: `samples["prompt"]`, a string for all or a list of one each; by default `default`.

    Raises InputError for a list of another length or something that is no string.
    """
    prompt = samples.get("prompt")
    prompt = default if prompt is None else prompt
    prompts = [prompt] * batch if isinstance(prompt, str) else prompt
    if not isinstance(prompts, (list, tuple)) or not all(isinstance(text, str) for text in prompts):
        raise InputError("samples['prompt'] must be a string or a list of strings, one for each image")
    if len(prompts) != batch:
        raise InputError(
            f"samples['prompt'] has {len(prompts)} prompts for {batch} images: give one, or one each"
        )
    return list(prompts)
