"""Small measures, and how sure one can be of their mean."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unified.randomness import generator


def psnr(x: Tensor, y: Tensor, peak: float = 1.0) -> float:
    """Peak signal-to-noise ratio ``10 log10(peak^2 / mean squared error)`` in dB.

    `x` and `y` have one shape and run from 0 to `peak`; equal ones give infinity.
    """
    if x.shape != y.shape:
        raise ValueError(f"PSNR compares tensors of one shape, found {x.shape} and {y.shape}")
    error = float((x.double() - y.double()).square().mean())
    return 10 * math.log10(peak**2 / error) if error else math.inf


#: the window and the constants of Wang et al. 2004
WINDOW, WINDOW_STD, K1, K2 = 11, 1.5, 0.01, 0.03


def ssim(x: Tensor, y: Tensor, peak: float = 1.0) -> float:
    """Structural similarity of two images, from about 0 (or below) to 1 for equal ones.

    `x` and `y` are [colours, height, width] and run from 0 to `peak`. Means, variances and the
    covariance are taken under a Gaussian window of 11 x 11 pixels (less where an image is smaller)
    wherever it fits, and the similarity

        (2 mx my + c1) (2 sxy + c2) / ((mx^2 + my^2 + c1) (sx^2 + sy^2 + c2)),  c = (k peak)^2

    is averaged over all places and colours (Wang et al. 2004).
    """
    if x.shape != y.shape or x.ndim != 3:
        raise ValueError(
            f"SSIM compares images [colours, height, width] of one shape, found {list(x.shape)}"
            f" and {list(y.shape)}"
        )
    a, b = x.double().cpu(), y.double().cpu()
    mean_a, mean_b, square_a, square_b, product = map(_windowed, (a, b, a * a, b * b, a * b))
    var_a, var_b = square_a - mean_a**2, square_b - mean_b**2
    covariance = product - mean_a * mean_b
    c1, c2 = (K1 * peak) ** 2, (K2 * peak) ** 2
    means = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return float((means * (2 * covariance + c2) / (var_a + var_b + c2)).mean())


def _windowed(x_CHW: Tensor) -> Tensor:
    """Averages under the Gaussian window, one axis after the other, where it fits."""
    for axis in (1, 2):
        size = min(WINDOW, x_CHW.shape[axis])
        place = torch.arange(size, dtype=x_CHW.dtype) - (size - 1) / 2
        weights = torch.exp(-0.5 * (place / WINDOW_STD) ** 2)
        places = x_CHW.unfold(axis, size, 1).unbind(-1)
        averages = torch.zeros_like(places[0])
        for shifted_CHW, weight in zip(places, (weights / weights.sum()).tolist(), strict=True):
            averages.add_(shifted_CHW, alpha=weight)
        x_CHW = averages
    return x_CHW


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
class Interval:
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
) -> Interval:
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
    return Interval(float(values_E.mean()), float(low), float(high), len(values_E))
