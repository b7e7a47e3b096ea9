"""The parts of the prior: norms, n-d rotary embedding, timestep embedding, modulation.

Shape legend: ``...`` any leading axes, A position axes, H heads, D channels of a head, F rotary
frequencies (half the rotated channels), T distinct timesteps, W width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unified.flow import TIMESTEP_SCALE

SINUSOID_WIDTH = 256
ROPE_THETA = 10_000.0


def wide(x: Tensor) -> Tensor:
    """`x` in at least float32; a float64 stays a float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def layer_norm(x: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last axis without parameters, in at least float32."""
    x = wide(x)
    return F.layer_norm(x, x.shape[-1:], eps=eps)


class LayerNorm(nn.LayerNorm):
    """LayerNorm with gain and bias, in at least float32."""

    def forward(self, x: Tensor) -> Tensor:
        x = wide(x)
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


def rotary_angles(pos_A: Tensor, rope_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin [..., 1, F] of positions [..., A]; F = rope_dim / 2.

    Frequency j is ``theta^(-2j / rope_dim)`` and belongs to axis ``j mod A``. Text has the same
    integer on every axis, so for text this is exactly the one-dimensional embedding.
    """
    frequencies = rope_dim // 2
    j = torch.arange(frequencies, device=pos_A.device)
    pos_F = pos_A[..., j % pos_A.shape[-1]]
    precise = torch.float32 if pos_A.device.type == "mps" else torch.float64
    frequency = ROPE_THETA ** (-2 * j.to(precise) / rope_dim)
    angle_F = (pos_F.to(precise) * frequency)[..., None, :]
    return angle_F.cos(), angle_F.sin()


def rotate(x_HD: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of the leading channels of each head, in interleaved pairs (2j, 2j+1).

    The other channels pass through. `x_HD` is [..., H, D], the angles [..., 1, F] with 2F <= D.
    """
    cos, sin = (a.to(x_HD.dtype) for a in angles)
    turned, rest = x_HD.split([2 * cos.shape[-1], x_HD.shape[-1] - 2 * cos.shape[-1]], dim=-1)
    even, odd = turned.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
    return torch.cat([turned, rest], dim=-1)


class TimestepEmbedding(nn.Module):
    """Timesteps [T] in [0, 1] to embeddings [T, W]: a sinusoid of 1000 t, then three layers."""

    def __init__(self, width: int):
        super().__init__()
        self.proj_in = nn.Linear(SINUSOID_WIDTH, width)
        self.proj_hid = nn.Linear(width, width)
        self.proj_out = nn.Linear(width, width)

    def forward(self, t_T: Tensor) -> Tensor:
        half = SINUSOID_WIDTH // 2
        j = torch.arange(half, device=t_T.device, dtype=t_T.dtype)
        angle = TIMESTEP_SCALE * t_T[:, None] * torch.exp(-math.log(10_000) * j / half)
        sinusoid = torch.cat([angle.sin(), angle.cos()], dim=-1).to(self.proj_in.weight.dtype)
        return self.proj_out(F.silu(self.proj_hid(F.silu(self.proj_in(sinusoid)))))


class FeedForward(nn.Module):
    """Linear, GELU (tanh form), Linear."""

    def __init__(self, width: int, ratio: int):
        super().__init__()
        self.proj_in = nn.Linear(width, width * ratio)
        self.proj_out = nn.Linear(width * ratio, width)

    def forward(self, x_W: Tensor) -> Tensor:
        return self.proj_out(F.gelu(self.proj_in(x_W), approximate="tanh"))


def look_up(rows_TW: Tensor, t_N: Tensor) -> Tensor:
    """``rows_TW[t_N]`` [N, W] in at least float32. As an embedding, whose gradient adds up fast."""
    return F.embedding(t_N, wide(rows_TW))


def modulate(x_NW: Tensor, shift_scale_TW: Tensor, t_N: Tensor) -> Tensor:
    """``x (1 + scale) + shift``; [T, 2W] is computed per distinct timestep, looked up by `t_N`."""
    shift_NW, scale_NW = look_up(shift_scale_TW, t_N).chunk(2, dim=-1)
    return torch.addcmul(shift_NW, x_NW, 1 + scale_NW)
