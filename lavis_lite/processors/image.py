"""Pictures (PIL) to normalised float tensors, on torchvision's transforms v2.

Every random choice comes from torch's global generator, so that seeding it fixes the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from typing_extensions import Self

from lavis_lite.common.registry import registry
from lavis_lite.processors.randaugment import RandAugment
from lavis_lite.processors.rgb import as_seen

# Of CLIP's training images (RGB, 0..1); ViT-g of EVA-CLIP was trained with the same.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Triple = tuple[float, float, float]


class ImageProcessor:
    """A chain of transforms from a picture, as people see it (`as_seen`), to its normalised tensor float32[3, H, W].

    image_size: the side of a square, or (height, width), in pixels.
    mean, std: per channel, of values in 0..1; CLIP's when absent.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int] = 224,
        *,
        mean: Triple | None = None,
        std: Triple | None = None,
    ) -> None:
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.image_size = (int(height), int(width))
        self.mean = tuple(mean or CLIP_MEAN)
        self.std = tuple(std or CLIP_STD)
        self.transform = v2.Compose(
            [
                *self.to_pixels(),
                v2.ToDtype(torch.float32),
                # On 0..255, which spares a pass over the picture.
                v2.Normalize([255 * m for m in self.mean], [255 * s for s in self.std], inplace=True),
            ]
        )

    def to_pixels(self) -> list[Any]:
        """The transforms between the picture and its uint8[3, H, W] of `image_size`."""
        raise NotImplementedError

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any] | None = None) -> Self:
        """The processor with the keywords of a mapping; None gives the defaults."""
        return cls(**dict(cfg or {}))

    def __call__(self, image: Image.Image) -> Tensor:
        tensor: Tensor = self.transform(as_seen(image))
        return tensor


@registry.register_processor("blip_image_eval")
class BlipImageEval(ImageProcessor):
    """Resizes the whole picture to `image_size`, bicubic, its aspect ratio given up; nothing random."""

    def to_pixels(self) -> list[Any]:
        # By Pillow, as for the published scores: torch's faster resize is up to 5/255 off in single pixels.
        resize = v2.Resize(list(self.image_size), interpolation=InterpolationMode.BICUBIC, antialias=True)
        return [resize, v2.PILToTensor()]


@registry.register_processor("blip2_image_train")
class Blip2ImageTrain(ImageProcessor):
    """A random part of the picture resized to `image_size`, bicubic, and mirrored half of the time.

    min_scale, max_scale: bounds of the part's share of the picture's area.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int] = 224,
        *,
        mean: Triple | None = None,
        std: Triple | None = None,
        min_scale: float = 0.5,
        max_scale: float = 1.0,
    ) -> None:
        if not 0.0 < min_scale <= max_scale <= 1.0:
            raise ValueError(f"0 < min_scale <= max_scale <= 1 must hold, got {min_scale} and {max_scale}")
        self.scale = (min_scale, max_scale)
        super().__init__(image_size, mean=mean, std=std)

    def to_pixels(self) -> list[Any]:
        # By torch on uint8: 1.6 ms of processor time for a photograph of COCO where Pillow takes 3.6.
        return [v2.PILToTensor(), *self.crop_and_flip()]

    def crop_and_flip(self) -> list[Any]:
        """The random part and the mirroring, of pictures or of tensors."""
        crop = v2.RandomResizedCrop(
            list(self.image_size), scale=self.scale, interpolation=InterpolationMode.BICUBIC, antialias=True
        )
        return [crop, v2.RandomHorizontalFlip()]


@registry.register_processor("blip_image_train")
class BlipImageTrain(Blip2ImageTrain):
    """`blip2_image_train` followed by two random changes of light, sharpness, slant, place or angle."""

    def to_pixels(self) -> list[Any]:
        fill = [round(255 * channel) for channel in self.mean]
        return [*self.crop_and_flip(), RandAugment(num_ops=2, magnitude=5, fill=fill), v2.PILToTensor()]
