"""A stand-in for a device's graphs, which records on the CPU what PyTorch is told to do.

Replaying does the same again with the tensors that were there, as a device does; so it shows
whether a function depends on something that is no tensor, or on one that is made anew.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Graph(TorchDispatchMode):
    """The part of `CUDAGraph` that is used. `replays` counts over all graphs."""

    replays = 0

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def capture_begin(self, **options: Any) -> None:
        self.__enter__()

    def capture_end(self) -> None:
        self.__exit__(None, None, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, made))
        return made

    def replay(self) -> None:
        Graph.replays += 1
        for func, args, kwargs, made in self.calls:
            for old, new in zip(tree_leaves(made), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old is not new and old.data_ptr():
                    old.copy_(new)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the CPU graphs, of which none has been replayed."""
    monkeypatch.setattr(torch.cpu, "CUDAGraph", Graph, raising=False)
    monkeypatch.setattr(Graph, "replays", 0)
