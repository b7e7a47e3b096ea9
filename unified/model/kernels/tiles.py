"""Attention on a CPU: the products that it is made of, tile by tile, and their gradients.

A tile is some queries of a row and just the keys that one of them sees. Its scores are few enough
to stay near the processor, and what no query of a tile sees is never computed. The weights of a
tile with few keys are kept for the backward pass, those of a longer one are computed again.

PyTorch's fused kernel for CPUs is made for little memory. In bfloat16 it takes 1.3 to 5 times as
long to train, also where nothing is cut into tiles.

Shape legend: R rows, H heads, Q queries, S keys of a row, D channels of a head; q and K the queries
and the keys of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from unified.model.kernels.linear import product_dtype

#: bytes of one channel of a tile's queries: 128 queries in float32, 256 in bfloat16
TILE = 512
#: the most keys of a tile whose weights are kept
KEPT = 1024

ALL = slice(None)


@dataclass(frozen=True)
class Tile:
    """Which queries of which rows, runs of the keys that any of them sees, and who sees which: a
    boolean mask that broadcasts to [R, H, q, K], None if each sees them all."""

    rows: slice
    queries: slice
    keys: tuple[slice, ...]
    mask: Tensor | None
    _numbers: dict[torch.dtype, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def asked(self, x_RHQD: Tensor) -> Tensor:
        """The part [.., H, q, D] of what belongs to queries."""
        return x_RHQD[self.rows, :, self.queries]

    def shown(self, x_RHSD: Tensor) -> Tensor:
        """The part [.., H, K, D] of what belongs to keys."""
        runs = [x_RHSD[self.rows, :, run] for run in self.keys]
        return runs[0] if len(runs) == 1 else torch.cat(runs, 2)

    def add(self, to_RHSD: Tensor, part: Tensor) -> None:
        """Add to where `shown` took from."""
        runs = [to_RHSD[self.rows, :, run] for run in self.keys]
        for run, x in zip(runs, part.split([r.shape[2] for r in runs], dim=2), strict=True):
            run += x

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """Of each query [.., H, q, K] on what it sees; 0 for one that sees nothing."""
        scores = q @ k.transpose(-1, -2)
        if self.mask is None:
            return torch.ops.aten._softmax(scores, -1, False)
        weights: Tensor = torch.ops.aten._softmax(scores.add_(self._hidden(q.dtype)), -1, False)
        return weights if self._sees is None else weights * self._sees

    @cached_property
    def _sees(self) -> Tensor | None:
        """Which queries see anything; None if all do."""
        assert self.mask is not None
        sees = self.mask.any(-1, keepdim=True)
        return None if sees.all() else sees

    def _hidden(self, dtype: torch.dtype) -> Tensor:
        """What is added to the scores of pairs that do not see each other. Not infinity: where all
        is hidden it would leave no number."""
        if dtype not in self._numbers:
            assert self.mask is not None
            least = torch.finfo(dtype).min / 2
            numbers = torch.zeros_like(self.mask, dtype=dtype).masked_fill_(~self.mask, least)
            self._numbers[dtype] = numbers
        return self._numbers[dtype]


def cut(mask_RQS: Tensor, dtype: torch.dtype) -> list[Tile]:
    """The tiles of rows of queries, for products of this precision."""
    size = TILE // dtype.itemsize
    return [
        _tile(row, at * size, mask_qS)
        for row, mask_QS in enumerate(mask_RQS)
        for at, mask_qS in enumerate(mask_QS.split(size))
    ]


def _tile(row: int, first: int, mask_qS: Tensor) -> Tile:
    index_K = mask_qS.any(0).nonzero()[:, 0]
    breaks = (index_K.diff() != 1).nonzero()[:, 0] + 1
    runs = [run.tolist() for run in index_K.tensor_split(breaks)]
    keys = tuple(slice(run[0], run[-1] + 1) if run else slice(0, 0) for run in runs)
    mask_qK = mask_qS[:, index_K]
    return Tile(
        slice(row, row + 1),
        slice(first, first + len(mask_qS)),
        keys,
        None if len(index_K) and mask_qK.all() else mask_qK,
    )


def at_once(q_RHQD: Tensor, k_RHSD: Tensor, v_RHSD: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention [R, H, Q, D], scores scaled by 1/sqrt(D), in the precision of products. A
    query that sees nothing gets 0."""
    q, k, v = (x.to(product_dtype(x)) for x in (q_RHQD, k_RHSD, v_RHSD))
    return Tile(ALL, ALL, (ALL,), mask).weights(scaled(q), k) @ v


def in_tiles(q_RHQD: Tensor, k_RHSD: Tensor, v_RHSD: Tensor, tiles: Sequence[Tile]) -> Tensor:
    """The same, tile by tile; the tiles hold every query once."""
    q, k, v = (x.to(product_dtype(x)) for x in (q_RHQD, k_RHSD, v_RHSD))
    out: Tensor = _Products.apply(q, k, v, tiles)
    return out


class _Products(torch.autograd.Function):
    """`in_tiles`. Gradients of keys and values are added up in place, where PyTorch would make a
    tensor of all keys for each tile."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, tiles: Sequence[Tile]) -> Tensor:
        out, kept = torch.empty_like(q), []
        for tile in tiles:
            weights = tile.weights(scaled(tile.asked(q)), tile.shown(k))
            tile.asked(out).copy_(weights @ tile.shown(v))
            kept.append(weights if weights.shape[-1] <= KEPT else None)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.tiles = tiles
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for tile, weights in zip(ctx.tiles, kept, strict=True):
            grad, queries, keys = tile.asked(grad_out), scaled(tile.asked(q)), tile.shown(k)
            if weights is None:
                weights = tile.weights(queries, keys)
            tile.add(grad_v, weights.transpose(-1, -2) @ grad)
            grad_weights = grad @ tile.shown(v).transpose(-1, -2)
            grad_scores = torch.ops.aten._softmax_backward_data(
                grad_weights, weights, -1, weights.dtype
            )
            tile.asked(grad_q).copy_(scaled(grad_scores @ keys))
            tile.add(grad_k, grad_scores.transpose(-1, -2) @ queries)
        return grad_q, grad_k, grad_v, None


def scaled(q_HqD: Tensor) -> Tensor:
    return q_HqD * q_HqD.shape[-1] ** -0.5
