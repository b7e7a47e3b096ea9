"""How long the examples of a task are taken to be, before any is seen.

An item has the size that was asked for, or its modality's default. What runs along one axis (a
text, a sound) has the length of the task's limit; else what was asked for; else the longest that
lets the example fit a packed row. A text that the task brings itself (an instruction) is measured
in characters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from unified.errors import did_you_mean
from unified.latents.modality import Modality
from unified.sequence.task import Task

Grids = dict[str, tuple[int, ...]]

#: characters per token of a text that the task brings itself
CHARACTERS = 4
#: an item to fill examples with, to see which segments do not take theirs from the example
_PROBE = "some words that no task has of its own"
#: option of `unified plan` -> what it counts: the unit of the modalities that it is for
UNITS = {"--text-tokens": "tokens", "--image-size": "pixels"}


@dataclass(frozen=True)
class Sizes:
    """What was asked for: tokens of a text, pixels of the side of an image, and the size of any
    modality by name, in its own unit."""

    text_tokens: int | None = None
    image_size: int | None = None
    named: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        options = dict(zip(UNITS, (self.text_tokens, self.image_size), strict=True))
        for name, value in (options | {f"--size {m}": n for m, n in self.named.items()}).items():
            if value is not None and value < 1:
                raise ValueError(f"{name} should be 1 or more, found {value}")

    def asked(self, name: str, modality: Modality) -> int | None:
        """The size of items of a modality, if one was asked for: by its name, or by its unit."""
        by_unit = dict(zip(UNITS.values(), (self.text_tokens, self.image_size), strict=True))
        return self.named.get(name, by_unit.get(modality.unit))


def typical(
    task: Task, modalities: Mapping[str, Modality], sizes: Sizes, row_length: int, name: str
) -> Grids:
    """Kind -> grid of each filled segment of one example of `task`, named `name`.

    ValueError if it does not fit a row, though everything that was not asked for is cut.
    """
    unknown = set(sizes.named) - set(modalities)
    if unknown:
        near = did_you_mean(min(unknown), modalities)
        raise ValueError(f"--size names the modality {min(unknown)!r}, which is not there; {near}")
    grids, free = {}, set()
    own = _own_items(task)
    for segment in task.layout.filled:
        kind, modality = segment.kind, modalities[segment.modality]
        asked = sizes.asked(segment.modality, modality)
        grid = modality.grid_for(asked)
        if kind in own and modality.is_text:
            grid = modality.grid_for(-(-len(own[kind]) // CHARACTERS))
        elif len(grid) == 1 and kind in task.limits:
            grid = (task.limits[kind],)
        elif len(grid) == 1 and asked is None and segment.positions_of is None:
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


def _own_items(task: Task) -> dict[str, str]:
    """Kind -> text that the task brings itself."""
    try:
        items = task.fill(_Anything())
    except Exception:  # a task may ask more of an item than a text can give
        return {}
    return {k: item for k, item in items.items() if isinstance(item, str) and item not in _PROBE}


class _Anything(dict[str, str]):
    """An example that has whatever it is asked for: the same words."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> str:
        return _PROBE
