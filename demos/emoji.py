"""What is particular to the emoji data: names, styles, captions, and one common size.

A caption reads "a 3D emoji of blueberries": a style, then the name. The 3D emoji are 128 pixels
wide and the flat ones 64, so images are compared at `SIDE` pixels, the smaller of the two.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from PIL import Image

from unified.data.examples import Example
from unified.data.source import Source
from unified.latents.modality import Modality
from unified.modalities.text.tokenizer import Tokenizer

TEXT, IMAGE = "text", "image"
STYLES = ("3D", "flat")
SIDE = 64
CAPTION = re.compile(r"an? (\S+) emoji of (.+)", re.DOTALL)


@dataclass(frozen=True)
class Emoji:
    """One example: what it shows, and how it is drawn."""

    image: Image.Image
    caption: str
    name: str
    style: str


def read_emoji(source: Source, modalities: Mapping[str, Modality]) -> list[Emoji]:
    """All examples of a split. ValueError for one whose metadata is not an emoji's."""
    return [_read(Example(raw, modalities)) for raw in source]


def _read(example: Example) -> Emoji:
    told = example.metadata
    if told.get("style") not in STYLES or not told.get("name"):
        raise ValueError(
            f"shard {example.shard}, example {example.key}: an emoji's .json has a name and a"
            f" style, {' or '.join(STYLES)}; found {told}"
        )
    return Emoji(example[IMAGE], example[TEXT], told["name"], told["style"])


def named(caption: str) -> str:
    """The name in a caption; "" for a text that is no caption of the kind."""
    found = CAPTION.fullmatch(caption.strip())
    return found[2].strip() if found else ""


def says_style(caption: str, style: str) -> bool:
    """Whether `style` is the one style word of `caption`."""
    return [word for word in caption.split() if word in STYLES] == [style]


def name_tokens(tokenizer: Tokenizer, caption: str, name: str) -> list[bool]:
    """For every token of `caption`, whether it holds a character of the `name` it ends with."""
    if not name or not caption.endswith(name):
        raise ValueError(f"the caption {caption!r} should end with the name {name!r}")
    start = len(caption) - len(name)
    offsets = tokenizer.core.encode(caption, add_special_tokens=False).offsets
    return [stop > start for _, stop in offsets]


def common(image: Image.Image) -> Image.Image:
    """The image at `SIDE` x `SIDE` pixels."""
    size = (SIDE, SIDE)
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)
