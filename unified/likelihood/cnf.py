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
from dataclasses import dataclass

import torch
from torch import Tensor

from unified.config.schema import DensityConfig
from unified.flow.solvers import SOLVERS, Adaptive, Field, integrate, to_noise


@dataclass(frozen=True)
class Density:
    """``log_prob`` [G] in nats, the trajectories' ends ``z1`` [G, D], and evaluations of v."""

    log_prob: Tensor
    z1: Tensor
    evaluations: int


def log_density(
    velocity: Field,
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

    def slope(y: Tensor, t: Tensor) -> Tensor:
        count[0] += 1
        with torch.enable_grad():
            z = y[:, :-1].detach().requires_grad_()
            v = velocity(z, t) * free
            trace = exact(v, z) if directions is None else hutchinson(v, z, directions * free)
        return torch.cat([v.detach(), trace[:, None]], dim=1)

    y = torch.cat([z0_GD, torch.zeros_like(z0_GD[:, :1])], dim=1)
    adaptive = SOLVERS[config.solver].error
    steps = Adaptive(config.tolerance, y) if adaptive else to_noise(config.num_steps, y)
    y = integrate(slope, y, steps, config.solver)
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
