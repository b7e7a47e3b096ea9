"""Integrating the flow from noise (t = 1) to a latent (t = 0).

A solver takes one step of ``dz/dt = field(z, t)`` from t to t_next. It may use the velocity of the
step before, which it then returns for the step after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

from unified.flow.path import STRAIGHT, Path

Field = Callable[[Tensor, Tensor], Tensor]
#: the velocity at the start of the previous step, and that step's length
Past = tuple[Tensor, Tensor] | None
Solver = Callable[[Field, Tensor, Tensor, Tensor, Past], tuple[Tensor, Past]]


def euler(field: Field, z: Tensor, t: Tensor, t_next: Tensor, past: Past) -> tuple[Tensor, Past]:
    """First order, one evaluation a step."""
    del past
    return z + (t_next - t) * field(z, t), None


def heun(field: Field, z: Tensor, t: Tensor, t_next: Tensor, past: Past) -> tuple[Tensor, Past]:
    """Second order, two evaluations a step."""
    del past
    first = field(z, t)
    second = field(z + (t_next - t) * first, t_next)
    return z + (t_next - t) * 0.5 * (first + second), None


def ab2(field: Field, z: Tensor, t: Tensor, t_next: Tensor, past: Past) -> tuple[Tensor, Past]:
    """Adams-Bashforth: second order and multistep, one evaluation a step; the first is Euler's."""
    v, h = field(z, t), t_next - t
    if past is None:
        return z + h * v, (v, h)
    before, h_before = past
    return z + h * (v + 0.5 * h / h_before * (v - before)), (v, h)


SOLVERS: dict[str, Solver] = {"euler": euler, "heun": heun, "ab2": ab2}


def named(solver: str) -> Solver:
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}; choose one of {', '.join(SOLVERS)}")
    return SOLVERS[solver]


def schedule(num_steps: int, like: Tensor, shift: float = 1.0) -> Tensor:
    """Timesteps [num_steps + 1] from 1 to 0 in the dtype of `like`, at least float32.

    The steps are equal at `shift` 1; above, ``s t / (1 + (s - 1) t)`` spends more of them on noise.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, found {num_steps}")
    dtype = torch.promote_types(like.dtype, torch.float32)
    t = torch.linspace(1, 0, num_steps + 1, dtype=dtype, device=like.device)
    return shift * t / (1 + (shift - 1) * t)


def integrate(
    field: Field, z: Tensor, num_steps: int, solver: str = "euler", shift: float = 1.0
) -> Tensor:
    """``z`` carried from t = 1 to t = 0, in at least float32."""
    step, past = named(solver), None
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    for t, t_next in pairwise(schedule(num_steps, z, shift)):
        z, past = step(field, z, t, t_next, past)
    return z


def renoise(z: Tensor, eps: Tensor, t: Tensor, t_next: Tensor, path: Path = STRAIGHT) -> Tensor:
    """``z`` at t taken back to the noisier t_next > t of the same path, with fresh noise `eps`."""
    (alpha, sigma), (alpha_next, sigma_next) = path.coefficients(t), path.coefficients(t_next)
    kept = alpha_next / alpha
    return kept * z + (sigma_next**2 - (kept * sigma) ** 2).clamp(min=0).sqrt() * eps


def repaint(
    field: Field,
    z: Tensor,
    known: Tensor,
    where: Tensor,
    noises: Iterator[Tensor],
    num_steps: int,
    solver: str,
    shift: float,
    share: float,
    times: int,
    path: Path = STRAIGHT,
) -> Tensor:
    """Partial repaint (paper 5.2, 17.1): noise `z` [N, C] becomes a latent, guided by `known`
    [N, C] at the positions `where` [N, 1].

    In the first `share` (m) of the steps, known positions are put on `path` at the step's t, and
    each of these steps is taken `times` (t) times, with the whole block re-noised in between. Then
    the block evolves freely, so the known part need not come out as it went in.
    """
    step, past = named(solver), None
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    for i, (t, t_next) in enumerate(pairwise(schedule(num_steps, z, shift))):
        guided = i < round(share * num_steps)
        for cycle in range(times if guided else 1):
            if cycle:
                z, past = renoise(z, next(noises), t_next, t, path), None
            if guided:
                z = torch.where(where, path.at(known, next(noises), t), z)
            z, past = step(field, z, t, t_next, past)
    return z
