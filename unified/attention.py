"""Attention behind one call: `attend(q, k, v, seen)`.

`see` turns a visibility rule and two sets of coordinates into what a backend needs, once per
forward pass; every layer then shares it. Two backends give equal results:

* ``sdpa``: PyTorch's scaled-dot-product attention under a dense boolean mask. Runs and trains on
  every device; its cost is dense in the row length.
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


@dataclass(frozen=True)
class Seen:
    """What a backend needs to know of who sees whom: a mask [R, 1, Q, S], or a block mask."""

    dense: Tensor | None = None
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
        return Seen(dense=visibility.dense(query, key)[:, None])
    from torch.nn.attention.flex_attention import create_block_mask

    rows, queries = query.sample.shape
    rule = visibility.mask_mod(query, key)
    device = str(query.sample.device)
    return Seen(
        blocks=create_block_mask(rule, rows, None, queries, key.sample.shape[1], device=device)
    )


def attend(q_RQHD: Tensor, k_RSHD: Tensor, v_RSHD: Tensor, seen: Seen) -> Tensor:
    """Softmax attention [R, Q, H, D], scores scaled by 1/sqrt(D). A query that sees nothing gets 0.

    Computed in the dtype of `v_RSHD`; the backends accumulate the softmax in at least float32.
    """
    q, k, v = (x.to(v_RSHD.dtype).transpose(1, 2) for x in (q_RQHD, k_RSHD, v_RSHD))
    if seen.blocks is not None:
        out = _flex(q.device.type)(q, k, v, block_mask=seen.blocks)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen.dense)
    return out.transpose(1, 2)


@cache
def _flex(device: str) -> Any:
    """FlexAttention must be compiled: uncompiled, it materialises all scores. The CPU's kernel
    cannot be compiled for dynamic shapes."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False if device == "cpu" else None)
