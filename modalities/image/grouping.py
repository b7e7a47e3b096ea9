"""Things of one shape run through a network together; the order of all of them is kept."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def together(
    items: Sequence[Item],
    key: Callable[[Item], Hashable],
    forward: Callable[[Sequence[Item]], Sequence[Result]],
) -> list[Result]:
    """`forward` over the items of each key at once; the results in the order of `items`."""
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for index, item in enumerate(items):
        groups[key(item)].append(index)
    results: dict[int, Result] = {}
    for indices in groups.values():
        results.update(zip(indices, forward([items[i] for i in indices]), strict=True))
    return [results[index] for index in range(len(items))]
