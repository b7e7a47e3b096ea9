"""Linear layers that read packed weights while something is generated on a CPU.

A matrix product with few rows spends much of its time on arranging the weights for the processor,
anew in every call. In generation the same weights are read again and again, so there oneDNN
arranges those of each layer once; it then also adds the bias and applies the activation while it
writes the product. Same weights, same sums; about twice the speed at 32 rows.

A packed copy is kept until its weights change, are trained, or go. Everything else, training,
other devices, float64, takes PyTorch's ordinary path.

Shape legend: N rows, I features in, O features out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: activation -> how it is computed after a product, and what oneDNN calls it
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[str, str]]] = {
    "none": (lambda x: x, ("none", "")),
    "gelu": (F.gelu, ("gelu", "none")),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), ("gelu", "tanh")),
    "silu": (F.silu, ("swish", "")),
}

#: whether something is being generated
_generating = ContextVar("generating", default=False)
#: layer -> its packed weights
_kept: WeakKeyDictionary[nn.Module, PackedWeights] = WeakKeyDictionary()


class PackedWeights(NamedTuple):
    """The weights of a layer as oneDNN arranges them, its bias, and of what they are a copy."""

    weight: Tensor
    bias: Tensor | None
    source: tuple[object, ...]


class Linear(nn.Linear):
    """`nn.Linear`, whose `forward` may apply an activation, one of ``ACTIVATIONS``."""

    def forward(self, x_NI: Tensor, activation: str = "none") -> Tensor:
        after, (name, algorithm) = ACTIVATIONS[activation]
        if torch.compiler.is_compiling():
            return after(super().forward(x_NI))
        if torch.is_grad_enabled() or not _generating.get():
            _kept.pop(self, None)
            return after(super().forward(x_NI))
        dtype = product_dtype(x_NI)
        if not _packs(dtype, x_NI.device.type) or not x_NI.numel():
            return after(super().forward(x_NI))
        weight, bias, _ = self._packed(dtype)
        x_NI = x_NI.to(dtype)
        return torch.ops.mkldnn._linear_pointwise(x_NI, weight, bias, name, [], algorithm)

    def _packed(self, dtype: torch.dtype) -> PackedWeights:
        """The weights for products in this precision; arranged anew if they have changed."""
        versions = [p.is_inference() or p._version for p in self.parameters()]
        source = (dtype, self.weight.data_ptr(), *versions)
        kept = _kept.get(self)
        if kept is None or kept.source != source:
            weight = torch.ops.mkldnn._reorder_linear_weight(self.weight.to(dtype), None)
            bias = None if self.bias is None else self.bias.to(dtype)
            kept = _kept[self] = PackedWeights(weight, bias, source)
        return kept


def flops(x: Sequence[int], *others: object, out_shape: Sequence[int], **options: object) -> int:
    """FLOPs of a packed product, from the shapes of what goes in and comes out."""
    del others, options
    return 2 * math.prod(x) * out_shape[-1]


#: for PyTorch's `FlopCounterMode`, which does not know the packed product
COUNTED = (
    {torch.ops.mkldnn._linear_pointwise: flops} if torch.backends.mkldnn.is_available() else {}
)


def product_dtype(x: Tensor) -> torch.dtype:
    """The precision of a product with `x`: its own, or that of autocast."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


@cache
def _packs(dtype: torch.dtype, device: str) -> bool:
    """Whether oneDNN multiplies by packed weights of this precision here."""
    if device != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    supported = torch.ops.mkldnn._is_mkldnn_bf16_supported
    return dtype == torch.float32 or (dtype == torch.bfloat16 and supported())


@contextmanager
def generating() -> Iterator[None]:
    """Within it, layers read packed weights, where there are any."""
    token = _generating.set(True)
    try:
        yield
    finally:
        _generating.reset(token)
