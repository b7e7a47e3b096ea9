"""From items to items: encode what is given, generate the target, decode and realise it.

One path serves every task. The task's table says what the target needs; each of those segments is
observed and encoded by its modality, and the target's latents are decoded by its own. A target with
a known beginning (a prompt to continue) runs along the first axis of its observation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from unified.config.schema import GenerationConfig
from unified.flow.path import STRAIGHT, Path
from unified.generation.blocks import Request, Session
from unified.latents.modality import Choice, Decoding, Modality, Side, encode
from unified.latents.ragged import Latent, Posteriors
from unified.model.kernels.linear import generating
from unified.model.precision import arithmetic
from unified.model.prior import Prior
from unified.randomness import derive, noise
from unified.sequence.task import Task

#: strategies that fill the prompt up to whole blocks, so that no block is mixed
PADDED: dict[str, Side] = {"left": "left", "right": "right"}

Seed = int | Sequence[int] | None


@dataclass(frozen=True)
class Wish:
    """What one output is made from: items by kind, and its size in its modality's own unit.

    A `Latent` in place of an item is taken as it is. A beginning that is one is part of the output;
    of one that is an item, the output is what follows.
    """

    given: Mapping[str, Any]
    size: Any = None
    #: initial noise of each block, in place of what the seed draws
    noise: Sequence[Tensor] | None = None
    #: the grid of what is new, in place of a size
    grid: tuple[int, ...] | None = None


@dataclass(frozen=True)
class _Given:
    """What is given, as latents or as observations; of the target's, `known` symbols and a `grid`
    of latents."""

    latents: dict[str, Latent]
    observations: dict[str, Tensor]
    known: int = 0
    grid: tuple[int, ...] | None = None


@dataclass
class _Batch:
    """Wishes that are made together, with what is decoded of each, and whether it has ended."""

    wishes: Sequence[Wish]
    given: Sequence[_Given]
    session: Session
    decoding: Decoding
    settings: GenerationConfig
    ended: list[bool]


class Inference:
    """Runs one task of a model."""

    def __init__(
        self,
        modalities: Mapping[str, Modality],
        tasks: Mapping[str, Task],
        prior: Prior,
        task: str,
        path: Path = STRAIGHT,
    ):
        self.name, self.task = task, tasks[task]
        self.layout = self.task.layout
        self.target = self.layout[self.task.generates]
        self.modalities = modalities
        self.modality = modalities[self.target.modality]
        self.prior, self.layouts = prior, {name: t.layout for name, t in tasks.items()}
        self.path = path
        for module in (prior, *modalities.values()):
            module.eval()

    def stream(
        self, wishes: Sequence[Wish], settings: GenerationConfig, seed: Seed = None
    ) -> Iterator[dict[int, Any]]:
        """After every block, ``{wish: its item so far}``; a wish whose item has ended drops out."""
        if not wishes:
            return
        with self._computing(settings):
            batch = self._begin(wishes, settings, seeds(seed, len(wishes)))
        while batch.session.active:
            with self._computing(settings):
                items = self._items(batch, batch.session.step())
            yield items

    @contextmanager
    def _computing(self, settings: GenerationConfig) -> Iterator[None]:
        """How networks run while something is made; not in between, when the caller goes on."""
        device = next(self.prior.parameters()).device
        with generating(), torch.no_grad(), arithmetic(settings.precision, device):
            yield

    # ---- before ----

    def _begin(
        self, wishes: Sequence[Wish], settings: GenerationConfig, seeds: Sequence[int]
    ) -> _Batch:
        """Everything given, observed and encoded."""
        given = [self._observe(w, settings) for w in wishes]
        requests = self._requests(wishes, given, seeds, settings)
        of, target = (self.prior, self.layouts, self.name), self.target.kind
        session = Session(*of, target, requests, settings, self.path)
        whole = [self._whole(request) for request in requests]
        decoding = self._decoding(requests, whole, settings)
        return _Batch(wishes, given, session, decoding, settings, [False] * len(wishes))

    def _observe(self, wish: Wish, settings: GenerationConfig) -> _Given:
        """Kind -> observation of everything given, and how much of the target is known."""
        target = self.target.kind
        latents = {kind: x for kind, x in wish.given.items() if isinstance(x, Latent)}
        observations = {
            kind: self.task.observe(self.modalities, kind, item)
            for kind, item in wish.given.items()
            if kind != target and kind not in latents
        }
        if target not in wish.given or target in latents:
            return _Given(latents, observations)
        text = self.modality.beginning(wish.given[target])
        if not len(text):
            raise ValueError(f"what {self.name} is to continue is empty")
        side, block = self._filling(settings)
        filled = self.modality.pad(text, block, side)
        padded = settings.first_block in PADDED
        known = len(text) if side == "right" and not padded else len(filled)
        # pads are encoded with the text; only what holds some of the text is known of the latents
        cut = filled if padded else self.modality.pad(text, 1, side)
        return _Given(latents, observations | {target: filled}, known, self.modality.grid(cut))

    def _filling(self, settings: GenerationConfig) -> tuple[Side, int]:
        """Where a beginning is filled up, and to whole blocks of how many latents."""
        block = self.target.block or 1
        if settings.first_block in PADDED:
            return PADDED[settings.first_block], block
        return ("right", block) if settings.official else (self.modality.boundary, 1)

    def _requests(
        self,
        wishes: Sequence[Wish],
        starts: Sequence[_Given],
        seeds: Sequence[int],
        settings: GenerationConfig,
    ) -> list[Request]:
        encoded = [dict(start.latents) for start in starts]
        for name, modality in self.modalities.items():
            found = [
                (i, kind, o)
                for i, start in enumerate(starts)
                for kind, o in start.observations.items()
                if self.layout[kind].modality == name
            ]
            posteriors = encode(modality, [o for _, _, o in found])
            for (i, kind, _), posterior in zip(found, posteriors, strict=True):
                values = self._given(posterior, settings, seeds[i], kind)
                grid = (starts[i].grid if kind == self.target.kind else None) or posterior.grid
                encoded[i][kind] = Latent(values[: math.prod(grid)], grid)
        return [
            Request(given, self._grid(wish, given, settings), seed, wish.noise)
            for wish, given, seed in zip(wishes, encoded, seeds, strict=True)
        ]

    def _given(
        self, posterior: Posteriors, settings: GenerationConfig, seed: int, kind: str
    ) -> Tensor:
        """What is given, as latents [L, C]: the posterior's mean, or a sample of it."""
        if settings.prefix == "mean":
            return posterior.mean_NC
        shape = (len(posterior.mean_NC), posterior.mean_NC.shape[1])
        return posterior.sample(noise(shape, seed, "prefix", kind)).values

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
        grid = wish.grid or self.modality.grid_for(wish.size)
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

    def _items(self, batch: _Batch, latents: Mapping[int, Tensor]) -> dict[int, Any]:
        """The items so far, of `latents`; the session goes on without what has ended."""
        official, requests = batch.settings.official, batch.session.requests
        shaped = [self._latent(z, requests[i]) for i, z in latents.items()]
        observed = batch.decoding.extend(list(latents), shaped)
        made = {}
        for i, o in zip(latents, observed, strict=True):
            new = o[batch.given[i].known :]
            made[i] = self._realise(new, batch.wishes[i], batch.settings)
            # the official code also looks at what it decodes of the prompt
            seen = o[self._whole(requests[i]) * self.modality.symbols :] if official else new
            batch.ended[i] = batch.ended[i] or self.modality.has_ended(seen)
        ended = [i for i in latents if batch.ended[i]]
        batch.session.finish(ended if not official or all(batch.ended) else [])
        return made

    def _latent(self, z: Tensor, request: Request) -> Latent:
        """Latents that may still lack their last blocks."""
        return Latent(z, request.grid if math.prod(request.grid) == len(z) else (len(z),))

    def _realise(self, made: Tensor, wish: Wish, settings: GenerationConfig) -> Any:
        """The item; a target made of blocks may be longer than was asked for."""
        if settings.official:
            return self.modality.realise_all(made)
        cut = made if self.target.block is None or wish.size is None else made[: wish.size]
        return self.modality.realise(cut)


def seeds(seed: Seed, count: int) -> list[int]:
    """One seed per output: given one by one, derived from one number, or drawn afresh."""
    if isinstance(seed, Sequence):
        if len(seed) != count:
            raise ValueError(f"{count} outputs need {count} seeds, found {len(seed)}")
        return list(seed)
    base = int(torch.randint(1 << 62, ())) if seed is None else seed
    return [derive(base, i) for i in range(count)]
