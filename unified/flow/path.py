"""The path from latents to noise, and its velocity."""

from __future__ import annotations

from torch import Tensor


def path(z0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """``z_t = (1 - t) z_0 + t eps``; `t` broadcasts against `z0` [..., C]."""
    return (1 - t) * z0 + t * eps


def velocity(z0: Tensor, eps: Tensor) -> Tensor:
    """``dz_t/dt = eps - z_0``."""
    return eps - z0
