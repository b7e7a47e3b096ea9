"""The KV cache: keys and values of clean latents, with the coordinates that say who may read them.

Because the coordinates travel with the keys, reading the cache needs no rule of its own: a query
sees a cached position exactly if the table says so.

Shape legend: R rows, S cached positions, H heads, D channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unified.visibility import Coordinates


class KVCache:
    """Grows by `PackedBatch`; one row per sample being generated."""

    def __init__(self) -> None:
        self.coordinates: Coordinates | None = None
        self.layers: list[tuple[Tensor, Tensor]] = []

    def keys(self, query: Coordinates) -> Coordinates:
        """Coordinates of what `query` attends to: the cached positions, then its own."""
        return Coordinates.cat([self.coordinates, query]) if self.coordinates else query

    def read(self, layer: int, k_RLHD: Tensor, v_RLHD: Tensor) -> tuple[Tensor, Tensor]:
        """[cached | new] keys and values of one layer."""
        if layer >= len(self.layers):
            return k_RLHD, v_RLHD
        k, v = self.layers[layer]
        return torch.cat([k, k_RLHD], dim=1), torch.cat([v, v_RLHD], dim=1)

    def write(self, layer: int, k_RSHD: Tensor, v_RSHD: Tensor) -> None:
        """Keep [cached | new], as `read` returned it."""
        if layer == len(self.layers):
            self.layers.append((k_RSHD, v_RSHD))
        else:
            self.layers[layer] = (k_RSHD, v_RSHD)

    def rows(self, index: Tensor) -> KVCache:
        """A cache of these rows (an index [R']) alone."""
        chosen = KVCache()
        if self.coordinates is not None:
            chosen.coordinates = self.coordinates.map(lambda t: t[index])
        chosen.layers = [(k[index], v[index]) for k, v in self.layers]
        return chosen
