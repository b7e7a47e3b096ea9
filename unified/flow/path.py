"""The path from latents to noise, and its velocity.

The path is straight, ``z_t = (1 - t) z_0 + t eps`` for t in [0, 1], so its velocity is constant,
``eps - z_0`` (rectified flow; paper 3.2.2 and 16.9). Sampling integrates ``dz/dt = v`` from t = 1
to 0 (`unified.flow.solvers`).
"""

from __future__ import annotations

from torch import Tensor


def path(z0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """``z_t = (1 - t) z_0 + t eps``; `t` broadcasts against `z0` [..., C]."""
    return (1 - t) * z0 + t * eps


def velocity(z0: Tensor, eps: Tensor) -> Tensor:
    """``dz_t/dt = eps - z_0``."""
    return eps - z0
