"""The model on fake tensors: they have shapes, devices and precisions, and no values.

The real objective runs on them, forward and backward, so that what is counted follows the code.
What does not depend on weights stays real: masks, timesteps and positions are computed as ever.

* `forward_flops` adds up PyTorch's own counter and, for attention, the pairs that see each other.
* `Ledger` follows every storage from its first use to its end: the bytes that are alive.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from unified.latents.modality import Modality, decode
from unified.latents.ragged import Latent
from unified.model import attention
from unified.model.kernels.linear import COUNTED
from unified.model.kernels.tiles import Tile
from unified.model.prior import Prior

DEVICE = "cpu"


def imagine(*modules: nn.Module) -> None:
    """Give modules on the meta device fake parameters, which no arithmetic refuses."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in modules:
            module.to_empty(device=DEVICE)


def observation(modality: Modality, grid: tuple[int, ...]) -> Tensor:
    """A blank observation that an imagined `modality` encodes to a latent of this `grid`."""
    parameter = next(modality.parameters())
    values = parameter.new_empty(torch.Size(grid).numel(), modality.channels)
    with torch.no_grad(), Attention():
        (shape,) = decode(modality, [Latent(values, grid)])
    return torch.zeros(tuple(shape.shape), dtype=shape.dtype)


def recompute(prior: Prior) -> None:
    """Checkpoint every block: only its inputs are kept, the rest is computed again."""
    for block in prior.blocks:
        block.forward = partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
        )


@contextmanager
def numbers() -> Iterator[None]:
    """Within it, code that asks a fake tensor for its number is told 1: what it does with the
    number cannot matter to a shape."""
    item = Tensor.item
    with patch.object(Tensor, "item", lambda t: 1.0 if isinstance(t, FakeTensor) else item(t)):
        yield


class Attention:
    """Scaled-dot-product attention as a fused kernel computes it: queries, keys, values, output and
    one number per query are kept for the backward pass, but no scores.

    In place of PyTorch's own while entered. Counts the `flops` of visible pairs. The CPU's kernel
    also keeps the mask, in the precision of the queries (`keeps_mask`); others read it as a rule.
    """

    def __init__(self, keeps_mask: bool = False):
        self.keeps_mask, self.flops = keeps_mask, 0
        self._patches: list[Any] = [
            patch.object(F, "scaled_dot_product_attention", self._attend),
            patch.object(attention, "at_once", self._attend),
            patch.object(attention, "in_tiles", self._in_tiles),
        ]

    def __enter__(self) -> Attention:
        for each in self._patches:
            each.start()
        return self

    def __exit__(self, *_: object) -> None:
        for each in self._patches:
            each.stop()

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None,
        dropout_p: float = 0.0, is_causal: bool = False, **_: Any,
    ) -> Tensor:  # fmt: skip
        self.flops += 2 * (q.shape[3] + v.shape[3]) * _pairs(q, k, attn_mask, is_causal)
        kept = None
        if self.keeps_mask and attn_mask is not None:
            kept = q.new_empty(attn_mask.shape)
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out: Tensor = fused(q, k, v, dropout_p, is_causal, attn_mask=kept)[0]
        return out

    def _in_tiles(self, q: Tensor, k: Tensor, v: Tensor, tiles: Sequence[Tile]) -> Tensor:
        """One row after the other, and one tile after the other in it, fill all queries."""
        parts = [self._attend(t.asked(q), t.shown(k), t.shown(v), t.mask)[0] for t in tiles]
        return torch.cat(parts, 1).unflatten(1, (len(q), -1)).transpose(0, 1)


def _pairs(q: Tensor, k: Tensor, attn_mask: Tensor | None, is_causal: bool) -> int:
    """Pairs that see each other, over all heads of all samples."""
    heads, queries, keys = q.shape[0] * q.shape[1], q.shape[2], k.shape[2]
    if attn_mask is not None:
        shared = heads // attn_mask.shape[:-2].numel()
        return int(attn_mask.sum()) * shared
    return heads * (queries * (queries + 1) // 2 if is_causal else queries * keys)


def forward_flops(run: Callable[[], object]) -> int:
    """FLOPs of what `run` does on imagined modules."""
    counter = FlopCounterMode(display=False, custom_mapping=COUNTED)
    with torch.no_grad(), Attention() as attended, counter:
        run()
    return int(counter.get_total_flops()) + attended.flops


class Ledger(TorchDispatchMode):
    """Bytes `alive` and their `peak`, of every storage that an operation makes while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Leave these out: they were there before."""
        for tensor in tensors:
            self._known[tensor.untyped_storage()] = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._enter(leaf.untyped_storage())
        return out

    def _enter(self, storage: Any) -> None:
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = size
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._leave, size)

    def _leave(self, size: int) -> None:
        self.alive -= size
