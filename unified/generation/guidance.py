"""Guidance: the velocity that generation follows, from a conditional and an unconditional one.

Plain classifier-free guidance is ``v_u + scale (v_c - v_u)``. The other rules are guiders of
diffusers, applied to each block by itself and to what is unknown of it.

Two shortcuts skip passes of the network, and change the result a little: guidance may hold the
difference ``v_c - v_u`` for some steps, and a block its whole velocity once that has settled.

Shape legend: N positions of all blocks being denoised, n positions of one block, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unified.flow.solvers import schedule
from unified.flow.timesteps import round_timesteps
from unified.generation.sampler import NEAR, Sampler
from unified.model.cache import KVCache
from unified.model.kernels.graphs import Recording, replays
from unified.model.prior import Geometry, Prior, Timesteps
from unified.sequence.packing import PackedBatch

#: name -> class in `diffusers.guiders`, and its options where the defaults amount to the plain rule
GUIDERS: dict[str, tuple[str, dict[str, float]]] = {
    "zero_star": ("ClassifierFreeZeroStarGuidance", {}),
    "adaptive_projected": ("AdaptiveProjectedGuidance", {"eta": 0.0}),
    "tangential": ("TangentialClassifierFreeGuidance", {}),
}


def guider(sampler: Sampler) -> Any:
    """The guider of diffusers that `sampler` names."""
    from diffusers import guiders

    name, options = GUIDERS[sampler.guider]
    return getattr(guiders, name)(guidance_scale=sampler.guidance_scale, **options)


def timesteps(prior: Prior, sampler: Sampler, like: Tensor) -> Timesteps:
    """All that `sampler` will ask of the network, 0 among them, for all blocks."""
    steps = schedule(sampler.num_steps, like, sampler.time_shift)
    rounded = round_timesteps(steps, sampler.round_timesteps)
    return Timesteps(prior, torch.cat([rounded, rounded.new_zeros(1)]).to(like).unique())


#: rows -> their two batches; see `GuidedVelocity`
Batches = Callable[[Sequence[int]], tuple[PackedBatch, PackedBatch | None]]


class Placed(NamedTuple):
    """Blocks that are denoised, with or without their unconditional copies, where they are, and
    a recording of what gives their velocities, where there can be one."""

    batch: PackedBatch
    geometry: Geometry
    recording: Recording | None


class GuidedVelocity:
    """``field(z [N, C], t)`` of all blocks being denoised; 0 where a position is known.

    `lengths` are those of the blocks. Of those that it is told, `batches` makes two batches: the
    blocks alone as `kind`, and, if they are to be guided, each with its unconditional copy.
    ``known[i]`` positions of block i are held clean, at t = 0. `times` are those of the whole
    schedule.
    """

    def __init__(
        self,
        prior: Prior,
        batches: Batches,
        cache: KVCache,
        lengths: Sequence[int],
        known: Sequence[int],
        modality: str,
        kind: str,
        sampler: Sampler,
        times: Timesteps,
    ):
        self.prior, self.cache, self.sampler, self.times = prior, cache, sampler, times
        self.modality, self.kind, self.lengths = modality, kind, list(lengths)
        self.batches = batches
        self._place(list(range(len(self.lengths))))
        time = self.plain.batch.time_RL
        unknown = [torch.arange(n) >= k for n, k in zip(lengths, known, strict=True)]
        self.unknown_N = torch.cat(unknown).to(time)
        self.known = list(known)
        self.guider = guider(sampler) if sampler.guider in GUIDERS else None
        self.schedule = schedule(sampler.num_steps, time, sampler.time_shift)
        guided = [float(t) for t in self.schedule if sampler.guides(t)]
        #: when the unconditional pass is made; in between, v_c - v_u is what it was
        self.fresh = guided[:: sampler.unconditional_every]
        self.difference_NC: Tensor | None = None

    def __call__(self, z_NC: Tensor, t: Tensor) -> Tensor:
        if self.both is None or not self.sampler.guides(t):
            return self._velocities(self.plain, z_NC, t)[0] * self.unknown_N[:, None]
        now = float(t)
        if self.difference_NC is None or any(abs(now - f) < NEAR for f in self.fresh):
            v_c, v_u = self._velocities(self.both, z_NC, t)
            self.difference_NC = v_c - v_u
        else:
            (v_c,) = self._velocities(self.plain, z_NC, t)
            v_u = v_c - self.difference_NC
        return self._combine(v_c, v_u, t) * self.unknown_N[:, None]

    def _place(self, rows: list[int]) -> None:
        """Take the blocks of these rows, behind what is in the cache."""
        plain, both = self.batches(rows)
        self.rows, self.plain = rows, self._placed(plain)
        self.both = self._placed(both) if both else None

    def _placed(self, batch: PackedBatch) -> Placed:
        again = self.sampler.graphs and replays(batch.time_RL.device)
        geometry = self.prior.geometry(batch, self.cache)
        return Placed(batch, geometry, Recording() if again else None)

    def only(self, rows: Sequence[int]) -> GuidedVelocity:
        """The same of these blocks alone."""

        def chosen(x: Tensor) -> Tensor:
            parts = x.split(self.lengths)
            return torch.cat([parts[row] for row in rows])

        part = copy(self)
        part.lengths, part.known = ([x[row] for row in rows] for x in (self.lengths, self.known))
        part.cache = self.cache.rows(torch.tensor(rows, device=self.unknown_N.device))
        part._place([self.rows[row] for row in rows])
        part.unknown_N = chosen(self.unknown_N)
        if self.difference_NC is not None:
            part.difference_NC = chosen(self.difference_NC)
        return part

    def _velocities(self, placed: Placed, z_NC: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        """Conditional velocity [N, C], and the unconditional one if `placed` has the copies."""
        run = partial(self._pass, placed.batch, placed.geometry)
        return run(z_NC, t) if placed.recording is None else placed.recording(run, z_NC, t)

    def _pass(
        self, batch: PackedBatch, geometry: Geometry, z_NC: Tensor, t: Tensor
    ) -> tuple[Tensor, ...]:
        """The velocities [N, C] of each copy, by one pass of the prior."""
        batch = batch.with_latents({self.modality: z_NC})
        copies = batch.latents[self.modality].shape[0] // len(z_NC)
        rounded = round_timesteps(t, self.sampler.round_timesteps).to(batch.time_RL)
        batch = replace(batch, time_RL=self._times(batch, rounded, copies))
        found = self.prior(batch, self.cache, self.times, geometry)
        v = found[self.modality].to(z_NC.dtype)
        parts = v.split([n for n in self.lengths for _ in range(copies)])
        return tuple(torch.cat(parts[i::copies]) for i in range(copies))

    def _times(self, batch: PackedBatch, t: Tensor, copies: int) -> Tensor:
        """The timestep of every position [R, L]: `t`, and 0 where something is known."""
        if not any(self.known):
            return t.expand(batch.shape)
        time_RL, where = torch.zeros_like(batch.time_RL), batch.where[self.modality]
        time_RL.view(-1)[where] = self._interleave([t * self.unknown_N] * copies)
        return time_RL

    def _interleave(self, copies: Sequence[Tensor]) -> Tensor:
        """[block 0 of each copy, block 1 of each copy, ...]."""
        split = [copy.split(self.lengths) for copy in copies]
        return torch.cat([part for parts in zip(*split, strict=True) for part in parts])

    def _combine(self, v_c: Tensor, v_u: Tensor, t: Tensor) -> Tensor:
        if self.guider is None:
            return torch.lerp(v_u, v_c, self.sampler.guidance_scale)
        step = int((self.schedule > t + NEAR).sum())
        self.guider.set_state(step, self.sampler.num_steps, t)
        out = v_c.clone()
        blocks = (x.split(self.lengths) for x in (v_c, v_u, out))
        for c, u, guided, k in zip(*blocks, self.known, strict=True):
            guided[k:] = self.guider.forward(c[None, k:], u[None, k:]).pred[0]
        return out


class Settling:
    """`field`, but a block whose velocity has settled keeps it, and costs no more passes.

    A velocity v that is kept from t on leads straight to ``z - t v``. If it went on changing as it
    has since the timestep before, at the rate ``v' = (v - v_before) / (t - t_before)``, the block
    would end ``t^2 |v'| / 2`` from there. Settled is a block for which that is less than
    `settle` of ``|v|``, both over its unknown positions.
    """

    def __init__(self, field: GuidedVelocity, settle: float):
        self.field, self.settle, self.lengths = field, settle, list(field.lengths)
        self.going = list(range(len(self.lengths)))
        self.t: Tensor | None = None
        self.v: dict[int, Tensor] = {}

    def __call__(self, z_NC: Tensor, t: Tensor) -> Tensor:
        if self.going:
            blocks = z_NC.split(self.lengths)
            z = torch.cat([blocks[i] for i in self.going])
            found = dict(zip(self.going, self.field(z, t).split(self.field.lengths), strict=True))
            # the second evaluation of a step of Heun's has the timestep of the next one's first
            if self.t is not None and t < self.t:
                share = self.settle * 2 * (self.t - t) / t**2
                changes = {i: v - self.v[i] for i, v in found.items()}
                self._leave([i for i, v in found.items() if changes[i].norm() < share * v.norm()])
            self.v |= found
            self.t = t
        return torch.cat([self.v[i] for i in range(len(self.lengths))])

    def _leave(self, settled: Sequence[int]) -> None:
        """Go on without the blocks that have settled."""
        stay = [row for row, i in enumerate(self.going) if i not in settled]
        if stay and settled:
            self.field = self.field.only(stay)
        self.going = [self.going[row] for row in stay]
