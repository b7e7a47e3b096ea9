"""An exponential moving average of the parameters that train.

After each step ``shadow += (1 - d) * (parameter - shadow)`` with
``d = min(decay, (1 + step) / (warmup + step))``: young averages forget fast. The shadow is kept in
float32 at least, and is what validation, samples and the finished model use.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from unified.config.schema import EMAConfig


class EMA:
    """The averages (`shadow`, by name) of `parameters`."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: EMAConfig):
        self.config = config
        self.parameters = dict(parameters)
        self.shadow: dict[str, Tensor] = {
            name: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
            for name, p in self.parameters.items()
        }

    def decay(self, step: int) -> float:
        """The decay of step `step` (from 0)."""
        return min(self.config.decay, (1 + step) / (max(1, self.config.warmup) + step))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the parameters. Those at rest (no gradient required) keep their average."""
        moving = {n: p for n, p in self.parameters.items() if p.requires_grad}
        shadows = [self.shadow[name] for name in moving]
        values = [p.to(s.dtype) for p, s in zip(moving.values(), shadows, strict=True)]
        if shadows:
            torch._foreach_lerp_(shadows, values, 1 - self.decay(step))

    @torch.no_grad()
    def copy_to_parameters(self) -> None:
        """Make the averages the parameters' values, for good."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.shadow[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The averages in place of the parameters, which come back unchanged afterwards."""
        raw = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.copy_to_parameters()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(raw[name])
