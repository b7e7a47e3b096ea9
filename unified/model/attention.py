"""Attention behind one call: `attend(q, k, v, seen)`.

`see` turns a visibility rule and two sets of coordinates into what a backend needs, once per
forward pass; every layer then shares it. Three backends give equal results:

* ``sdpa``: PyTorch's scaled-dot-product attention under a dense boolean mask. Runs and trains on
  every device; its cost is dense in the row length, so a CPU cuts long rows into tiles
  (`unified.model.kernels.tiles`), each of which is shown just the keys that its queries see, and
  writes their products out.
* ``flex``: FlexAttention with a block mask, which skips invisible blocks. On the CPU it has no
  backward pass, so there it is for inference only.
* ``varlen``: FlashAttention over runs of queries that see the same keys, which are gathered for
  each run; nothing hidden is computed. Best where runs are long: images, and generation. It needs
  an accelerator, and bfloat16 or float16.

Shape legend: R rows, Q query positions, S key positions, H heads, D channels of a head, n runs,
K keys of all runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unified.model.kernels.linear import product_dtype
from unified.model.kernels.tiles import Tile, at_once, cut, in_tiles
from unified.sequence.visibility import Coordinates, Visibility

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BACKENDS = ("sdpa", "flex", "varlen")
#: devices on which flex does not train, and varlen does not run
WITHOUT = ("cpu", "mps")
#: from how many queries on a CPU's attention under a mask is cut into tiles
TILED = 512
#: from how many queries on, and up to how many keys, what is not cut is written out in bfloat16 too
QUERIES, KEYS = 64, 1024


@dataclass(frozen=True)
class Runs:
    """Runs of queries, in the order of the rows, that see the same keys: an index [K] of the keys
    of one run after the other into all R * S, where the queries and the keys of each run begin
    [n + 1], and the length of the longest of each."""

    keys: Tensor
    query_starts: Tensor
    key_starts: Tensor
    longest: tuple[int, int]


@dataclass(frozen=True)
class Seen:
    """What a backend needs to know of who sees whom: a mask [R, 1, Q, S], tiles, a block mask, or
    runs; nothing if every query sees every key."""

    dense: Tensor | None = None
    tiles: list[Tile] | None = None
    blocks: BlockMask | None = None
    runs: Runs | None = None


def check_trains(backend: str, device: torch.device, precision: str) -> None:
    """ValueError for a backend that does not train on this device, in ``fp32`` or ``bf16``."""
    if backend in ("flex", "varlen") and device.type in WITHOUT:
        raise ValueError(
            f"training.attention is {backend}, which does not train on {device.type}: set it to"
            " sdpa or auto"
        )
    if backend == "varlen" and precision == "fp32":
        raise ValueError(
            "training.attention is varlen, which computes in bfloat16, but the precision is fp32:"
            " set training.precision to bf16, or training.attention to flex"
        )


def see(
    visibility: Visibility,
    query: Coordinates,
    key: Coordinates | None = None,
    backend: str = "sdpa",
    dtype: torch.dtype = torch.float32,
) -> Seen:
    """Compile the rule for these positions, for products of precision `dtype`. ValueError for an
    unknown backend."""
    key = key or query
    if backend not in BACKENDS:
        raise ValueError(f"unknown attention backend {backend!r}; choose one of {BACKENDS}")
    if backend == "sdpa":
        mask_RQS = visibility.dense(query, key)
        # in training nothing waits for the device, and packing says what is open
        if not torch.is_grad_enabled() and mask_RQS.all():
            return Seen()
        if mask_RQS.shape[1] < TILED or mask_RQS.device.type != "cpu":
            return Seen(dense=mask_RQS[:, None])
        return Seen(tiles=cut(mask_RQS, dtype))
    if backend == "varlen":
        return Seen(runs=_runs(visibility, query, key))
    (rows, queries), device = query.sample.shape, query.sample.device
    rule, keys = visibility.mask_mod(query, key), key.sample.shape[1]
    make = _block_masks(device.type)
    return Seen(blocks=make(rule, rows, None, queries, keys, device=str(device)))


def _runs(visibility: Visibility, query: Coordinates, key: Coordinates) -> Runs:
    """Positions that stand together and have the same coordinates see the same."""
    fields = torch.stack([query.sample, query.table, query.kind, query.block])
    begins_RQ = torch.ones_like(query.sample, dtype=torch.bool)
    begins_RQ[:, 1:] = (fields[:, :, 1:] != fields[:, :, :-1]).any(0)
    row_n, at_n = begins_RQ.nonzero().unbind(1)
    seen_nS = visibility.dense(
        query.map(lambda t: t[row_n, at_n, None]), key.map(lambda t: t[row_n])
    )[:, 0]
    run_K, at_K = seen_nS.nonzero().unbind(1)
    keys_n = seen_nS.sum(1)
    starts = F.pad(begins_RQ.flatten().nonzero()[:, 0], (0, 1), value=begins_RQ.numel())
    return Runs(
        keys=row_n[run_K] * seen_nS.shape[1] + at_K,
        query_starts=starts.int(),
        key_starts=F.pad(keys_n.cumsum(0), (1, 0)).int(),
        longest=(int(starts.diff().max()), int(keys_n.max())),
    )


def attend(q_RQHD: Tensor, k_RSHD: Tensor, v_RSHD: Tensor, seen: Seen) -> Tensor:
    """Softmax attention [R, Q, H, D], scores scaled by 1/sqrt(D). A query that sees nothing gets 0.

    Computed in the dtype of `v_RSHD`; the backends accumulate the softmax in at least float32.
    """
    q, k, v = (x.to(v_RSHD.dtype).transpose(1, 2) for x in (q_RQHD, k_RSHD, v_RSHD))
    if seen.runs is not None:
        return _by_run(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), seen.runs)
    if seen.blocks is not None:
        out = _flex(q.device.type)(q, k, v, block_mask=seen.blocks)
    elif seen.tiles is not None:
        out = in_tiles(q, k, v, seen.tiles)
    else:
        out = dot_product(q, k, v, seen.dense)
    return out.transpose(1, 2)


def dot_product(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool = False
) -> Tensor:
    """Attention of heads [..., H, Q, D] under a boolean mask, or a causal one; on every device as
    it is fastest there. A query that sees nothing gets 0."""
    few = q.shape[-2] < QUERIES or k.shape[-2] > KEYS
    if q.device.type == "cpu" and product_dtype(q) == torch.bfloat16 and not few:
        if is_causal:
            mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
        return at_once(q, k, v, mask)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
    if mask is None or q.device.type == "cpu":
        return out
    return out.masked_fill(~mask.any(-1, keepdim=True), 0)  # accelerators give anything


def _by_run(q: Tensor, k: Tensor, v: Tensor, runs: Runs) -> Tensor:
    """The attention of rows [R, Q, H, D], run by run in one call."""
    if q.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            "varlen attention computes in bfloat16 or float16, found"
            f" {str(q.dtype).removeprefix('torch.')}: use autocast, or another backend"
        )
    k, v = (x.flatten(0, 1).index_select(0, runs.keys) for x in (k, v))
    out = _varlen(q.device.type)(
        q.flatten(0, 1), k, v, runs.query_starts, runs.key_starts, *runs.longest
    )
    blind_n = runs.key_starts.diff() == 0
    blind = blind_n.repeat_interleave(runs.query_starts.diff(), output_size=len(out))
    return out.masked_fill(blind[:, None, None], 0).unflatten(0, q.shape[:2])


@cache
def _varlen(device: str) -> Any:
    """FlashAttention as PyTorch has it. ValueError on a device without it."""
    if device in WITHOUT:
        raise ValueError(f"varlen attention needs an accelerator with FlashAttention, not {device}")
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn


@cache
def _block_masks(device: str) -> Any:
    """How block masks are made; compiled, all pairs are never written down."""
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask if device == "cpu" else torch.compile(create_block_mask)


@cache
def _flex(device: str) -> Any:
    """FlexAttention must be compiled: uncompiled, it materialises all scores. The CPU's kernel
    cannot be compiled for dynamic shapes."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False if device == "cpu" else None)
