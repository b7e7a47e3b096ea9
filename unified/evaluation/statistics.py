"""Small measures, and how sure one can be of their mean."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unified.randomness import generator


def edit_distance(a: Sequence[object], b: Sequence[object]) -> int:
    """Least number of insertions, deletions and substitutions from `a` to `b` (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            best = min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
            previous, row[j] = row[j], best
    return row[-1]


def normalised_edit_distance(a: Sequence[object], b: Sequence[object]) -> float:
    """`edit_distance` over the longer length: 0 for equal ones, 1 where nothing is shared."""
    return edit_distance(a, b) / max(len(a), len(b), 1)


@dataclass(frozen=True)
class ConfidenceInterval:
    """A mean of `count` values, and the percentile bootstrap interval around it."""

    mean: float
    low: float
    high: float
    count: int

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


def bootstrap(
    values: Tensor,
    level: float = 0.95,
    resamples: int = 4000,
    seed: int = 0,
    groups: Sequence[Hashable] | None = None,
) -> ConfidenceInterval:
    """The mean of `values` [E] with its interval: E values are drawn anew, with replacement,
    `resamples` times, and the middle share `level` of the means so found is kept.

    With `groups`, whole groups are drawn, since values of one group are not independent.
    ValueError for no values, and for one that is not finite.
    """
    values_E = values.double().flatten().cpu()
    if not len(values_E) or not values_E.isfinite().all():
        raise ValueError(f"the bootstrap needs finite values, found {len(values_E)} of them")
    names = range(len(values_E)) if groups is None else groups
    places = {name: place for place, name in enumerate(dict.fromkeys(names))}
    of_E = torch.tensor([places[name] for name in names])
    sums_G, counts_G = (
        torch.zeros(len(places), dtype=torch.float64).index_add(0, of_E, x)
        for x in (values_E, torch.ones_like(values_E))
    )
    drawn_SG = torch.randint(
        len(places), (resamples, len(places)), generator=generator(seed, "bootstrap")
    )
    means_S = sums_G[drawn_SG].sum(1) / counts_G[drawn_SG].sum(1)
    tail = (1 - level) / 2
    low, high = torch.quantile(means_S, torch.tensor([tail, 1 - tail], dtype=torch.float64))
    return ConfidenceInterval(float(values_E.mean()), float(low), float(high), len(values_E))
