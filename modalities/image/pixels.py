"""From bytes to pixels that tile into latents: read, turn upright, flatten, fit, and back.

Bytes come from the internet, so nothing here trusts them: only plain raster formats are tried, the
size is judged by the header before any pixel is decoded, and whatever a decoder stumbles over
becomes one `ValueError`. An image is never squashed: it is scaled down (never up) by one factor for
both sides, and what does not fill whole latent cells is cut off evenly. Which shape an image is
brought to is up to its own size (`cells`), or to a few sizes for all (`buckets`).

Shape legend: H height, W width.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

#: container formats that are tried; others (EPS runs an interpreter) are refused
FORMATS = ("WEBP", "PNG", "JPEG", "GIF")
WHITE = (255, 255, 255, 255)


def read_image(data: bytes, max_source_pixels: int) -> Image.Image:
    """The (first) image in `data`, upright and RGB.

    Raises `ValueError` for bytes that are empty, no image, damaged, or an image of more than
    `max_source_pixels` pixels.
    """
    if not data:
        raise ValueError("an image file of 0 bytes was found: a WebP, PNG, JPEG or GIF is needed")
    try:
        source = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f"{len(data)} bytes are no WebP, PNG, JPEG or GIF image") from None
    except Exception as error:  # decoders raise nearly anything on hostile bytes
        raise ValueError(
            f"{len(data)} bytes are no readable WebP, PNG, JPEG or GIF image: {error}"
        ) from error
    with source:
        return upright_rgb(source, max_source_pixels)


def upright_rgb(image: Image.Image, max_source_pixels: int) -> Image.Image:
    """`image` with its EXIF rotation applied, as RGB; transparent pixels show white.

    `image` may still be undecoded (as `PIL.Image.open` leaves it). Raises `ValueError` as
    `read_image` does.
    """
    width, height = image.size
    if width * height > max_source_pixels:
        raise ValueError(
            f"an image of {width} x {height} pixels was found: at most {max_source_pixels} pixels"
            " are decoded (max_source_pixels)"
        )
    try:
        return _flatten(ImageOps.exif_transpose(image))
    except Exception as error:
        raise ValueError(
            f"the {width} x {height} {image.format or image.mode} image is damaged and cannot be"
            f" decoded: {error}"
        ) from error


def _flatten(image: Image.Image) -> Image.Image:
    """`image` of any mode as 8-bit RGB, laid over white where it has transparency."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed white; convert them to 8 bits first")
    if image.mode.startswith("I"):  # 16 bits per pixel, in a 16- or 32-bit integer
        wide = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        image = Image.fromarray((wide // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image)
    return image.convert("RGB")


def cells(width: int, height: int, max_size: int, cell: int) -> tuple[int, int]:
    """Rows and columns of `cell` x `cell` pixels that an image of this size is fitted to.

    As many as the image fills after scaling its area down to `max_size` squared (never up), at
    least one each way, and never more than that area holds.
    """
    shorter = min(width, height)
    if shorter < cell:
        raise ValueError(
            f"an image of {width} x {height} pixels was found: each side must be {cell} or more"
        )
    budget = (max_size // cell) ** 2

    def fit(side: int, other: int) -> int:
        # floor(side * max_size / sqrt(side * other)), in exact integers
        scaled = min(side, math.isqrt(max_size**2 * side // other))
        return min(max(scaled // cell, 1), budget)

    return fit(height, width), fit(width, height)


def fit_image(image: Image.Image, max_size: int, cell: int) -> Image.Image:
    """`image` scaled down where its area exceeds `max_size` squared, and cut to whole cells."""
    width, height = image.size
    rows, columns = cells(width, height, max_size, cell)
    target = (columns * cell, rows * cell)
    if width * height > max_size**2:
        return cover(image, target)
    return cut(image, target, 1.0)


def cover(image: Image.Image, target: tuple[int, int]) -> Image.Image:
    """`image` scaled to cover `target` (width, height), and what stands over cut off evenly."""
    return cut(image, target, max(target[0] / image.width, target[1] / image.height))


def cut(image: Image.Image, target: tuple[int, int], scale: float) -> Image.Image:
    """The middle of `image`, scaled by `scale`: `target` (width, height) pixels of it."""
    width, height = image.size
    # a quotient may come out a rounding error above the side
    box_width, box_height = min(target[0] / scale, width), min(target[1] / scale, height)
    left, top = (width - box_width) // 2, (height - box_height) // 2
    box = (left, top, min(left + box_width, width), min(top + box_height, height))
    return image.resize(target, Image.Resampling.LANCZOS, box=box)


def tiled(rows: Sequence[Sequence[Image.Image]], gap: int = 4) -> Image.Image:
    """Rows of images in one, on white; every image is in the middle of its column and row."""
    columns = list(zip(*rows, strict=True))
    wide = [max(image.width for image in column) + gap for column in columns]
    high = [max(image.height for image in row) + gap for row in rows]
    sheet = Image.new("RGB", (sum(wide) + gap, sum(high) + gap), "white")
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            left, top = gap + sum(wide[:c]), gap + sum(high[:r])
            space = (wide[c] - gap - image.width, high[r] - gap - image.height)
            sheet.paste(image, (left + space[0] // 2, top + space[1] // 2))
    return sheet


def to_tensor(image: Image.Image) -> Tensor:
    """RGB `image` as uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def to_image(pixels_3HW: Tensor) -> Image.Image:
    """uint8 [3, H, W] as an RGB image."""
    return Image.fromarray(pixels_3HW.permute(1, 2, 0).contiguous().cpu().numpy())


def to_unit(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 pixels as `dtype` in [-1, 1]."""
    return pixels.to(dtype) / 127.5 - 1


def to_bytes(unit: Tensor) -> Tensor:
    """Pixels in [-1, 1] (clipped to it) as uint8."""
    return ((unit.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
