"""Convolutions over small grids, written out as products of matrices on a CPU.

A convolution is one product of two matrices: the neighbourhoods of all cells, as rows, and the
kernel. So are both of its gradients. On a grid of few cells and many channels a CPU multiplies
these faster than its own convolution runs, in bfloat16 up to three times, above all the gradient of
the kernel; on large grids, copying the neighbourhoods costs more than is gained. Same numbers
either way, but for the order of sums.

Shape legend: B images, I channels in, O channels out, H and W the grid, k side of the kernel, K
cells of it, N cells of all images, B * H * W.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from unified.model.kernels.linear import product_dtype

#: cells of the largest grid that is small
SMALL = 64


class Conv2d(nn.Conv2d):
    """`nn.Conv2d`, faster over small grids on a CPU."""

    def _conv_forward(self, x_BIHW: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self._written_out(x_BIHW):
            return super()._conv_forward(x_BIHW, weight, bias)
        dtype = product_dtype(x_BIHW)
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        out: Tensor = _Products.apply(x_BIHW.to(dtype), weight.to(dtype), bias.to(dtype))
        return out

    def _written_out(self, x_BIHW: Tensor) -> bool:
        side, *others = self.kernel_size
        same = all(n == side for n in others) and side % 2 == 1 and self.padding_mode == "zeros"
        plain = set(self.stride) == set(self.dilation) == {1} == {self.groups}
        kept = same and self.padding == (side // 2,) * 2
        small = x_BIHW.ndim == 4 and 0 < x_BIHW.shape[2] * x_BIHW.shape[3] <= SMALL
        return kept and plain and small and x_BIHW.device.type == "cpu"


def write_out(network: nn.Module) -> None:
    """Let every plain convolution of `network` be one of these."""
    for module in network.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = Conv2d


class _Products(torch.autograd.Function):
    """The convolution of images [B, I, H, W] with kernels [O, I, k, k] at stride 1, with as many
    zeros around as keep the grid."""

    @staticmethod
    def forward(ctx: Any, x_BIHW: Tensor, weight_OIkk: Tensor, bias_O: Tensor) -> Tensor:
        ctx.side = weight_OIkk.shape[-1]
        kernel_OKI = weight_OIkk.permute(0, 2, 3, 1).flatten(1, 2)
        ctx.save_for_backward(x_BIHW, kernel_OKI)
        rows = neighbourhoods(x_BIHW, ctx.side)
        return as_images(torch.addmm(bias_O, rows, kernel_OKI.flatten(1).T), x_BIHW)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BOHW: Tensor) -> tuple[Tensor | None, ...]:
        x_BIHW, kernel_OKI = ctx.saved_tensors
        (out, _, channels), k, needs = kernel_OKI.shape, ctx.side, ctx.needs_input_grad
        grad_NO = grad_BOHW.permute(0, 2, 3, 1).reshape(-1, out)
        grad_x = grad_weight = None
        if needs[0]:  # the convolution with the kernel turned round
            turned_KOI = kernel_OKI.flip(1).transpose(0, 1)
            grad_x = as_images(
                neighbourhoods(grad_BOHW, k) @ turned_KOI.reshape(-1, channels), x_BIHW
            )
        if needs[1]:
            product = grad_NO.T @ neighbourhoods(x_BIHW, k)
            grad_weight = product.unflatten(1, (k, k, channels)).permute(0, 3, 1, 2)
        return grad_x, grad_weight, grad_NO.sum(0) if needs[2] else None


def neighbourhoods(x_BIHW: Tensor, k: int) -> Tensor:
    """The k x k cells around each cell, [N, k * k * I]; 0 outside."""
    images, channels, height, width = x_BIHW.shape
    x_BHWI = F.pad(x_BIHW.permute(0, 2, 3, 1), (0, 0) + 2 * (k // 2, k // 2)).contiguous()
    b, h, w, i = x_BHWI.stride()
    shape, strides = (images, height, width, k, k, channels), (b, h, w, h, w, i)
    return x_BHWI.as_strided(shape, strides).reshape(-1, k * k * channels)


def as_images(rows_NO: Tensor, like_BIHW: Tensor) -> Tensor:
    """Rows, one for each cell, as images [B, O, H, W] of the grid of `like_BIHW`."""
    images, _, height, width = like_BIHW.shape
    return rows_NO.view(images, height, width, -1).permute(0, 3, 1, 2)
