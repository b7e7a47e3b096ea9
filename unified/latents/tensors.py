"""The tensors inside of a batch, wherever they are: changed, moved, listed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def map_tensors(value: T, change: Callable[[Tensor], Tensor]) -> T:
    """`value` with every tensor changed, through data classes, mappings and tuples."""
    found: Any = value
    if isinstance(value, Tensor):
        found = change(value)
    elif is_dataclass(value) and not isinstance(value, type):
        inside = {f.name: getattr(value, f.name) for f in fields(value)}
        changed = {name: map_tensors(part, change) for name, part in inside.items()}
        new = {name: part for name, part in changed.items() if part is not inside[name]}
        found = replace(value, **new) if new else value
    elif isinstance(value, dict):
        found = {key: map_tensors(part, change) for key, part in value.items()}
    elif isinstance(value, tuple) and any(map(_holds, value)):
        found = tuple(map_tensors(part, change) for part in value)
    result: T = found
    return result


def _holds(value: object) -> bool:
    return isinstance(value, Tensor | dict | tuple) or is_dataclass(value)


def moved(value: T, device: torch.device | str) -> T:
    """`value` on `device`; from pinned memory, nothing waits until it is there."""
    return map_tensors(value, lambda t: t.to(device, non_blocking=True))


def tensors_of(value: object) -> list[Tensor]:
    """All tensors inside of `value`."""
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(value, keep)
    return found
