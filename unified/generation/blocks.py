"""Generation: prefill what is given, integrate the flow for the next block, commit it, repeat.

Everything is derived from the task's table. To generate segment T, the *noisy* kind is T itself
(an image) or T's noisy twin (text). What that kind can see through any number of layers must be
given, and is written to the KV cache in one forward pass (prefill). Then, block by block of T:

    noise --integrate under the table--> latents of the block --commit as kind T--> KV cache

Classifier-free guidance puts a second copy of the block, kind U, beside the noisy one: it sees only
itself, so conditional and unconditional velocity come from one forward pass and one cache.
A prompt may end inside a block: its latents are then held clean (t = 0) through the integration.

Every request has its own seed, position and clock, so a result does not depend on its batch.

Shape legend: R requests (one row each), L positions of a row, b length of a block, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unified.flow.solvers import integrate, repaint
from unified.generation.guidance import GuidedVelocity, Settling, timesteps
from unified.generation.sampler import Sampler
from unified.latents.modality import Latent
from unified.model.cache import KVCache
from unified.model.prior import Prior
from unified.randomness import generator
from unified.sequence.layout import Layout, Segment, noisy_kind, place
from unified.sequence.packing import PackedBatch, Sample, pack
from unified.sequence.visibility import UNCONDITIONAL, Visibility, closure


@dataclass(frozen=True)
class Request:
    """One thing to generate: the latents that are given by kind, how much to make, and a seed.

    ``given[target]`` is the known beginning of the target (a prompt to continue), if any; `grid`
    is the target's whole grid, known beginning included. ``noise[i]``, if given, is the initial
    noise [b, C] of the i-th block that is made, in place of what the seed draws.
    """

    given: Mapping[str, Latent]
    grid: tuple[int, ...]
    seed: int
    noise: Sequence[Tensor] | None = None


#: (indices of requests, what each has so far [L, C]) -> which of them are finished
Stop = Callable[[Sequence[int], Sequence[Tensor]], Sequence[bool]]


class Generator:
    """Runs requests of any task through a prior, on the prior's device and in its dtype."""

    def __init__(self, prior: Prior, layouts: Mapping[str, Layout]):
        self.prior = prior
        self.layouts = layouts
        like = next(prior.parameters())
        self.device, self.dtype = like.device, torch.promote_types(like.dtype, torch.float32)
        self.visibility = Visibility({t: x.sees for t, x in layouts.items()})

    def run(
        self, task: str, target: str, requests: Sequence[Request], sampler: Sampler
    ) -> list[Latent]:
        """The whole target of each request, known beginning included."""
        session = _Session(self, task, target, requests)
        for _ in session.blocks(sampler, None):
            pass
        return [Latent(z, r.grid) for z, r in zip(session.latents, requests, strict=True)]

    def stream(
        self,
        task: str,
        target: str,
        requests: Sequence[Request],
        sampler: Sampler,
        stop: Stop | None = None,
    ) -> Iterator[dict[int, Tensor]]:
        """Yield, block by block, ``{request: all its latents so far [L, C]}``.

        With `stop`, a request for which it answers True is dropped and the others go on without it.
        """
        return _Session(self, task, target, requests).blocks(sampler, stop)


