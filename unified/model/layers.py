"""The parts of the prior: norms, n-d rotary embedding, timestep embedding, modulation.

Shape legend: ``...`` any leading axes, A position axes, H heads, D channels of a head, F rotary
frequencies (half the rotated channels), T distinct timesteps, W width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unified.flow.timesteps import TIMESTEP_SCALE
from unified.model.kernels.linear import Linear

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


def rotary_turns(pos_A: Tensor, rope_dim: int, head_dim: int) -> Tensor:
    """The turns ``exp(i angle)`` [..., 1, D/2, 2], real and imaginary, of positions [..., A].

    Frequency j of the first rope_dim / 2 is ``theta^(-2j / rope_dim)`` and belongs to axis
    ``j mod A``; the rest turn by nothing. Text has the same integer on every axis, so for text this
    is exactly the one-dimensional embedding.
    """
    j = torch.arange(rope_dim // 2, device=pos_A.device)
    pos_F = pos_A[..., j % pos_A.shape[-1]]
    precise = torch.float32 if pos_A.device.type == "mps" else torch.float64
    frequency = ROPE_THETA ** (-2 * j.to(precise) / rope_dim)
    angle_F = (pos_F.to(precise) * frequency)[..., None, :]
    angle_F = F.pad(angle_F, (0, (head_dim - rope_dim) // 2))
    return torch.stack([angle_F.cos(), angle_F.sin()], dim=-1)


def rotate(x_HD: Tensor, turns: Tensor) -> Tensor:
    """Rotary embedding [..., H, D] of float32 or float64 heads: channels (2j, 2j+1) are one complex
    number, and are multiplied by the j-th turn."""
    z_HF2, turns = x_HD.unflatten(-1, (-1, 2)), turns.to(x_HD.dtype)
    if torch.compiler.is_compiling():  # which knows no complex numbers
        (a, b), (cos, sin) = z_HF2.unbind(-1), turns.unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
    turned = torch.view_as_complex(z_HF2) * torch.view_as_complex(turns)
    return torch.view_as_real(turned).flatten(-2)


class TimestepEmbedding(nn.Module):
    """Timesteps [T] in [0, 1] to embeddings [T, W]: a sinusoid of 1000 t, then three layers."""

    def __init__(self, width: int):
        super().__init__()
        self.proj_in = Linear(SINUSOID_WIDTH, width)
        self.proj_hid = Linear(width, width)
        self.proj_out = Linear(width, width)

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
        self.proj_in = Linear(width, width * ratio)
        self.proj_out = Linear(width * ratio, width)

    def forward(self, x_W: Tensor) -> Tensor:
        return self.proj_out(self.proj_in(x_W, "gelu_tanh"))


def look_up(rows_TW: Tensor, t_N: Tensor) -> Tensor:
    """``rows_TW[t_N]`` [N, W] in at least float32. As an embedding, whose gradient adds up fast."""
    return F.embedding(t_N, wide(rows_TW))


def modulate(x_NW: Tensor, shift_scale_TW: Tensor, t_N: Tensor) -> Tensor:
    """``x (1 + scale) + shift``; [T, 2W] is computed per distinct timestep, looked up by `t_N`."""
    shift_TW, scale_TW = wide(shift_scale_TW).chunk(2, dim=-1)
    return torch.addcmul(look_up(shift_TW, t_N), x_NW, look_up(1 + scale_TW, t_N))


def add_gated(x_NW: Tensor, y_NW: Tensor, gate_TW: Tensor, t_N: Tensor) -> Tensor:
    """``x + gate y``; [T, W] is computed per distinct timestep, looked up by `t_N`."""
    return torch.addcmul(x_NW, look_up(gate_TW, t_N), wide(y_NW))
