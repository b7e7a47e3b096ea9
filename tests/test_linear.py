"""Linear layers that read packed weights while something is generated."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from unified.model.kernels import linear
from unified.model.kernels.linear import ACTIVATIONS, Linear, generating

packs = pytest.mark.skipif(
    not linear._packs(torch.float32, "cpu"), reason="this PyTorch has no oneDNN"
)


def layer(bias: bool = True) -> Linear:
    torch.manual_seed(0)
    return Linear(24, 40, bias=bias)


def outputs(module: nn.Module, *inputs, **options):
    for x in inputs:
        with generating(), torch.no_grad():
            y = module(x, **options)
        yield y


def rows(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 24, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_packed_weights_change_nothing(activation, bias):
    plain = layer(bias)
    after = ACTIVATIONS[activation][0]
    for count in (1, 5, 33):
        expected = after(nn.functional.linear(rows(count), plain.weight, plain.bias))
        (found,) = outputs(plain, rows(count), activation=activation)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@packs
def test_under_autocast_the_product_is_in_its_precision():
    if not linear._packs(torch.bfloat16, "cpu"):
        pytest.skip("oneDNN has no bfloat16 here")
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = outputs(made := layer(), rows(5))
        expected = made(rows(5))
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)


@packs
def test_weights_are_packed_once_and_again_when_they_change():
    made = layer()
    first, _ = outputs(made, rows(3), rows(4))
    kept = linear._kept[made]
    assert list(outputs(made, rows(3)))
    assert linear._kept[made] is kept
    with torch.no_grad():
        made.weight.mul_(2)
        made.bias.mul_(2)
    (second,) = outputs(made, rows(3))
    torch.testing.assert_close(second, 2 * first)
    made.weight.data = made.weight.data / 2
    made.bias.data = made.bias.data / 2
    torch.testing.assert_close(next(outputs(made, rows(3))), first)


@packs
def test_what_is_trained_keeps_no_copy():
    made = layer()
    next(outputs(made, rows(3)))
    assert made in linear._kept
    made(rows(3)).sum().backward()
    assert made.weight.grad is not None
    assert made not in linear._kept


@packs
def test_a_copy_of_a_layer_has_weights_of_its_own():
    made = layer()
    (first,) = outputs(made, rows(3))
    twin = copy.deepcopy(made)
    with torch.no_grad():
        twin.weight.zero_()
        twin.bias.zero_()
    assert not next(outputs(twin, rows(3))).any()
    torch.testing.assert_close(next(outputs(made, rows(3))), first)


def test_float64_and_no_rows_take_the_ordinary_path():
    made = layer().double()
    (found,) = outputs(made, rows(3).double())
    assert found.dtype == torch.float64
    assert made not in linear._kept
    assert next(outputs(layer(), rows(0))).shape == (0, 40)
