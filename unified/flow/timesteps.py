"""Timesteps as the network sees them."""

from __future__ import annotations

import torch
from torch import Tensor

#: the network's timesteps run from 0 (clean) to 1000 (noise); everywhere else they are in [0, 1]
TIMESTEP_SCALE = 1000


def round_timesteps(t: Tensor, rounding: str) -> Tensor:
    """`t` on the grid that the network is to see, in its units of 1/1000."""
    if rounding == "integer":
        return (t * TIMESTEP_SCALE).round() / TIMESTEP_SCALE
    if rounding == "bfloat16":
        return (t * TIMESTEP_SCALE).to(torch.bfloat16).to(t.dtype) / TIMESTEP_SCALE
    return t
