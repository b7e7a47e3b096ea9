"""What crosses from a data worker to the training process: a few tensors, whatever the batch size.

A worker prepares the examples of a step, and collates them: the items of each modality become one
`Items`, and an objective's collator makes its batch of them. Between the two processes travel
whole tensors, never one for each example.

Shape legend: B items of one modality, N latents of all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from unified.data.streams import Prepared
from unified.latents.modality import Modality, Observed, by_shape, grid_of
from unified.latents.ragged import Posteriors, Ragged, Runs
from unified.randomness import Chance, ItemChance


class Batch(Protocol):
    """Some examples of one step, collated: `counts` is loss term -> number of positions, and
    `positions` how many hold a latent and how many there are, padding included."""

    @property
    def counts(self) -> Mapping[str, float]: ...

    @property
    def positions(self) -> tuple[float, float]: ...


#: (this process's examples of one microbatch, step) -> what its objective wants to see of them
Collate = Callable[[Sequence[Prepared], int], Any]


@dataclass(frozen=True)
class Items:
    """The items that a batch holds of one modality: observations, and behind them posteriors that
    somebody stored; each sorted by shape. `item_B` says whose chance an item has, `item_N` and
    `place_N` the same of each latent, and where in its item it is; `grids` are the runs of all
    items' grids."""

    observations: Ragged | None
    stored: Posteriors | None
    grids: Runs
    item_B: Tensor
    item_N: Tensor
    place_N: Tensor

    @classmethod
    def of(
        cls, modality: Modality, observed: Sequence[Observed], item: Sequence[int]
    ) -> tuple[Items, list[int]]:
        """The items, and the order that they have here: places in `observed`."""
        tensors = [i for i, o in enumerate(observed) if isinstance(o, Tensor)]
        stored = [i for i, o in enumerate(observed) if isinstance(o, Posteriors)]
        tensors = [tensors[k] for k in by_shape([tuple(observed[i].shape) for i in tensors])]  # type: ignore[union-attr]
        stored = [stored[k] for k in by_shape([observed[i].grid for i in stored])]  # type: ignore[union-attr]
        order = [*tensors, *stored]
        raw: list[Any] = list(observed)
        observations = modality.collate([raw[i] for i in tensors]) if tensors else None
        runs = modality.grids(observations) if observations is not None else ()
        lengths = np.array(
            [math.prod(g) for count, g in runs for _ in range(count)]
            + [math.prod(grid_of(modality, observed[i])) for i in stored]
        )
        begins = np.cumsum(lengths) - lengths
        item_B = np.array([item[i] for i in order], np.int64)
        place_N = np.arange(lengths.sum()) - np.repeat(begins, lengths)
        kept = Posteriors.cat([raw[i] for i in stored]) if stored else None
        items = cls(
            observations,
            kept,
            (*runs, *(kept.runs if kept else ())),
            *map(torch.from_numpy, (item_B, np.repeat(item_B, lengths), place_N)),
        )
        return items, order

    def chance(self, of: Chance) -> ItemChance:
        """The chance of these items."""
        return ItemChance(of, self.item_B, self.item_N, self.place_N)

    def posteriors(self, modality: Modality) -> Posteriors:
        """The posteriors of all items, encoded where they are not stored."""
        encoded = [] if self.observations is None else [modality.encode(self.observations)]
        stored = [] if self.stored is None else [self.stored]
        parts = [*encoded, *stored]
        return parts[0] if len(parts) == 1 else Posteriors.cat(parts)

    def whole(self, why: str) -> Ragged:
        """The observations of all items. ValueError, which says `why` they are needed, where some
        have only their latents."""
        if self.stored is not None or self.observations is None:
            raise ValueError(why)
        return self.observations


def microbatches(
    examples: Sequence[Prepared], collate: Collate, step: int, process: int, world: int, parts: int
) -> list[Any]:
    """This process's `parts` microbatches of a step. Of the ``every = world * parts`` that all
    have, microbatch a of process r takes the examples with ``slot % every == a * world + r``."""
    every = world * parts
    shares = [[e for e in examples if e.slot % every == a * world + process] for a in range(parts)]
    return [collate(share, step) for share in shares]
