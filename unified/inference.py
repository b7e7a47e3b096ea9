"""From items to items: encode what is given, generate the target, decode and realise it.

One path serves every task. The task's table says what the target needs; each of those segments is
observed and encoded by its modality, and the target's latents are decoded by its own. A target with
a known beginning (a prompt to continue) runs along the first axis of its observation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unified.generate import Generator, Request, Sampler
from unified.modality import Latent, Modality
from unified.prior import Prior
from unified.randomness import derive
from unified.task import Task

Seed = int | Sequence[int] | None


@dataclass(frozen=True)
class Wish:
    """What one output is made from: items by kind, and its size in its modality's own unit."""

    given: Mapping[str, Any]
    size: Any = None


class Inference:
    """Runs one task of a model."""

    def __init__(
        self,
        modalities: Mapping[str, Modality],
        tasks: Mapping[str, Task],
        prior: Prior,
        task: str,
    ):
        self.name, self.task = task, tasks[task]
        self.layout = self.task.layout
        self.target = self.layout[self.task.generates]
        self.modalities = modalities
        self.modality = modalities[self.target.modality]
        self.generator = Generator(prior, {name: t.layout for name, t in tasks.items()})
        for module in (prior, *modalities.values()):
            module.eval()

    def run(self, wishes: Sequence[Wish], sampler: Sampler, seed: Seed = None) -> list[Any]:
        """One item per wish."""
        items: list[Any] = [None] * len(wishes)
        for step in self.stream(wishes, sampler, seed):
            for i, item in step.items():
                items[i] = item
        return items

    @torch.no_grad()
    def stream(
        self, wishes: Sequence[Wish], sampler: Sampler, seed: Seed = None
    ) -> Iterator[dict[int, Any]]:
        """After every block, ``{wish: its item so far}``; a wish whose item has ended drops out."""
        if not wishes:
            return
        starts = [self._observe(w) for w in wishes]
        requests = self._requests(wishes, starts, seeds(seed, len(wishes)))
        known = [len(o[self.target.kind]) if self.target.kind in o else 0 for o in starts]

        def new(i: int, observation: Tensor) -> Tensor:
            return observation[known[i] :] if known[i] else observation

        def ended(ids: Sequence[int], latents: Sequence[Tensor]) -> list[bool]:
            found = zip(ids, self._decode(latents, [requests[i] for i in ids]), strict=True)
            return [self.modality.has_ended(new(i, o)) for i, o in found]

        blocks = self.generator.stream(self.name, self.target.kind, requests, sampler, ended)
        for block in blocks:
            observed = self._decode(list(block.values()), [requests[i] for i in block])
            yield {
                i: self.modality.realise(self._cut(new(i, o), wishes[i]))
                for i, o in zip(block, observed, strict=True)
            }

    # ---- before ----

    def _observe(self, wish: Wish) -> dict[str, Tensor]:
        """Kind -> observation of everything given; a known beginning stays open."""
        return {
            kind: self.task.observe(self.modalities, kind, item, opens=kind == self.target.kind)
            for kind, item in wish.given.items()
        }

    def _requests(
        self, wishes: Sequence[Wish], starts: Sequence[dict[str, Tensor]], seeds: Sequence[int]
    ) -> list[Request]:
        encoded: list[dict[str, Latent]] = [{} for _ in wishes]
        for name, modality in self.modalities.items():
            found = [
                (i, kind, o)
                for i, start in enumerate(starts)
                for kind, o in start.items()
                if self.layout[kind].modality == name
            ]
            posteriors = modality.encode([o for _, _, o in found]) if found else []
            for (i, kind, _), posterior in zip(found, posteriors, strict=True):
                encoded[i][kind] = posterior.mode
        return [
            Request(given, self._grid(wish, given), seed)
            for wish, given, seed in zip(wishes, encoded, seeds, strict=True)
        ]

    def _grid(self, wish: Wish, given: Mapping[str, Latent]) -> tuple[int, ...]:
        """The target's grid, its known beginning included, in whole blocks."""
        grid = self.modality.grid_for(wish.size)
        block, start = self.target.block, given.get(self.target.kind)
        if block is None:
            return grid
        length = math.prod(grid) + (len(start.values) if start else 0)
        return (-(-length // block) * block,)

    # ---- after ----

    def _decode(self, latents: Sequence[Tensor], requests: Sequence[Request]) -> list[Tensor]:
        """Observations of latents that may still lack their last blocks."""
        return self.modality.decode(
            [
                Latent(z, r.grid if math.prod(r.grid) == len(z) else (len(z),))
                for z, r in zip(latents, requests, strict=True)
            ]
        )

    def _cut(self, observation: Tensor, wish: Wish) -> Tensor:
        """A target made of blocks may be longer than was asked for."""
        if self.target.block is None or wish.size is None:
            return observation
        return observation[: wish.size]


def seeds(seed: Seed, count: int) -> list[int]:
    """One seed per output: given one by one, derived from one number, or drawn afresh."""
    if isinstance(seed, Sequence):
        if len(seed) != count:
            raise ValueError(f"{count} outputs need {count} seeds, found {len(seed)}")
        return list(seed)
    base = int(torch.randint(1 << 62, ())) if seed is None else seed
    return [derive(base, i) for i in range(count)]
