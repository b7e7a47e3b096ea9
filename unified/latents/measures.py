"""How near a reconstruction comes."""

from __future__ import annotations

import math

import torch
from torch import Tensor


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
