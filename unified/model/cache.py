"""The KV cache: keys and values of clean latents, with the coordinates that say who may read them.

Because the coordinates travel with the keys, reading the cache needs no rule of its own: a query
sees a cached position exactly if the table says so. Those of a pass are written behind the
committed ones, and stay only if they are committed. With a capacity, they are always written behind
so many positions, of which those not yet committed are padding: every pass over so many latents
then has the same shape, as compiled code and CUDA graphs want it.

Shape legend: R rows, S positions a pass reads, L new ones of them, H heads, D channels of a head.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from unified.sequence.visibility import Coordinates


class Room(NamedTuple):
    """What one pass reads in one layer, [R, S, H, D]; its own L positions are to be the last."""

    k: Tensor
    v: Tensor

    def take(self, k_RLHD: Tensor, v_RLHD: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values, with these as the new ones."""
        length = k_RLHD.shape[1]
        self.k[:, -length:], self.v[:, -length:] = k_RLHD, v_RLHD
        return self.k, self.v


class KVCache:
    """Grows by `PackedBatch`, or within a fixed `capacity`; one row per sample being generated. It
    carries no gradient."""

    def __init__(self, capacity: int | None = None) -> None:
        self.capacity = capacity
        self.coordinates: Coordinates | None = None
        self._layers: list[Room] = []

    def __len__(self) -> int:
        """Committed positions of a row."""
        return 0 if self.coordinates is None else self.coordinates.sample.shape[1]

    @property
    def _start(self) -> int:
        """Where a pass writes."""
        return len(self) if self.capacity is None else self.capacity

    def keys(self, query: Coordinates) -> Coordinates:
        """Coordinates of what `query` attends to: the committed positions, then its own."""
        committed = [self.coordinates] if self.coordinates else []
        if self.capacity is None:
            return Coordinates.cat([*committed, query])
        free = self.capacity - len(self)
        blank = query.map(lambda t: t.new_zeros(t.shape[0], free))
        blank = replace(blank, sample=blank.sample - 1)
        return Coordinates.cat([*committed, blank, query])

    @torch.no_grad()
    def room(
        self, layer: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Room:
        """Room for a pass over `shape` [R, L, H, D] behind what is committed, until the next."""
        rows, length, *head = shape
        stop = self._start + length
        if layer == len(self._layers):
            empty = torch.zeros(rows, 0, *head, dtype=dtype, device=device)
            self._layers.append(Room(empty, empty))
        if self._layers[layer].k.shape[1] < stop:
            self._layers[layer] = Room(*(_grown(x, stop) for x in self._layers[layer]))
        return Room(*(x[:, :stop] for x in self._layers[layer]))

    @torch.no_grad()
    def commit(self, new: Coordinates) -> None:
        """Keep what the last pass, over positions with these coordinates, has written. ValueError
        beyond the capacity."""
        length, committed = new.sample.shape[1], len(self)
        if self.capacity is not None:
            if committed + length > self.capacity:
                raise ValueError(
                    f"a cache of {self.capacity} positions has {committed} and cannot hold"
                    f" {length} more"
                )
            for x in (x for room in self._layers for x in room):
                x[:, committed : committed + length] = x[:, self._start : self._start + length]
        self.coordinates = Coordinates.cat([self.coordinates, new]) if self.coordinates else new

    def rows(self, index: Tensor) -> KVCache:
        """A cache of these rows (an index [R']) alone."""
        chosen = KVCache(self.capacity)
        if self.coordinates is not None:
            chosen.coordinates = self.coordinates.map(lambda t: t[index])
        chosen._layers = [Room(*(x[index] for x in room)) for room in self._layers]
        return chosen


def _grown(x_RSHD: Tensor, needed: int) -> Tensor:
    """`x_RSHD` at the beginning of room for twice the positions that are needed."""
    rows, length, heads, channels = x_RSHD.shape
    grown = x_RSHD.new_zeros(rows, 2 * needed, heads, channels)
    grown[:, :length] = x_RSHD
    return grown
