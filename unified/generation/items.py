"""From items to items: encode what is given, generate the target, decode and realise it.

One path serves every task. The task's table says what the target needs; each of those segments is
observed and encoded by its modality, and the target's latents are decoded by its own. A target with
a known beginning (a prompt to continue) runs along the first axis of its observation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from unified.config.schema import GenerationConfig
from unified.generation.blocks import Generator, Request
from unified.generation.sampler import Sampler
from unified.latents.modality import Choice, Decoding, Latent, Modality, Posterior, Side, draw
from unified.model.kernels.linear import generating
from unified.model.precision import arithmetic
from unified.model.prior import Prior
from unified.randomness import derive, generator
from unified.sequence.task import Task

#: strategies that fill the prompt up to whole blocks, so that no block is mixed
PADDED: dict[str, Side] = {"left": "left", "right": "right"}

Seed = int | Sequence[int] | None
T = TypeVar("T")


@dataclass(frozen=True)
class Wish:
    """What one output is made from: items by kind, and its size in its modality's own unit."""

    given: Mapping[str, Any]
    size: Any = None
    #: initial noise of each block, in place of what the seed draws
    noise: Sequence[Tensor] | None = None


@dataclass(frozen=True)
class _Start:
    """What is given as observations; of the target's, `known` symbols and a `grid` of latents."""

    observations: dict[str, Tensor]
    known: int = 0
    grid: tuple[int, ...] | None = None


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

    def run(
        self, wishes: Sequence[Wish], settings: GenerationConfig, seed: Seed = None
    ) -> list[Any]:
        """One item per wish."""
        items: list[Any] = [None] * len(wishes)
        for step in self.stream(wishes, settings, seed):
            for i, item in step.items():
                items[i] = item
        return items

    def stream(
        self, wishes: Sequence[Wish], settings: GenerationConfig, seed: Seed = None
    ) -> Iterator[dict[int, Any]]:
        """After every block, ``{wish: its item so far}``; a wish whose item has ended drops out."""
        precision = partial(arithmetic, settings.precision, self.generator.device)
        return within(self._blocks(wishes, settings, seed), generating, torch.no_grad, precision)

    def _blocks(
        self, wishes: Sequence[Wish], settings: GenerationConfig, seed: Seed
    ) -> Iterator[dict[int, Any]]:
        if not wishes:
            return
        starts = [self._observe(w, settings) for w in wishes]
        requests = self._requests(wishes, starts, seeds(seed, len(wishes)), settings)
        whole = [self._whole(request) for request in requests]
        decoding = self._decoding(requests, whole, settings)
        made: dict[int, Tensor] = {}
        over = [False] * len(wishes)

        def ended(ids: Sequence[int], latents: Sequence[Tensor]) -> list[bool]:
            del latents
            return [all(over)] * len(ids) if settings.official else [over[i] for i in ids]

        sampler = Sampler.of(settings)
        blocks = self.generator.stream(self.name, self.target.kind, requests, sampler, ended)
        for block in blocks:
            latents = [self._latent(z, requests[i]) for i, z in block.items()]
            for i, o in zip(block, decoding.extend(list(block), latents), strict=True):
                made[i] = o[starts[i].known :]
                # the official code also looks at what it decodes of the prompt
                seen = o[whole[i] * self.modality.symbols :] if settings.official else made[i]
                over[i] = over[i] or self.modality.has_ended(seen)
            yield {i: self._realise(made[i], wishes[i], settings) for i in block}

    # ---- before ----

    def _observe(self, wish: Wish, settings: GenerationConfig) -> _Start:
        """Kind -> observation of everything given, and how much of the target is known."""
        target = self.target.kind
        observations = {
            kind: self.task.observe(self.modalities, kind, item)
            for kind, item in wish.given.items()
            if kind != target
        }
        if target not in wish.given:
            return _Start(observations)
        text = self.modality.beginning(wish.given[target])
        if not len(text):
            raise ValueError(f"what {self.name} is to continue is empty")
        side, block = self._filling(settings)
        filled = self.modality.pad(text, block, side)
        padded = settings.first_block in PADDED
        known = len(text) if side == "right" and not padded else len(filled)
        # pads are encoded with the text; only what holds some of the text is known of the latents
        cut = filled if padded else self.modality.pad(text, 1, side)
        return _Start(observations | {target: filled}, known, self.modality.grid(cut))

    def _filling(self, settings: GenerationConfig) -> tuple[Side, int]:
        """Where a beginning is filled up, and to whole blocks of how many latents."""
        block = self.target.block or 1
        if settings.first_block in PADDED:
            return PADDED[settings.first_block], block
        return ("right", block) if settings.official else (self.modality.boundary, 1)

    def _requests(
        self,
        wishes: Sequence[Wish],
        starts: Sequence[_Start],
        seeds: Sequence[int],
        settings: GenerationConfig,
    ) -> list[Request]:
        encoded: list[dict[str, Latent]] = [{} for _ in wishes]
        for name, modality in self.modalities.items():
            found = [
                (i, kind, o)
                for i, start in enumerate(starts)
                for kind, o in start.observations.items()
                if self.layout[kind].modality == name
            ]
            posteriors = modality.encode([o for _, _, o in found]) if found else []
            for (i, kind, _), posterior in zip(found, posteriors, strict=True):
                latent = self._given(posterior, settings, generator(seeds[i], "prefix", kind))
                grid = starts[i].grid if kind == self.target.kind else None
                encoded[i][kind] = (
                    latent if grid is None else Latent(latent.values[: math.prod(grid)], grid)
                )
        return [
            Request(given, self._grid(wish, given, settings), seed, wish.noise)
            for wish, given, seed in zip(wishes, encoded, seeds, strict=True)
        ]

    def _given(
        self, posterior: Posterior, settings: GenerationConfig, rng: torch.Generator
    ) -> Latent:
        """What is given, as a latent: the posterior's mean, or a sample of it."""
        if settings.prefix == "mean":
            return posterior.mode
        return posterior.sample(draw(posterior, rng))

    def _grid(
        self, wish: Wish, given: Mapping[str, Latent], settings: GenerationConfig
    ) -> tuple[int, ...]:
        """The target's grid, its known beginning included, in whole blocks.

        The official code counts what is new from the last whole block of the beginning. What lies
        on the positions of something given is as large as that.
        """
        under = given.get(self.target.positions_of or "")
        if under is not None:
            return self._as_large(wish.size, under.grid)
        grid = self.modality.grid_for(wish.size)
        block, start = self.target.block, given.get(self.target.kind)
        if block is None:
            return grid
        known = len(start.values) if start else 0
        known = known // block * block if settings.official else known
        return (-(-(math.prod(grid) + known) // block) * block,)

    def _as_large(self, size: Any, grid: tuple[int, ...]) -> tuple[int, ...]:
        """`grid`, which a `size` that is asked for may only repeat."""
        if size is not None and self.modality.grid_for(size) != grid:
            under = self.layout[str(self.target.positions_of)]
            raise ValueError(
                f"{self.name} makes an item as large as its {under.title}, of"
                f" {' x '.join(map(str, grid))} latents, but the size {size} was asked for: leave"
                " the size out"
            )
        return grid

    def _whole(self, request: Request) -> int:
        """Latents of the whole blocks of a known beginning."""
        known, block = request.given.get(self.target.kind), self.target.block
        return len(known.values) // block * block if known and block else 0

    def _decoding(
        self, requests: Sequence[Request], whole: Sequence[int], settings: GenerationConfig
    ) -> Decoding:
        names = (f.name for f in fields(Choice))
        choice = Choice(**{name: getattr(settings, name) for name in names})
        seeds = [r.seed for r in requests]
        return self.modality.decoding(choice, seeds, whole, self.target.block)

    # ---- after ----

    def _latent(self, z: Tensor, request: Request) -> Latent:
        """Latents that may still lack their last blocks."""
        return Latent(z, request.grid if math.prod(request.grid) == len(z) else (len(z),))

    def _realise(self, made: Tensor, wish: Wish, settings: GenerationConfig) -> Any:
        """The item; a target made of blocks may be longer than was asked for."""
        if settings.official:
            return self.modality.realise_all(made)
        cut = made if self.target.block is None or wish.size is None else made[: wish.size]
        return self.modality.realise(cut)


def within(steps: Iterator[T], *contexts: Callable[[], AbstractContextManager[Any]]) -> Iterator[T]:
    """`steps`, each of which is made within these contexts, but not what is done in between."""
    while True:
        with ExitStack() as entered:
            for context in contexts:
                entered.enter_context(context())
            try:
                step = next(steps)
            except StopIteration:
                return
        yield step


def seeds(seed: Seed, count: int) -> list[int]:
    """One seed per output: given one by one, derived from one number, or drawn afresh."""
    if isinstance(seed, Sequence):
        if len(seed) != count:
            raise ValueError(f"{count} outputs need {count} seeds, found {len(seed)}")
        return list(seed)
    base = int(torch.randint(1 << 62, ())) if seed is None else seed
    return [derive(base, i) for i in range(count)]
