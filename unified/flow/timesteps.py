"""Timesteps: how training draws them, and how the network sees them."""

from __future__ import annotations

import torch
from torch import Tensor

from unified.config.schema import TimestepConfig

#: the network's timesteps run from 0 (clean) to 1000 (noise); everywhere else they are in [0, 1]
TIMESTEP_SCALE = 1000


def draw_timesteps(count: int, config: TimestepConfig, generator: torch.Generator) -> Tensor:
    """Timesteps [count] in [0, 1]: ``sigmoid(loc + scale n)``, n normal (16.5-16.8), or uniform."""
    if config.distribution == "uniform":
        return torch.rand(count, generator=generator)
    loc = config.loc or 0.0
    return torch.sigmoid(loc + config.scale * torch.randn(count, generator=generator))


def round_timesteps(t: Tensor, rounding: str) -> Tensor:
    """`t` on the grid that the network is to see, in its units of 1/1000."""
    if rounding == "integer":
        return (t * TIMESTEP_SCALE).round() / TIMESTEP_SCALE
    if rounding == "bfloat16":
        return (t * TIMESTEP_SCALE).to(torch.bfloat16).to(t.dtype) / TIMESTEP_SCALE
    return t
