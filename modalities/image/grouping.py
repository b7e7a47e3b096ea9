"""Things of one shape run through a network together; the order of all of them is kept."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")
Result = TypeVar("Result")


def together(
    items: Sequence[Item],
    key: Callable[[Item], Hashable],
    forward: Callable[[Sequence[Item]], Sequence[Result]],
) -> list[Result]:
    """`forward` over the items of each key at once; the results in the order of `items`."""
    results: dict[int, Result] = {}
    for indices in _alike(items, key):
        results.update(zip(indices, forward([items[i] for i in indices]), strict=True))
    return [results[index] for index in range(len(items))]


def stacked(items: Sequence[Tensor]) -> list[Tensor]:
    """The items of each shape as one tensor [B, ...], in the order in which shapes first appear."""
    groups = _alike(items, lambda item: item.shape)
    return [torch.stack([items[i] for i in indices]) for indices in groups]


def _alike(items: Sequence[Item], key: Callable[[Item], Hashable]) -> list[list[int]]:
    """The places of the items of each key, in the order in which keys first appear."""
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for index, item in enumerate(items):
        groups[key(item)].append(index)
    return list(groups.values())
