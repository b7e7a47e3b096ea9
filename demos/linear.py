"""What as many numbers an image reach without learning much: thumbnails and principal components.

Shape legend: N images, D = 3 * side * side numbers of an image.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unified.evaluation.pca import PCA
from unified.latents.measures import psnr


def mean_psnr(originals: Sequence[Image.Image], copies: Sequence[Image.Image]) -> float:
    """Mean over the images of their PSNR in dB, on pixels in [0, 1]."""
    found = [psnr(unit(x), unit(y)) for x, y in zip(originals, copies, strict=True)]
    return sum(found) / len(found)


def thumbnail(image: Image.Image, side: int) -> Image.Image:
    """`image` by way of `side` x `side` pixels: bicubic down, and up again."""
    small = image.resize((side, side), Image.Resampling.BICUBIC)
    return small.resize(image.size, Image.Resampling.BICUBIC)


class ImagePCA:
    """Principal components of square images of one size."""

    def __init__(self, images: Sequence[Image.Image], components: int):
        self.side = images[0].width
        self.pca = PCA.fit(self._vectors(images), components)

    def reconstruct(self, images: Sequence[Image.Image], components: int) -> list[Image.Image]:
        """`images`, of any size, from `components` numbers each."""
        size = (self.side, self.side)
        fitted = [i.resize(size, Image.Resampling.BICUBIC) if i.size != size else i for i in images]
        back_ND = self.pca.reconstruct(self._vectors(fitted), components)
        back = [picture(x_D.view(3, *size)) for x_D in back_ND]
        return [
            b.resize(i.size, Image.Resampling.BICUBIC) for b, i in zip(back, images, strict=True)
        ]

    def _vectors(self, images: Sequence[Image.Image]) -> Tensor:
        return torch.stack([unit(image).flatten() for image in images])


def unit(image: Image.Image) -> Tensor:
    """RGB pixels [3, H, W] in [0, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def picture(unit_3HW: Tensor) -> Image.Image:
    bytes_HW3 = (unit_3HW.clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    return Image.fromarray(bytes_HW3.numpy())
