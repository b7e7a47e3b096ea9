"""Convolutions over small grids: written out as products, they are the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from unified.modalities.image import convolution
from unified.modalities.image.convolution import Conv2d, write_out

SETTINGS: list[dict[str, Any]] = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 5, "padding": 2},
    {"kernel_size": 1},
    {"kernel_size": 3, "padding": 1, "bias": False},
]
#: what is left to PyTorch
OTHERS: list[dict[str, Any]] = [
    {"kernel_size": 3},
    {"kernel_size": 3, "padding": 1, "stride": 2},
    {"kernel_size": 3, "padding": 2, "dilation": 2},
    {"kernel_size": 3, "padding": 1, "groups": 2},
    {"kernel_size": (3, 1), "padding": (1, 0)},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": "same"},
]


def results(layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The output, and gradients of what goes in and of the weights."""
    x = x.clone().requires_grad_()
    y = layer(x)
    weighted = (y.double() * torch.linspace(-1, 1, y.numel()).double().view(y.shape)).sum()
    return [y, *torch.autograd.grad(weighted, (x, *layer.parameters()))]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The convolutions that were written out."""
    found: list[Any] = []
    apply = convolution._Products.apply
    monkeypatch.setattr(convolution._Products, "apply", lambda *x: found.append(x) or apply(*x))
    return found


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("grid", [(4, 4), (3, 7), (1, 1)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_it_is_the_convolution(settings, grid, layout, calls):
    plain = nn.Conv2d(6, 8, **settings).double()
    x = torch.randn(2, 6, *grid, dtype=torch.float64).contiguous(memory_format=layout)
    expected = results(plain, x)
    write_out(nn.Sequential(plain))
    for one, other in zip(results(plain, x), expected, strict=True):
        torch.testing.assert_close(one, other)
    assert len(calls) == 1


@pytest.mark.parametrize("settings", OTHERS)
def test_what_it_does_not_know_is_left_to_pytorch(settings, calls):
    torch.manual_seed(0)
    layer, plain = Conv2d(6, 8, **settings), nn.Conv2d(6, 8, **settings)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 6, 4, 4)
    assert torch.equal(layer(x), plain(x))
    assert not calls


def test_large_grids_are_left_to_pytorch(calls):
    Conv2d(2, 3, 3, padding=1)(torch.randn(1, 2, 9, 8))
    assert not calls


def test_under_autocast_it_is_in_its_precision(calls):
    layer, x = Conv2d(16, 8, 3, padding=1), torch.randn(2, 16, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(layer, x)
    assert found[0].dtype == torch.bfloat16
    assert found[1].dtype == found[2].dtype == torch.float32
    for one, other in zip(found, results(layer, x), strict=True):
        assert (one - other).norm() < 0.02 * other.norm()


def test_what_takes_no_gradient_gets_none():
    layer = Conv2d(4, 4, 3, padding=1).requires_grad_(False)
    x = torch.randn(1, 4, 4, 4, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is None
