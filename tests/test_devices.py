"""On the CPU, and on an accelerator where there is one: the results in float32 are those in float64
on the CPU, by every way to get them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import toys
from devices import DEVICES

from unified.generation.blocks import Request
from unified.latents.modality import Latent
from unified.model.attention import WITHOUT
from unified.model.prior import Prior

pytestmark = pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.type)

CPU = torch.device("cpu")
#: heads as small as flex takes them
WIDE = {"head_dim": 16, "rope_dim": 12}
BLOCK = 4


def prior(device: torch.device, dtype: torch.dtype = torch.float32) -> Prior:
    return toys.prior(multi=1, single=2, **WIDE).to(device, dtype)


def losses(model: Prior) -> list[torch.Tensor]:
    """Velocities of a batch of all tasks, and the gradients of their squares, on the CPU."""
    like = next(model.parameters())
    batch = toys.batch(toys.samples(12), toys.layouts(), row_length=150).to(like.device)
    for m, z in batch.latents.items():
        batch.latents[m] = z.to(like.dtype)
    found = model(batch)
    sum(v.square().mean() for v in found.values()).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [x.detach().to(CPU, torch.float64) for x in (*found.values(), *gradients)]


def backends(device: torch.device) -> list[str]:
    """Those that compute in float32 here, and train."""
    return ["sdpa"] if device.type in WITHOUT else ["sdpa", "flex"]


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_velocities_and_gradients(device: torch.device, compiled: bool):
    expected = losses(prior(CPU, torch.float64))
    for backend in backends(device):
        model = prior(device)
        model.attention = backend
        if compiled:
            model.compile()
        for one, other in zip(losses(model), expected, strict=True):
            torch.testing.assert_close(one, other, atol=2e-4, rtol=2e-3)


REQUESTS: dict[str, tuple[str, dict[str, tuple[int, ...]], tuple[int, ...]]] = {
    "continuation": ("C", {"C": (6,)}, (12,)),
    "captioning": ("C", {"P": (2,), "I": (2, 3)}, (8,)),
    "text_to_image": ("I", {"C": (4,)}, (3, 2)),
}


def generated(model: Prior, task: str, **settings: Any) -> torch.Tensor:
    """What three requests give, guided, on the CPU."""
    target, given, grid = REQUESTS[task]
    layouts = toys.layouts(BLOCK)
    made = []
    for seed in range(3):
        latents = toys.latents([toys.Sample(task, given)], layouts, seed)[0]
        made.append(Request({k: Latent(z, given[k]) for k, z in latents.items()}, grid, seed))
    found = toys.generate(model, layouts, task, target, made, toys.settings(6, 2.0, **settings))
    return torch.stack([z.values for z in found]).to(CPU, torch.float64)


@pytest.mark.parametrize("task", REQUESTS)
@pytest.mark.parametrize("backend", ["sdpa", "flex"])
@pytest.mark.parametrize("graphs", [True, False])
def test_what_is_generated(device: torch.device, task: str, backend: str, graphs: bool):
    model = prior(device)
    if device.type not in WITHOUT:
        model.attention = backend
    expected = generated(prior(CPU, torch.float64), task)
    found = generated(model, task, graphs=graphs)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("task", REQUESTS)
@pytest.mark.parametrize("graphs", [True, False])
def test_what_compiled_blocks_generate(device: torch.device, task: str, graphs: bool):
    torch._dynamo.reset()
    model = prior(device)
    model.compile(dynamic=False)
    expected = generated(prior(CPU, torch.float64), task)
    found = generated(model, task, graphs=graphs)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("task", REQUESTS)
def test_bf16_is_near(device: torch.device, task: str):
    model = prior(device)
    near = generated(prior(CPU, torch.float64), task)
    with torch.autocast(device.type, torch.bfloat16):
        found = generated(model, task)
    assert (found - near).norm() < 0.1 * near.norm()
