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
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count

import torch
from torch import Tensor

from unified.config.schema import GenerationConfig
from unified.flow.path import STRAIGHT, Path
from unified.flow.solvers import Field, integrate, repaint, to_data
from unified.generation.guidance import GuidedVelocity, Settling, timesteps
from unified.latents.ragged import Latent
from unified.model.cache import KVCache
from unified.model.prior import Prior
from unified.randomness import noise
from unified.sequence.layout import Layout, Segment, noisy_kind, place
from unified.sequence.packing import PackedBatch, Sample, latents_of, pack
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


class Session:
    """One run of several requests of a task: their cache, and how far each has come.

    Each `step` makes one more block of every request that is `active`. Everything happens on the
    prior's device, and latents have its dtype, at least float32. `path` is the one that the prior
    was trained on; partial repaint puts latents on it.
    """

    def __init__(
        self,
        prior: Prior,
        layouts: Mapping[str, Layout],
        task: str,
        target: str,
        requests: Sequence[Request],
        settings: GenerationConfig,
        path: Path = STRAIGHT,
    ):
        self.prior, self.task, self.requests, self.settings = prior, task, requests, settings
        self.path = path
        weight = next(prior.parameters())
        self.device = weight.device
        self.dtype = torch.promote_types(weight.dtype, torch.float32)
        self.visibility = Visibility({t: x.sees for t, x in layouts.items()})
        self.layout = layouts[task]
        self.target, self.noisy = self.layout[target], noisy_kind(self.layout, target)
        self.context = closure(self.layout.sees, self.noisy) - {self.noisy, target}
        self.origins = [self._origin(r) for r in requests]
        self.latents = [self._beginning(r) for r in requests]
        #: latents of the target whose clean keys are in the cache
        self.committed = [self._whole_blocks(len(z)) for z in self.latents]
        self.begun = list(self.committed)
        self.active = list(range(len(requests)))
        #: the request of each row of the cache; before the first step there are none
        self.cached: list[int] = []
        self.cache = KVCache(self._capacity() if prior.static else None)
        like = torch.zeros((), device=self.device, dtype=self.dtype)
        self.times = timesteps(prior, settings, like)
        self.steps = to_data(settings.num_steps, like, settings.time_shift)

    @torch.no_grad()
    def step(self) -> dict[int, Tensor]:
        """Denoise the next block of every active request: ``{request: all latents so far [L, C]}``.

        Blocks that are repainted take steps of their own.
        """
        self._commit() if self.cached else self._prefill()
        starts = [self._start(i) for i in self.active]
        partial = self.settings.first_block == "partial"
        repainted = [partial and len(start.known) > 0 for start in starts]
        for repaints in (False, True):
            rows = [row for row, chosen in enumerate(repainted) if chosen == repaints]
            if not rows:
                continue
            some = [starts[row] for row in rows]
            field = self._field(some, self._rows(rows), known=not repaints)
            if repaints:
                z = self._repaint(field, some)
            else:
                z = torch.cat([torch.cat([s.known, s.noise[len(s.known) :]]) for s in some])
                z = integrate(field, z, self.steps, self.settings.solver)
            for row, block in zip(rows, z.split([len(s.noise) for s in some]), strict=True):
                i = self.active[row]
                self.latents[i] = torch.cat([self.latents[i][: self.committed[i]], block])
        return {i: self.latents[i] for i in self.active}

    def finish(self, ended: Collection[int]) -> None:
        """Go on without the requests that have `ended`, and those whose target is whole."""
        full = [i for i in self.active if len(self.latents[i]) >= math.prod(self.requests[i].grid)]
        self.active = [i for i in self.active if i not in {*ended, *full}]

    # ---- what a step does ----

    def _prefill(self) -> None:
        """Write what is given, and the whole blocks of the known beginning, into the cache."""
        self.cached = list(self.active)
        samples, values = [], []
        for r, z, whole in zip(self.requests, self.latents, self.committed, strict=True):
            given = {k: r.given[k] for k in self.context} | (
                {self.target.kind: Latent(z[:whole], (whole,))} if whole else {}
            )
            samples.append(Sample(self.task, {k: v.grid for k, v in given.items()}))
            values.append({k: v.values for k, v in given.items()})
        clean = Layout(tuple(s for s in self.layout.segments if s.noise == "clean"), {})
        if any(values):
            self.prior.commit(self._batch(samples, clean, values), self.cache, self.times)

    def _commit(self) -> None:
        """Keep the rows of active requests; write their new blocks, now clean, into the cache."""
        going = [row for row, i in enumerate(self.cached) if i in self.active]
        self.cache = self.cache.rows(torch.tensor(going, device=self.device))
        self.cached = list(self.active)
        starts = [self._start(i) for i in self.active]
        samples = [s.sample(self.task, self.target.kind) for s in starts]
        values = [{self.target.kind: self.latents[i][self.committed[i] :]} for i in self.active]
        clean = Layout((replace(self.target, noise="clean", positions_of=None),), {})
        self.prior.commit(self._batch(samples, clean, values), self.cache, self.times)
        for i in self.active:
            self.committed[i] = len(self.latents[i])

    def _rows(self, rows: Sequence[int]) -> KVCache:
        """The cache of some of the active requests."""
        if len(rows) == len(self.active):
            return self.cache
        return self.cache.rows(torch.tensor(rows, device=self.device))

    def _field(
        self, starts: Sequence[_Start], cache: KVCache, known: bool
    ) -> GuidedVelocity | Settling:
        """The velocity of the blocks that begin at `starts`; what is `known` of them is held
        clean."""
        m = self.target.modality
        alone = Segment(self.noisy, m)
        twin = Segment(UNCONDITIONAL, m, copies=self.noisy)

        def batches(rows: Sequence[int]) -> tuple[PackedBatch, PackedBatch | None]:
            samples = [starts[row].sample(self.task, self.noisy) for row in rows]
            plain = self._batch(samples, Layout((alone,), {}))
            guided = self.settings.guided
            return plain, self._batch(samples, Layout((alone, twin), {})) if guided else None

        lengths = [len(s.noise) for s in starts]
        held = [len(s.known) if known else 0 for s in starts]
        field = GuidedVelocity(
            self.prior, batches, cache, lengths, held, m, self.noisy, self.settings, self.times
        )
        return Settling(field, self.settings.settle) if self.settings.settle else field

    def _repaint(self, field: Field, starts: Sequence[_Start]) -> Tensor:
        """The blocks under partial repaint: known positions are noisy too, and may drift."""
        known = [torch.cat([s.known, torch.zeros_like(s.noise[len(s.known) :])]) for s in starts]
        where = [torch.arange(len(s.noise))[:, None] < len(s.known) for s in starts]
        return repaint(
            field,
            torch.cat([s.noise for s in starts]),
            torch.cat(known),
            torch.cat(where).to(self.device),
            self._noises(starts),
            self.steps,
            self.settings.solver,
            self.settings.repaint_share,
            self.settings.repaint_times,
            self.path,
        )

    def _noises(self, starts: Sequence[_Start]) -> Iterator[Tensor]:
        """Fresh noise for all blocks, again and again; each request draws its own."""
        for again in count():
            drawn = [
                noise(
                    s.noise.shape, s.seed, self.task, self.target.kind, "repaint", s.position, again
                )
                for s in starts
            ]
            yield torch.cat(drawn).to(self.device, self.dtype)

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
        for placed in place(self.layout, grids, self.prior.config.axes):
            if placed.segment.kind == self.target.kind:
                return int(placed.blocks[0]), int(placed.positions.min())
        raise AssertionError("the target is always placed")

    def _beginning(self, request: Request) -> Tensor:
        channels = self.prior.channels[self.target.modality]
        given = request.given.get(self.target.kind)
        values = torch.zeros(0, channels) if given is None else given.values
        return values.to(self.device, self.dtype)

    def _whole_blocks(self, length: int) -> int:
        return length // self.target.block * self.target.block if self.target.block else 0

    def _start(self, i: int) -> _Start:
        """The next block of request `i`: where it stands, its noise, and what is known of it."""
        request, at = self.requests[i], self.committed[i]
        clock, position = self.origins[i]
        block = self.target.block
        grid = (block,) if block else request.grid
        eps = self._noise(i, math.prod(grid)).to(self.device, self.dtype)
        clock += at // block if block else 0
        return _Start(request.seed, grid, clock, position + at, eps, self.latents[i][at:])

    def _noise(self, i: int, length: int) -> Tensor:
        """Initial noise [length, C] of the next block of request `i`."""
        request, at = self.requests[i], self.committed[i]
        if request.noise is not None:
            made = at - self.begun[i]
            return request.noise[made // (self.target.block or 1)]
        channels = self.prior.channels[self.target.modality]
        return noise((length, channels), request.seed, self.task, self.target.kind, at)

    def _batch(
        self,
        samples: Sequence[Sample],
        layout: Layout,
        values: Sequence[Mapping[str, Tensor]] | None = None,
    ) -> PackedBatch:
        axes, layouts = self.prior.config.axes, {self.task: layout}
        batch = pack(samples, layouts, self.visibility, None, axes).to(self.device)
        # One request a row: rows never meet, so a row needs no identity that could change when
        # another one is dropped.
        at = replace(batch.coordinates, sample=batch.coordinates.sample.clamp(max=0))
        batch = replace(batch, coordinates=at, time_RL=batch.time_RL.to(self.dtype))
        if values is None:
            return batch
        cast = [{k: v.to(self.device, self.dtype) for k, v in one.items()} for one in values]
        return batch.with_latents(latents_of(samples, layouts, cast))


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
