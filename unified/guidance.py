"""Guidance: the velocity that generation follows, from a conditional and an unconditional one.

Plain classifier-free guidance is ``v_u + scale (v_c - v_u)``. The other rules are guiders of
diffusers, applied to each block by itself and to what is unknown of it.

Shape legend: N positions of all blocks being denoised, n positions of one block, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unified.cache import KVCache
from unified.flow import round_timesteps
from unified.prior import Geometry, Prior, Timesteps
from unified.sampler import NEAR, Sampler
from unified.sequence import PackedBatch
from unified.solvers import schedule

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
    return Timesteps(prior, torch.cat([rounded, rounded.new_zeros(1)]).to(like))


class Placed(NamedTuple):
    """Blocks that are denoised, with or without their unconditional copies, and where they are."""

    batch: PackedBatch
    geometry: Geometry


class GuidedVelocity:
    """``field(z [N, C], t)`` of all blocks being denoised; 0 where a position is known.

    `lengths` are those of the blocks, in the order of the two `batches`: the blocks alone as
    `kind`, and, if they are to be guided, each with its unconditional copy. ``known[i]`` positions
    of block i are held clean, at t = 0. `times` are those of the whole schedule.
    """

    def __init__(
        self,
        prior: Prior,
        batches: tuple[PackedBatch, PackedBatch | None],
        cache: KVCache,
        lengths: Sequence[int],
        known: Sequence[int],
        modality: str,
        kind: str,
        sampler: Sampler,
        times: Timesteps,
    ):
        self.prior, self.cache, self.sampler, self.times = prior, cache, sampler, times
        self.plain, self.both = (b and Placed(b, prior.geometry(b, cache)) for b in batches)
        self.modality, self.kind, self.lengths = modality, kind, list(lengths)
        time = self.plain.batch.time_RL
        unknown = [torch.arange(n) >= k for n, k in zip(lengths, known, strict=True)]
        self.unknown_N = torch.cat(unknown).to(time)
        self.known = list(known)
        self.guider = guider(sampler) if sampler.guider in GUIDERS else None
        self.schedule = schedule(sampler.num_steps, time, sampler.time_shift)

    def __call__(self, z_NC: Tensor, t: Tensor) -> Tensor:
        if self.both is None or not self.sampler.guides(t):
            return self._velocities(self.plain, z_NC, t)[0] * self.unknown_N[:, None]
        v_c, v_u = self._velocities(self.both, z_NC, t)
        return self._combine(v_c, v_u, t) * self.unknown_N[:, None]

    def _velocities(self, placed: Placed, z_NC: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        """Conditional velocity [N, C], and the unconditional one if `placed` has the copies."""
        parts = [{self.kind: part} for part in z_NC.split(self.lengths)]
        batch = placed.batch.with_latents(parts)
        copies = batch.latents[self.modality].shape[0] // len(z_NC)
        rounded = round_timesteps(t, self.sampler.round_timesteps).to(batch.time_RL)
        batch = replace(batch, time_RL=self._times(batch, rounded, copies))
        found = self.prior(batch, self.cache, self.times, placed.geometry)
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
