"""The density of a flow: change of variables along its trajectories (paper 3.1.2, 10.4).

Generation integrates ``dz/dt = v(z, t)`` from noise (t = 1) to a latent (t = 0). Followed backwards
from z_0, the same trajectory gives

    log p(z_0) = log N(z_1; 0, I) + integral over t from 0 to 1 of the divergence of v at z_t,

solved as one ODE over z and the integral. The divergence is exact (one backward pass per dimension)
or Hutchinson's estimate ``e^T (dv/dz) e``, whose probes e stay the same through a solve.

Shape legend: G groups whose velocities do not depend on one another (samples, or blocks of noisy
latents), D dimensions of a group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unified.config.schema import DensityConfig

Velocity = Callable[[Tensor, Tensor], Tensor]
Slope = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Tableau:
    """An explicit Runge-Kutta method: nodes c, stages a, weights b, and those of its error."""

    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    error: tuple[float, ...] = ()


TABLEAUX = {
    "euler": Tableau((0.0,), ((),), (1.0,)),
    "heun": Tableau((0.0, 1.0), ((), (1.0,)), (0.5, 0.5)),
    "rk4": Tableau(
        (0.0, 0.5, 0.5, 1.0),
        ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)),
        (1 / 6, 1 / 3, 1 / 3, 1 / 6),
    ),
    # Dormand and Prince, 1980
    "dopri5": Tableau(
        (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
        (
            (),
            (1 / 5,),
            (3 / 40, 9 / 40),
            (44 / 45, -56 / 15, 32 / 9),
            (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
            (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
            (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
        ),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0),
        (
            71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40,
        ),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Density:
    """``log_prob`` [G] in nats, the trajectories' ends ``z1`` [G, D], and evaluations of v."""

    log_prob: Tensor
    z1: Tensor
    evaluations: int


def log_density(
    velocity: Velocity,
    z0_GD: Tensor,
    config: DensityConfig | None = None,
    generator: torch.Generator | None = None,
    free_GD: Tensor | None = None,
) -> Density:
    """log p(z_0) of each group under the flow of ``velocity(z [G, D], t)``, in at least float32.

    Where `free_GD` is False a coordinate is a condition: it stays as it is and is not counted.
    """
    config = config or DensityConfig()
    z0_GD = z0_GD.detach().to(torch.promote_types(z0_GD.dtype, torch.float32))
    free = torch.ones_like(z0_GD) if free_GD is None else free_GD.to(z0_GD)
    directions = probes(z0_GD, config, generator) if config.trace == "hutchinson" else None
    count = [0]

    def slope(t: Tensor, y: Tensor) -> Tensor:
        count[0] += 1
        with torch.enable_grad():
            z = y[:, :-1].detach().requires_grad_()
            v = velocity(z, t) * free
            trace = exact(v, z) if directions is None else hutchinson(v, z, directions * free)
        return torch.cat([v.detach(), trace[:, None]], dim=1)

    y = torch.cat([z0_GD, torch.zeros_like(z0_GD[:, :1])], dim=1)
    y = solve(slope, y, config)
    z1, trace_G = y[:, :-1], y[:, -1]
    base_G = -0.5 * (free * (z1**2 + math.log(2 * math.pi))).sum(1)
    return Density(base_G + trace_G, z1, count[0])


def probes(like: Tensor, config: DensityConfig, generator: torch.Generator | None) -> Tensor:
    """Random directions [num_probes, G, D] with unit covariance."""
    shape = (config.num_probes, *like.shape)
    drawn = torch.randn(shape, generator=generator)
    if config.probes == "rademacher":
        drawn = drawn.sign()
    return drawn.to(like)


def hutchinson(v: Tensor, z: Tensor, directions: Tensor) -> Tensor:
    """Mean over probes of ``e^T (dv/dz) e`` [G]."""
    total = torch.zeros_like(v[:, 0])
    for i, e in enumerate(directions):
        (gradient,) = torch.autograd.grad(
            (v * e).sum(), z, retain_graph=i + 1 < len(directions), allow_unused=True
        )
        total = total + (0 if gradient is None else (gradient * e).sum(1))
    return total / len(directions)


def exact(v: Tensor, z: Tensor) -> Tensor:
    """``sum_i dv_i/dz_i`` [G], one backward pass per dimension."""
    dimensions = v.shape[1]
    total = torch.zeros_like(v[:, 0])
    if not v.requires_grad:
        return total
    for i in range(dimensions):
        (gradient,) = torch.autograd.grad(
            v[:, i].sum(), z, retain_graph=i + 1 < dimensions, allow_unused=True
        )
        total = total + (0 if gradient is None else gradient[:, i])
    return total


# ---- solving ------------------------------------------------------------------------------------


def solve(slope: Slope, y: Tensor, config: DensityConfig) -> Tensor:
    """``y`` carried from t = 0 to t = 1."""
    tableau = TABLEAUX[config.solver]
    if tableau.error:
        return adaptive(slope, y, tableau, config.tolerance)
    h = y.new_tensor(1 / config.num_steps)
    for i in range(config.num_steps):
        y, _ = runge_kutta(slope, i * h, y, h, tableau)
    return y


def runge_kutta(
    slope: Slope, t: Tensor, y: Tensor, h: Tensor, tableau: Tableau
) -> tuple[Tensor, Tensor]:
    """One step of size `h`, and its estimated error (0 for a method that has none)."""
    k: list[Tensor] = []
    for c, row in zip(tableau.c, tableau.a, strict=True):
        k.append(slope(t + c * h, y + h * combine(row, k, y)))
    error = combine(tableau.error, k[: len(tableau.error)], y)
    return y + h * combine(tableau.b, k, y), h * error


def combine(weights: Sequence[float], slopes: Sequence[Tensor], like: Tensor) -> Tensor:
    """The weighted sum of `slopes`; 0 if there are none."""
    total = torch.zeros_like(like)
    for weight, slope in zip(weights, slopes, strict=True):
        total = total + weight * slope
    return total


def adaptive(slope: Slope, y: Tensor, tableau: Tableau, tolerance: float) -> Tensor:
    """Steps as long as the tolerance allows, for the group that needs the shortest."""
    t, h = y.new_tensor(0.0), y.new_tensor(0.05)
    smallest = 8 * torch.finfo(y.dtype).eps
    while float(t) < 1:
        h = torch.minimum(h, 1 - t)
        proposed, error = runge_kutta(slope, t, y, h, tableau)
        scale = tolerance * (1 + torch.maximum(y.abs(), proposed.abs()))
        worst = float((error / scale).square().mean(1).sqrt().max())
        if not math.isfinite(worst):
            raise ValueError(f"the flow's ODE diverges at t = {float(t):.4f}")
        if worst <= 1:
            t, y = t + h, proposed
        h = h * min(5.0, max(0.2, 0.9 * max(worst, 1e-10) ** -0.2))
        if float(h) < smallest:
            raise ValueError(
                f"the flow's ODE is too stiff at t = {float(t):.4f} for tolerance {tolerance};"
                " raise it, or take a fixed-step solver"
            )
    return y
