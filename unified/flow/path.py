"""The path from a latent (t = 0) to noise (t = 1), and its velocity.

    z_t = alpha(t) z_0 + sigma(t) eps        dz_t/dt = alpha'(t) z_0 + sigma'(t) eps

A path begins at the latent (alpha 1, sigma 0) and ends at noise from N(0, I) (alpha 0, sigma 1).
``flow.path`` names it: training puts latents on it and regresses its velocity, partial repaint and
the instruments put latents on it again. Integrating the velocity, be it to generate or for a
density, needs no path.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Path(ABC):
    """One path, which is two methods; both give tensors like `t`, or that broadcast with it."""

    @abstractmethod
    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha(t) and sigma(t)."""

    @abstractmethod
    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Their derivatives, alpha'(t) and sigma'(t)."""

    def at(self, z0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """``z_t``; `t` broadcasts against `z0` [..., C]."""
        alpha, sigma = self.coefficients(t)
        return alpha * z0 + sigma * eps

    def velocity(self, z0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """``dz_t/dt``; `t` broadcasts against `z0` [..., C]."""
        fall, rise = self.rates(t)
        return fall * z0 + rise * eps

    def check(self, name: str) -> None:
        """ValueError, which calls it `name`, unless this is a path: its ends are a latent and
        noise, some of the latent is left before the end, and the rates are its derivatives."""
        self._check_ends(name)
        t, h = torch.linspace(0.05, 0.95, 19, dtype=torch.float64, device="cpu"), 1e-5
        alpha, _ = self.coefficients(t)
        if not (alpha > 0).all():
            raise ValueError(
                f"the path {name!r}: alpha is 0 or less at t = {float(t[alpha <= 0][0]):.2g}, where"
                " it still has to be above 0"
            )
        ahead, behind = self.coefficients(t + h), self.coefficients(t - h)
        for rate, after, before in zip(self.rates(t), ahead, behind, strict=True):
            wrong = (rate - (after - before) / (2 * h)).abs() > 1e-4 * (1 + rate.abs())
            if wrong.any():
                raise ValueError(
                    f"the path {name!r}: its rates are not the derivatives of its coefficients: at"
                    f" t = {float(t[wrong][0]):.2g} they differ"
                )

    def _check_ends(self, name: str) -> None:
        for end, wanted in ((0.0, (1.0, 0.0)), (1.0, (0.0, 1.0))):
            t = torch.tensor(end, dtype=torch.float64, device="cpu")
            found = tuple(float(x) for x in self.coefficients(t))
            if any(not abs(x - y) < 1e-6 for x, y in zip(found, wanted, strict=True)):
                raise ValueError(
                    f"the path {name!r} has alpha {found[0]:.3g} and sigma {found[1]:.3g} at t ="
                    f" {end:g}, where a path has {wanted[0]:g} and {wanted[1]:g}"
                )
            if not all(math.isfinite(float(x)) for x in self.rates(t)):
                raise ValueError(f"the path {name!r}: its rates are not finite at t = {end:g}")


class Straight(Path):
    """``(1 - t) z_0 + t eps``: the velocity ``eps - z_0`` is constant (rectified flow; paper 3.2.2
    and 16.9)."""

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.ones_like(t), torch.ones_like(t)

    def velocity(self, z0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return eps - z0


class Cosine(Path):
    """``cos(pi t / 2) z_0 + sin(pi t / 2) eps``: latents of unit variance keep it along the path
    (the trigonometric interpolant of Albergo and Vanden-Eijnden, arXiv 2209.15571)."""

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        # the cosine as a sine, which is 0 to the last bit at t = 1
        return torch.sin(math.pi / 2 * (1 - t)), torch.sin(math.pi / 2 * t)

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.coefficients(t)
        return -math.pi / 2 * sigma, math.pi / 2 * alpha


#: the path of a model whose configuration names no other
STRAIGHT = Straight()
