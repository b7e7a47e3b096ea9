"""Observations in any order as the batch that a modality's network reads."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from unified.data.batches import Items
from unified.latents.modality import Modality
from unified.latents.ragged import Ragged
from unified.randomness import Chance, ItemChance


def ragged(modality: Modality, observations: Sequence[Tensor]) -> Ragged:
    return both(modality, observations)[0]


def both(
    modality: Modality,
    observations: Sequence[Tensor],
    keys: Sequence[int] | None = None,
    step: int = 0,
) -> tuple[Ragged, ItemChance]:
    """The batch, and its items' chance at a step; item i has that of number ``keys[i]``, or i."""
    numbers = range(len(observations)) if keys is None else keys
    items, _ = Items.of(modality, observations, numbers)
    return items.whole("a test has observations"), items.chance(Chance(0, step=step))
