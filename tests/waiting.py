"""Tells whether anything waits for the device: what would have to know a number that lies there."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

#: operators whose result, or its shape, the host has to know
ASKING = {
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::equal",
    "aten::is_nonzero",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::unique_dim_consecutive",
    "aten::bincount",
    "aten::histc",
    "aten::allclose",
}
#: operators that are fine where they are told the size of what they make
SIZED = {"aten::repeat_interleave": "output_size"}
#: ways to the host that pass by the dispatcher on a CPU, where everything is at hand already
WAYS = ("cpu", "tolist", "numpy", "__array__", "item")
#: ways from the host, whose copy to a device waits unless it is made from pinned memory: `PINNING`
MADE, PINNING = ("tensor", "as_tensor", "from_numpy"), "on_device"


class WaitedError(AssertionError):
    """The host waited for the device."""


class Watch(TorchDispatchMode):
    """Refuses operators that the host would have to wait for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name, kwargs or {}
        unsized = name in SIZED and kwargs.get(SIZED[name]) is None
        # an index of truth values has as many places as are true
        masks = name in ("aten::index", "aten::index_put_") and any(
            isinstance(i, Tensor) and not i.dtype.is_floating_point and i.dtype.itemsize == 1
            for i in args[1]
        )
        if name in ASKING or unsized or masks:
            raise WaitedError(f"{name} waits for the device")
        return func(*args, **kwargs)


@contextmanager
def never_waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within it, nothing may wait for the device."""

    def refused(name: str) -> Any:
        def waits(*args: Any, **kwargs: Any) -> Any:
            raise WaitedError(f"Tensor.{name} waits for the device")

        return waits

    def pinned(make: Any) -> Any:
        def makes(*args: Any, **kwargs: Any) -> Any:
            if sys._getframe(1).f_code.co_name != PINNING:
                raise WaitedError(f"torch.{make.__name__} makes on the host what the device needs")
            return make(*args, **kwargs)

        return makes

    with monkeypatch.context() as patch, Watch():
        for name in WAYS:
            patch.setattr(Tensor, name, refused(name))
        for name in MADE:
            patch.setattr(torch, name, pinned(getattr(torch, name)))
        yield
