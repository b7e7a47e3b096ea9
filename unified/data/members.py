"""Members of a shard by their endings, read without any model.

    webp, png, jpg, jpeg, gif   an image            txt   a text, UTF-8            json   an object

A further member of a kind has a name before its ending: ``source.webp`` is the image ``source``.

This is what packing and checking know; what training makes of a member is a modality's part.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from unified.errors import as_text

#: format -> the ending of its members
ENDINGS = {"WEBP": "webp", "PNG": "png", "JPEG": "jpg", "GIF": "gif"}
IMAGES = (*ENDINGS.values(), "jpeg")
#: an image of more pixels is not decoded, unless a modality says so
MAX_PIXELS = 64_000_000
#: EXIF: the tag of the orientation, and those of its values that swap width and height
ORIENTATION, SWAPPED = 0x0112, {5, 6, 7, 8}


def split_item(name: str) -> tuple[str, str]:
    """("source", "image") of ``source.image``, ("", "image") of ``image``; a member's ending is
    split in the same way."""
    item, _, kind = name.rpartition(".")
    return item, kind


def join_item(item: str, kind: str) -> str:
    """The way back from `split_item`."""
    return f"{item}.{kind}" if item else kind


def items_of(ending: str, extensions: Mapping[str, Sequence[str]]) -> list[tuple[str, str]]:
    """(name of the item, modality) of all that a member may be read as; `extensions` are those of
    each modality. An ending that is one of theirs as a whole, dots and all, names no item."""
    whole = any(ending in own for own in extensions.values())
    return [
        (ending[: -len(e) - 1], modality)
        for modality, own in extensions.items()
        for e in own
        if ending == e or (ending.endswith(f".{e}") and not whole)
    ]


def open_image(data: bytes) -> Image.Image:
    """The image whose header `data` begins with, not decoded. ValueError if there is none."""
    try:
        return Image.open(io.BytesIO(data), formats=tuple(ENDINGS))
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from None
    except Exception:  # decoders raise nearly anything on bytes that are no image
        raise ValueError(f"{len(data)} bytes are no WebP, PNG, JPEG or GIF image") from None


def check_pixels(image: Image.Image) -> None:
    """ValueError for an image of more than `MAX_PIXELS`."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} is above the limit of {MAX_PIXELS:,} pixels")


def decode_image(data: bytes) -> Image.Image:
    """The image with all of its pixels. ValueError for one that is damaged, or too large."""
    image = open_image(data)
    check_pixels(image)
    try:
        image.load()
    except Exception as error:
        raise ValueError(f"the {image.format} image is damaged: {error}") from None
    return image


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) once the EXIF rotation is applied."""
    width, height = image.size
    try:
        turned = image.getexif().get(ORIENTATION) in SWAPPED
    except Exception:  # a damaged EXIF block says nothing
        turned = False
    return (height, width) if turned else (width, height)


def read_text(data: bytes) -> str:
    """ValueError for bytes that are no UTF-8."""
    return as_text(data, "it")


def read_record(data: bytes) -> dict[str, Any]:
    """ValueError for what is no JSON object."""
    try:
        record = json.loads(data)
    except ValueError as error:
        raise ValueError(f"it is no JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"it should hold an object, found {type(record).__name__}")
    return record


READERS: Mapping[str, Callable[[bytes], Any]] = {
    "txt": read_text,
    "json": read_record,
    **dict.fromkeys(IMAGES, open_image),
}


def read_member(ending: str, data: bytes) -> Any:
    """The member as text, object or (undecoded) image; other members stay bytes.

    ValueError, which names the ending, for one that is empty or not what its ending says.
    """
    try:
        if not data:
            raise ValueError("it is empty (0 bytes)")
        return READERS.get(split_item(ending)[1], bytes)(data)
    except ValueError as error:
        raise ValueError(f".{ending}: {error}") from None