class _Session:
    """One run of `Generator`: the cache, and how far each request has come."""

    def __init__(
        self, owner: Generator, task: str, target: str, requests: Sequence[Request]
    ) -> None:
        self.owner, self.task, self.requests = owner, task, requests
        self.layout = owner.layouts[task]
        self.target, self.noisy = self.layout[target], noisy_kind(self.layout, target)
        self.context = closure(self.layout.sees, self.noisy) - {self.noisy, target}
        self.active = list(range(len(requests)))
        self.origins = [self._origin(r) for r in requests]
        self.latents = [self._beginning(r) for r in requests]
        #: latents of the target whose clean keys are in the cache
        self.committed = [self._whole_blocks(len(z)) for z in self.latents]
        self.begun = list(self.committed)
        self.cache = KVCache(self._capacity() if owner.prior.static else None)

    @torch.no_grad()
    def blocks(self, sampler: Sampler, stop: Stop | None) -> Iterator[dict[int, Tensor]]:
        """Prefill, then denoise and commit until every request is finished."""
        like = torch.zeros((), device=self.owner.device, dtype=self.owner.dtype)
        self.times = timesteps(self.owner.prior, sampler, like)
        self._prefill()
        while self.active:
            self._denoise(sampler)
            fresh = {i: self.latents[i] for i in self.active}
            yield fresh
            full = [len(z) >= math.prod(self.requests[i].grid) for i, z in fresh.items()]
            told = stop(list(fresh), list(fresh.values())) if stop else full
            self._advance([f or t for f, t in zip(full, told, strict=True)])

    # ---- the three moves ----

    def _prefill(self) -> None:
        """Write what is given, and the whole blocks of the known beginning, into the cache."""
        samples, values = [], []
        for r, z, whole in zip(self.requests, self.latents, self.committed, strict=True):
            given = {k: r.given[k] for k in self.context} | (
                {self.target.kind: Latent(z[:whole], (whole,))} if whole else {}
            )
            samples.append(Sample(self.task, {k: v.grid for k, v in given.items()}))
            values.append({k: v.values for k, v in given.items()})
        clean = Layout(tuple(s for s in self.layout.segments if s.noise == "clean"), {})
        if any(values):
            self.owner.prior.commit(self._batch(samples, clean, values), self.cache, self.times)

    def _denoise(self, sampler: Sampler) -> None:
        """Integrate the next block of every active request, and append it."""
        starts = [self._start(i) for i in self.active]
        # blocks that are repainted take steps of their own
        partial = [sampler.first_block == "partial" and len(s.known) > 0 for s in starts]
        for move, chosen in ((self._integrate, False), (self._repaint, True)):
            rows = [row for row, repainted in enumerate(partial) if repainted == chosen]
            if not rows:
                continue
            blocks = move([starts[row] for row in rows], self._cache(rows), sampler)
            for row, block in zip(rows, blocks, strict=True):
                i = self.active[row]
                self.latents[i] = torch.cat([self.latents[i][: self.committed[i]], block])

    def _cache(self, rows: Sequence[int]) -> KVCache:
        """The cache of some of the active requests."""
        if len(rows) == len(self.active):
            return self.cache
        return self.cache.rows(torch.tensor(rows, device=self.owner.device))

    def _integrate(
        self, starts: Sequence[_Start], cache: KVCache, sampler: Sampler
    ) -> Sequence[Tensor]:
        """The blocks, with what is known of them held clean throughout."""
        guided = self._field(starts, [len(s.known) for s in starts], cache, sampler)
        field = Settling(guided, sampler.settle) if sampler.settle else guided
        z = torch.cat([torch.cat([s.known, s.noise[len(s.known) :]]) for s in starts])
        z = integrate(field, z, sampler.num_steps, sampler.solver, sampler.time_shift)
        return z.split([len(s.noise) for s in starts])

    def _field(
        self, starts: Sequence[_Start], known: Sequence[int], cache: KVCache, sampler: Sampler
    ) -> GuidedVelocity:
        """The velocity of the blocks that begin at `starts`."""
        m = self.target.modality
        alone = Segment(self.noisy, m)
        twin = Segment(UNCONDITIONAL, m, copies=self.noisy)

        def batches(rows: Sequence[int]) -> tuple[PackedBatch, PackedBatch | None]:
            samples = [starts[row].sample(self.task, self.noisy) for row in rows]
            plain = self._batch(samples, Layout((alone,), {}))
            both = self._batch(samples, Layout((alone, twin), {})) if sampler.guided else None
            return plain, both

        lengths = [len(s.noise) for s in starts]
        prior = self.owner.prior
        return GuidedVelocity(
            prior, batches, cache, lengths, known, m, self.noisy, sampler, self.times
        )

    def _repaint(
        self, starts: Sequence[_Start], cache: KVCache, sampler: Sampler
    ) -> Sequence[Tensor]:
        """The blocks under partial repaint: known positions are noisy too, and may drift."""
        field = self._field(starts, [0] * len(starts), cache, sampler)
        known = [torch.cat([s.known, torch.zeros_like(s.noise[len(s.known) :])]) for s in starts]
        where = [torch.arange(len(s.noise))[:, None] < len(s.known) for s in starts]
        z = repaint(
            field,
            torch.cat([s.noise for s in starts]),
            torch.cat(known),
            torch.cat(where).to(self.owner.device),
            self._noises(starts),
            sampler.num_steps,
            sampler.solver,
            sampler.time_shift,
            sampler.repaint_share,
            sampler.repaint_times,
        )
        return z.split([len(s.noise) for s in starts])

    def _noises(self, starts: Sequence[_Start]) -> Iterator[Tensor]:
        """Fresh noise for all blocks, again and again; each request draws its own."""
        seeds = [
            generator(s.seed, self.task, self.target.kind, "repaint", s.position) for s in starts
        ]
        while True:
            drawn = [
                torch.randn(s.noise.shape, generator=g) for s, g in zip(starts, seeds, strict=True)
            ]
            yield torch.cat(drawn).to(self.owner.device, self.owner.dtype)

    def _advance(self, finished: Sequence[bool]) -> None:
        """Drop finished requests; commit the new block of the others as clean history."""
        going = [row for row, done in enumerate(finished) if not done]
        self.active = [self.active[row] for row in going]
        if not self.active:
            return
        self.cache = self.cache.rows(torch.tensor(going, device=self.owner.device))
        starts = [self._start(i) for i in self.active]
        samples = [s.sample(self.task, self.target.kind) for s in starts]
        values = [{self.target.kind: self.latents[i][self.committed[i] :]} for i in self.active]
        clean = Layout((replace(self.target, noise="clean", positions_of=None),), {})
        self.owner.prior.commit(self._batch(samples, clean, values), self.cache, self.times)
        for i in self.active:
            self.committed[i] = len(self.latents[i])

    # ---- where things stand ----

    def _capacity(self) -> int:
        """Positions that a row of the cache holds at most: what is given, and all of the target."""
        given = [sum(len(r.given[k].values) for k in self.context) for r in self.requests]
        known = max(map(sum, zip(given, self.committed, strict=True)), default=0)
        rest = [math.prod(r.grid) - n for r, n in zip(self.requests, self.committed, strict=True)]
        blocks = -(-max(rest, default=0) // self.target.block) if self.target.block else 0
        return known + blocks * (self.target.block or 0)

    def _origin(self, request: Request) -> tuple[int, int]:
        """Block clock and position at which the target begins."""
        missing = sorted(self.context - request.given.keys())
        if missing:
            raise ValueError(
                f"{self.task} needs {', '.join(missing)} to generate {self.target.kind};"
                f" given: {', '.join(sorted(request.given)) or 'nothing'}"
            )
        grids = {k: request.given[k].grid for k in self.context} | {self.target.kind: request.grid}
        for placed in place(self.layout, grids, self.owner.prior.config.axes):
            if placed.segment.kind == self.target.kind:
                return int(placed.blocks[0]), int(placed.positions.min())
        raise AssertionError("the target is always placed")

    def _beginning(self, request: Request) -> Tensor:
        channels = self.owner.prior.channels[self.target.modality]
        given = request.given.get(self.target.kind)
        values = torch.zeros(0, channels) if given is None else given.values
        return values.to(self.owner.device, self.owner.dtype)

    def _whole_blocks(self, length: int) -> int:
        return length // self.target.block * self.target.block if self.target.block else 0

    def _start(self, i: int) -> _Start:
        """The next block of request `i`: where it stands, its noise, and what is known of it."""
        request, at = self.requests[i], self.committed[i]
        clock, position = self.origins[i]
        block = self.target.block
        grid = (block,) if block else request.grid
        noise = self._noise(i, math.prod(grid)).to(self.owner.device, self.owner.dtype)
        clock += at // block if block else 0
        return _Start(request.seed, grid, clock, position + at, noise, self.latents[i][at:])

    def _noise(self, i: int, length: int) -> Tensor:
        """Initial noise [length, C] of the next block of request `i`."""
        request, at = self.requests[i], self.committed[i]
        if request.noise is not None:
            made = at - self.begun[i]
            return request.noise[made // (self.target.block or 1)]
        seed = generator(request.seed, self.task, self.target.kind, at)
        channels = self.owner.prior.channels[self.target.modality]
        return torch.randn(length, channels, generator=seed)

    def _batch(
        self,
        samples: Sequence[Sample],
        layout: Layout,
        values: Sequence[Mapping[str, Tensor]] | None = None,
    ) -> PackedBatch:
        owner = self.owner
        axes = owner.prior.config.axes
        batch = pack(samples, {self.task: layout}, owner.visibility, None, axes).to(owner.device)
        # One request a row: rows never meet, so a row needs no identity that could change when
        # another one is dropped.
        at = replace(batch.coordinates, sample=batch.coordinates.sample.clamp(max=0))
        batch = replace(batch, coordinates=at, time_RL=batch.time_RL.to(owner.dtype))
        if values is None:
            return batch
        cast = [{k: v.to(owner.device, owner.dtype) for k, v in one.items()} for one in values]
        return batch.with_latents(cast)


@dataclass(frozen=True)
class _Start:
    """One block about to be denoised: its `noise` [b, C], and what of it is `known`, [k, C]."""

    seed: int
    grid: tuple[int, ...]
    clock: int
    position: int
    noise: Tensor
    known: Tensor

    def sample(self, task: str, kind: str) -> Sample:
        return Sample(task, {kind: self.grid}, self.clock, self.position)
