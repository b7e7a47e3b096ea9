"""Solving the flow's ODE ``dz/dt = field(z, t)``: from noise (t = 1) to a latent (t = 0) to
generate, from a latent to noise for its density.

A solver is data, an explicit Runge-Kutta method, and `integrate` takes its steps. Those of a fixed
number are a list; `Adaptive` makes its own, as long as a tolerance allows.

Shape legend: G groups that an adaptive solver judges each by itself, D dimensions of a group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from unified.flow.path import STRAIGHT, Path

Field = Callable[[Tensor, Tensor], Tensor]
#: (number of the step, z) -> what the step is to begin from
Prepare = Callable[[int, Tensor], Tensor]


class SolverStep(NamedTuple):
    """The timesteps that a step leads from and to, and its length before any rounding."""

    t: Tensor
    t_next: Tensor
    h: Tensor


@dataclass(frozen=True)
class Solver:
    """An explicit Runge-Kutta method: nodes c, stages a, weights b, and those of its error where it
    estimates one. A `multistep` method extrapolates its slope from that of the step before."""

    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    error: tuple[float, ...] = ()
    multistep: bool = False


SOLVERS = {
    "euler": Solver((0.0,), ((),), (1.0,)),
    "heun": Solver((0.0, 1.0), ((), (1.0,)), (0.5, 0.5)),
    # Adams-Bashforth of second order; its first step is Euler's
    "ab2": Solver((0.0,), ((),), (1.0,), multistep=True),
    "rk4": Solver(
        (0.0, 0.5, 0.5, 1.0),
        ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)),
        (1 / 6, 1 / 3, 1 / 3, 1 / 6),
    ),
    # Dormand and Prince, 1980
    "dopri5": Solver(
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


def named(solver: str) -> Solver:
    """The solver of that name; ValueError if there is none."""
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}; choose one of {', '.join(SOLVERS)}")
    return SOLVERS[solver]


def integrate(
    field: Field,
    z: Tensor,
    steps: Iterable[SolverStep],
    solver: str = "euler",
    prepare: Prepare | None = None,
) -> Tensor:
    """``z`` carried over `steps`, in at least float32; each begins from what `prepare` makes of it.

    A step that does not begin where the last one ended is the first of a new trajectory.
    """
    method, before = named(solver), None
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    for number, (t, t_next, h) in enumerate(steps):
        z = z if prepare is None else prepare(number, z)
        k: list[Tensor] = []
        for c, row in zip(method.c, method.a, strict=True):
            # the ends are the schedule's own, without rounding: networks look them up
            at = t if c == 0 else t_next if c == 1 else t + c * h
            k.append(field(z + h * weighted(row, k) if row else z, at))
        slope = weighted(method.b, k)
        if method.multistep and before is not None and before[0] is t:
            _, h_before, slope_before = before
            slope = slope + 0.5 * h / h_before * (slope - slope_before)
        before = (t_next, h, k[0])
        proposed = z + h * slope
        if isinstance(steps, Adaptive):
            proposed = steps.judged(z, proposed, h * weighted(method.error, k))
        z = proposed
    return z


def weighted(weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    """The weighted sum of as many of `slopes` as there are weights."""
    parts = [weight * slope for weight, slope in zip(weights, slopes, strict=False)]
    return sum(parts[1:], start=parts[0])


# ---- steps --------------------------------------------------------------------------------------


def schedule(num_steps: int, like: Tensor, shift: float = 1.0) -> Tensor:
    """Timesteps [num_steps + 1] from 1 to 0 in the dtype of `like`, at least float32.

    The steps are equal at `shift` 1; above, ``s t / (1 + (s - 1) t)`` spends more of them on noise.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, found {num_steps}")
    dtype = torch.promote_types(like.dtype, torch.float32)
    t = torch.linspace(1, 0, num_steps + 1, dtype=dtype, device=like.device)
    return shift * t / (1 + (shift - 1) * t)


def to_data(num_steps: int, like: Tensor, shift: float = 1.0) -> list[SolverStep]:
    """The steps of `schedule`, from noise to data."""
    pairs = pairwise(schedule(num_steps, like, shift))
    return [SolverStep(t, t_next, t_next - t) for t, t_next in pairs]


def to_noise(num_steps: int, like: Tensor) -> list[SolverStep]:
    """Equal steps from data (t = 0) to noise (t = 1), in the dtype of `like`."""
    h = like.new_tensor(1 / num_steps)
    return [
        SolverStep(t, t_next, h) for t, t_next in pairwise([i * h for i in range(num_steps + 1)])
    ]


class Adaptive:
    """Steps from data (t = 0) to noise (t = 1) as long as `tolerance`, relative and absolute,
    allows, for the group that needs the shortest. ValueError where the ODE diverges or asks for
    steps that vanish."""

    def __init__(self, tolerance: float, like: Tensor):
        self.tolerance = tolerance
        self.t, self.h = like.new_tensor(0.0), like.new_tensor(0.05)

    def __iter__(self) -> Iterator[SolverStep]:
        while float(self.t) < 1:
            self.h = torch.minimum(self.h, 1 - self.t)
            yield SolverStep(self.t, self.t + self.h, self.h)

    def judged(self, z_GD: Tensor, proposed_GD: Tensor, error_GD: Tensor) -> Tensor:
        """Where the step leads: to what was proposed, or nowhere if the error is too large."""
        scale = self.tolerance * (1 + torch.maximum(z_GD.abs(), proposed_GD.abs()))
        worst = float((error_GD / scale).square().mean(1).sqrt().max())
        if not math.isfinite(worst):
            raise ValueError(f"the flow's ODE diverges at t = {float(self.t):.4f}")
        if worst <= 1:
            self.t = self.t + self.h
        self.h = self.h * min(5.0, max(0.2, 0.9 * max(worst, 1e-10) ** -0.2))
        if float(self.h) < 8 * torch.finfo(z_GD.dtype).eps:
            raise ValueError(
                f"the flow's ODE is too stiff at t = {float(self.t):.4f} for tolerance"
                f" {self.tolerance}; raise it, or take a fixed-step solver"
            )
        return proposed_GD if worst <= 1 else z_GD


# ---- partial repaint ----------------------------------------------------------------------------


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
    steps: Sequence[SolverStep],
    solver: str,
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
    guided = round(share * len(steps))
    visits = [s for i, s in enumerate(steps) for _ in range(times if i < guided else 1)]

    def prepare(number: int, z: Tensor) -> Tensor:
        t, t_next, _ = visits[number]
        if number >= guided * times:
            return z
        if number % times:
            z = renoise(z, next(noises), t_next, t, path)
        return torch.where(where, path.at(known, next(noises), t), z)

    return integrate(field, z, visits, solver, prepare)
