"""The image autoencoder's distance: absolute error of the pixels, and of their differences.

The L1 distance is -log p(x | z) of a Laplace distribution, up to scale and constant. Taken over the
differences of neighbouring pixels as well, it asks for edges in their place, which plain L1 gives
up first. All terms are sums; the counts say over how many numbers they run.

Shape legend: B images, H height, W width, 3 colours.
"""

from __future__ import annotations

from torch import Tensor


def absolute_error(x_B3HW: Tensor, y_B3HW: Tensor) -> Tensor:
    """Sum of |x - y| over all 3HW numbers of each image."""
    return (x_B3HW - y_B3HW).abs().sum()


def gradient_error(x_B3HW: Tensor, y_B3HW: Tensor) -> Tensor:
    """Sum of |dx - dy| over all horizontal and vertical neighbours; see `neighbours`."""
    error = x_B3HW - y_B3HW
    return error.diff(dim=-1).abs().sum() + error.diff(dim=-2).abs().sum()


def neighbours(height: int, width: int) -> int:
    """How many differences `gradient_error` sums for one image of 3 colours."""
    return 3 * (height * (width - 1) + (height - 1) * width)
