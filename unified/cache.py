"""The KV cache: keys and values of clean latents, with the coordinates that say who may read them.

Because the coordinates travel with the keys, reading the cache needs no rule of its own: a query
sees a cached position exactly if the table says so. Keys and values lie in buffers with room to
grow: those of a pass are written behind the committed ones, and stay only if they are committed.

Shape legend: R rows, S committed positions, L new ones, H heads, D channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unified.visibility import Coordinates


class KVCache:
    """Grows by `PackedBatch`; one row per sample being generated. It carries no gradient."""

    def __init__(self) -> None:
        self.coordinates: Coordinates | None = None
        self._layers: list[tuple[Tensor, Tensor]] = []

    def __len__(self) -> int:
        """Committed positions of a row."""
        return 0 if self.coordinates is None else self.coordinates.sample.shape[1]

    def keys(self, query: Coordinates) -> Coordinates:
        """Coordinates of what `query` attends to: the committed positions, then its own."""
        return Coordinates.cat([self.coordinates, query]) if self.coordinates else query

    @torch.no_grad()
    def read(self, layer: int, k_RLHD: Tensor, v_RLHD: Tensor) -> tuple[Tensor, Tensor]:
        """[committed | new] keys and values of one layer, valid until the next pass; kept in the
        dtype of the values."""
        start, stop = len(self), len(self) + k_RLHD.shape[1]
        if layer == len(self._layers):
            self._layers.append((_room(v_RLHD, stop), _room(v_RLHD, stop)))
        k, v = self._layers[layer]
        if k.shape[1] < stop:
            k, v = (_room(v_RLHD, stop, old[:, :start]) for old in (k, v))
            self._layers[layer] = k, v
        k[:, start:stop], v[:, start:stop] = k_RLHD, v_RLHD
        return k[:, :stop], v[:, :stop]

    def commit(self, new: Coordinates) -> None:
        """Keep what the last pass, over positions with these coordinates, has read."""
        self.coordinates = self.keys(new)

    def rows(self, index: Tensor) -> KVCache:
        """A cache of these rows (an index [R']) alone."""
        chosen = KVCache()
        if self.coordinates is not None:
            chosen.coordinates = self.coordinates.map(lambda t: t[index])
        chosen._layers = [(k[index], v[index]) for k, v in self._layers]
        return chosen


def _room(new_RLHD: Tensor, needed: int, old_RSHD: Tensor | None = None) -> Tensor:
    """A buffer for twice the positions that are needed, beginning with the old ones."""
    rows, _, heads, channels = new_RLHD.shape
    buffer = new_RLHD.new_empty(rows, 2 * needed, heads, channels)
    if old_RSHD is not None:
        buffer[:, : old_RSHD.shape[1]] = old_RSHD
    return buffer
