"""How long the examples of a task are taken to be, before any is seen.

An image has the size that was asked for, or the modality's default. A text has the length of the
task's limit; else what was asked for; else the longest that lets the example fit a packed row. An
item that the task brings itself (an instruction) is measured in characters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from unified.latents.modality import Modality
from unified.sequence.task import Task

Grids = dict[str, tuple[int, ...]]

#: characters per token of a text that the task brings itself
CHARACTERS = 4
#: an item to fill examples with, to see which segments do not take theirs from the example
_PROBE = "some words that no task has of its own"


@dataclass(frozen=True)
class Sizes:
    """What was asked for: tokens of a text, pixels of the side of an image."""

    text_tokens: int | None = None
    image_size: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("--text-tokens", self.text_tokens), ("--image-size", self.image_size)):
            if value is not None and value < 1:
                raise ValueError(f"{name} should be 1 or more, found {value}")

    def of(self, modality: Modality) -> tuple[int, ...]:
        """The grid of one item: text is what has one axis, and an image what has two."""
        default = modality.grid_for(None)
        asked = {1: self.text_tokens, 2: self.image_size}.get(len(default))
        return default if asked is None else modality.grid_for(asked)


def typical(
    task: Task, modalities: Mapping[str, Modality], sizes: Sizes, row_length: int, name: str
) -> Grids:
    """Kind -> grid of each filled segment of one example of `task`, named `name`.

    ValueError if it does not fit a row, though everything that was not asked for is cut.
    """
    grids, free = {}, set()
    own = _own_items(task, modalities)
    for segment in task.layout.filled:
        kind, modality = segment.kind, modalities[segment.modality]
        grid = sizes.of(modality)
        if kind in own:
            grid = modality.grid_for(-(-len(own[kind]) // CHARACTERS))
        elif len(grid) == 1 and kind in task.limits:
            grid = (task.limits[kind],)
        elif len(grid) == 1 and sizes.text_tokens is None:
            free.add(kind)
        grids[kind] = grid if len(grid) > 1 else (_whole(grid[0], segment.block),)
    return _fitted(task, grids, free, row_length, name)


def positions(task: Task, grids: Mapping[str, tuple[int, ...]]) -> int:
    """Positions of one example, twins included."""
    return sum(math.prod(grids[s.copies or s.kind]) for s in task.layout.segments)


def _fitted(task: Task, grids: Grids, free: set[str], row_length: int, name: str) -> Grids:
    """`grids` with the `free` segments cut, by whole blocks, until the example fits a row."""
    while positions(task, grids) > row_length:
        longest = max(free, key=lambda kind: grids[kind][0], default=None)
        step = (task.layout[longest].block or 1) if longest is not None else 0
        if longest is None or grids[longest][0] <= step:
            parts = " + ".join(
                f"{s.kind} {math.prod(grids[s.copies or s.kind])}" for s in task.layout.segments
            )
            raise ValueError(
                f"an example of {name} has {positions(task, grids)} latents ({parts}) and a row"
                f" holds {row_length}: choose shorter texts (a task's own limit goes before"
                " --text-tokens) or smaller images, or raise row_length"
            )
        grids[longest] = (grids[longest][0] - step,)
    return grids


def _whole(length: int, block: int | None) -> int:
    return -(-length // block) * block if block else length


def _own_items(task: Task, modalities: Mapping[str, Modality]) -> dict[str, str]:
    """Kind -> text that the task brings itself."""
    try:
        items = task.fill(dict.fromkeys(modalities, _PROBE))
    except Exception:  # a task may ask more of an item than a text can give
        return {}
    return {k: item for k, item in items.items() if isinstance(item, str) and item not in _PROBE}
