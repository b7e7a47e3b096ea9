"""Attention behind one call: `attend(q, k, v, seen)`.

`see` turns a visibility rule and two sets of coordinates into what a backend needs, once per
forward pass; every layer then shares it. Two backends give equal results:

* ``sdpa``: PyTorch's scaled-dot-product attention under a dense boolean mask. Runs and trains on
  every device; its cost is dense in the row length, so long rows are cut into tiles of queries,
  each of which is shown just the keys that one of them sees.
* ``flex``: FlexAttention with a block mask, which skips invisible blocks. On the CPU it has no
  backward pass, so there it is for inference only.

Shape legend: R rows, Q query positions, S key positions, H heads, D channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unified.visibility import Coordinates, Visibility

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BACKENDS = ("sdpa", "flex")
#: queries of a tile, and from how many queries on a row is cut into tiles
TILE, TILED = 128, 256


@dataclass(frozen=True)
class Tile:
    """Some queries of one row: the keys that any of them sees, one run or an index [K], and who
    sees which [q, K]; None if each sees them all."""

    keys: slice | Tensor
    mask: Tensor | None

    def of(self, x: Tensor) -> Tensor:
        """The keys' part [1, H, K, D] of all [1, H, S, D]."""
        return x[:, :, self.keys] if isinstance(self.keys, slice) else x.index_select(2, self.keys)


@dataclass(frozen=True)
class Seen:
    """What a backend needs to know of who sees whom: a mask [R, 1, Q, S], the tiles of each row,
    or a block mask; nothing if every query sees every key."""

    dense: Tensor | None = None
    tiles: list[list[Tile]] | None = None
    blocks: BlockMask | None = None


def default_backend(device: torch.device) -> str:
    """``flex`` where the device trains with it, ``sdpa`` everywhere else."""
    return "flex" if device.type not in ("cpu", "mps") else "sdpa"


def see(
    visibility: Visibility,
    query: Coordinates,
    key: Coordinates | None = None,
    backend: str | None = None,
) -> Seen:
    """Compile the rule for these positions. ValueError for an unknown backend."""
    key = key or query
    backend = backend or default_backend(query.sample.device)
    if backend not in BACKENDS:
        raise ValueError(f"unknown attention backend {backend!r}; choose one of {BACKENDS}")
    if backend == "sdpa":
        mask_RQS = visibility.dense(query, key)
        if mask_RQS.all():
            return Seen()
        if mask_RQS.shape[1] < TILED:
            return Seen(dense=mask_RQS[:, None])
        return Seen(tiles=[[_tile(m) for m in row.split(TILE)] for row in mask_RQS.unbind()])
    from torch.nn.attention.flex_attention import create_block_mask

    rows, queries = query.sample.shape
    rule = visibility.mask_mod(query, key)
    device = str(query.sample.device)
    return Seen(
        blocks=create_block_mask(rule, rows, None, queries, key.sample.shape[1], device=device)
    )


def _tile(mask_qS: Tensor) -> Tile:
    keys = mask_qS.any(0).nonzero()[:, 0]
    first, stop = (int(keys[0]), int(keys[-1]) + 1) if len(keys) else (0, 0)
    run = slice(first, stop) if stop - first == len(keys) else keys
    mask_qK = mask_qS[:, run]
    return Tile(run, None if len(keys) and mask_qK.all() else mask_qK)


def attend(q_RQHD: Tensor, k_RSHD: Tensor, v_RSHD: Tensor, seen: Seen) -> Tensor:
    """Softmax attention [R, Q, H, D], scores scaled by 1/sqrt(D). A query that sees nothing gets 0.

    Computed in the dtype of `v_RSHD`; the backends accumulate the softmax in at least float32.
    """
    q, k, v = (x.to(v_RSHD.dtype).transpose(1, 2) for x in (q_RQHD, k_RSHD, v_RSHD))
    if seen.blocks is not None:
        out = _flex(q.device.type)(q, k, v, block_mask=seen.blocks)
    elif seen.tiles is not None:
        rows = zip(q.split(1), k.split(1), v.split(1), seen.tiles, strict=True)
        out = torch.cat([_by_tile(*row) for row in rows])
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen.dense)
    return out.transpose(1, 2)


def _by_tile(q: Tensor, k: Tensor, v: Tensor, tiles: list[Tile]) -> Tensor:
    """The attention of one row [1, H, Q, D], tile by tile."""
    parts = [
        F.scaled_dot_product_attention(part, t.of(k), t.of(v), attn_mask=t.mask)
        if t.mask is None or t.mask.numel()
        else torch.zeros_like(part)
        for part, t in zip(q.split(TILE, dim=2), tiles, strict=True)
    ]
    return torch.cat(parts, dim=2)


@cache
def _flex(device: str) -> Any:
    """FlexAttention must be compiled: uncompiled, it materialises all scores. The CPU's kernel
    cannot be compiled for dynamic shapes."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False if device == "cpu" else None)
