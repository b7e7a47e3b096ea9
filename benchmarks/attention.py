"""Milliseconds of attention alone, by backend and row length, as a share of matmul speed.

    python benchmarks/attention.py                        # a table; --json for JSON
    python benchmarks/attention.py --dtype bf16 --lengths 256 1024 --threads 2
    python benchmarks/attention.py --dtype bf16 --device cuda --backends sdpa flex varlen

A row is one sample of continuation, clean and noisy, in the shape of the reference model's heads;
each length has as many rows as make `--positions` positions.

* ``sdpa``: one call over [clean | noisy] under the dense mask of `unified.model.attention.see`
* ``flex``: FlexAttention, compiled; on the CPU it has no backward pass
* ``varlen``: FlashAttention over runs that see the same keys; not on the CPU
* ``halves``: two SDPA calls, clean on clean and noisy on both: a quarter of the pairs less

`share` counts FLOPs of visible pairs only (a dense kernel computes the others nonetheless), and
three times as many with the backward pass.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import machine
import reference
import torch
import torch.nn.functional as F
from torch import Tensor

from unified.config.plugins import resolve_model
from unified.config.schema import PriorConfig
from unified.model.attention import WITHOUT, attend, see
from unified.planning.flops import TRAINING, visible_pairs
from unified.sequence.packing import PackedBatch, Sample, pack
from unified.sequence.visibility import Visibility

#: queries, keys and values [R, L, H, D] to what attention gives of them
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
#: backends that have a backward pass on every device
TRAINS = ("sdpa", "halves")


def rows_of(length: int, rows: int, args: argparse.Namespace) -> PackedBatch:
    """So many rows of one sample each: `length` positions, half of them clean."""
    layout = resolve_model(reference.configuration(args.size)).tasks["continuation"].layout
    rule = Visibility({"continuation": layout.sees})
    samples = [Sample("continuation", {"C": (length // 2,)}) for _ in range(rows)]
    return pack(samples, {"continuation": layout}, rule, None, 3).to(args.device)


def one_call(batch: PackedBatch, backend: str) -> Attention:
    """The backend as the prior uses it; what it knows of who sees whom is made once."""
    return partial(attend, seen=see(batch.visibility, batch.coordinates, backend=backend))


def two_calls(batch: PackedBatch) -> Attention:
    """Clean queries on clean keys, and noisy queries on all keys."""
    mask = batch.visibility.dense(batch.coordinates)[:, None]
    half = mask.shape[-1] // 2
    clean, noisy = mask[..., :half, :half], mask[..., half:, :]

    def run(q_RLHD: Tensor, k_RLHD: Tensor, v_RLHD: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q_RLHD, k_RLHD, v_RLHD))
        first = F.scaled_dot_product_attention(
            q[:, :, :half], k[:, :, :half], v[:, :, :half], attn_mask=clean
        )
        second = F.scaled_dot_product_attention(q[:, :, half:], k, v, attn_mask=noisy)
        return torch.cat([first, second], dim=2).transpose(1, 2)

    return run


BACKENDS: dict[str, Callable[[PackedBatch], Attention]] = {
    "sdpa": partial(one_call, backend="sdpa"),
    "flex": partial(one_call, backend="flex"),
    "varlen": partial(one_call, backend="varlen"),
    "halves": two_calls,
}


def inputs(batch: PackedBatch, config: PriorConfig, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys and values [R, L, H, D]."""
    shape, device = (*batch.shape, config.heads, config.head_dim), batch.time_RL.device
    return [machine.randn(shape, seed).to(device, dtype) for seed in range(3)]


def measure(
    backend: str, length: int, args: argparse.Namespace, limit: machine.Limit
) -> dict[str, Any]:
    """One row of the table."""
    config = reference.configuration(args.size).prior
    batch = rows_of(length, max(1, args.positions // length), args)
    qkv, run = inputs(batch, config, machine.DTYPES[args.dtype]), BACKENDS[backend](batch)
    flops = 4 * config.heads * config.head_dim * visible_pairs(batch)
    run(*qkv)
    forward = machine.best_of(lambda: run(*qkv), args.repeats)
    row = {
        "backend": backend, "length": length, "rows": len(batch.time_RL),
        "forward_ms": 1e3 * forward, "forward_share": limit.share(flops, forward),
    }  # fmt: skip
    if backend in TRAINS or args.device not in WITHOUT:
        learning = [x.requires_grad_() for x in qkv]
        run(*learning).sum().backward()
        step = machine.best_of(lambda: run(*learning).sum().backward(), args.repeats)
        row |= {"step_ms": 1e3 * step, "step_share": limit.share(TRAINING * flops, step)}
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    options = machine.parser(__doc__)
    machine.add_model_options(options, list(reference.SIZES))
    everywhere = [name for name in BACKENDS if name != "varlen"]
    options.add_argument("--backends", nargs="+", choices=list(BACKENDS), default=everywhere)
    options.add_argument("--lengths", nargs="+", type=int, default=[128, 256, 512, 1024, 2048])
    options.add_argument("--positions", type=int, default=4096, help="of all rows together")
    args = machine.parse(options, arguments)
    limit, rows = machine.Limit(args.dtype, args.matmul_seconds, args.device), []
    for length in args.lengths:
        limit.look()
        rows += [measure(backend, length, args, limit) for backend in args.backends]
    machine.show(rows, args)


if __name__ == "__main__":
    main()
