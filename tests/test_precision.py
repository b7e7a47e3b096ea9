"""The arithmetic of a run follows what the device can do."""

from __future__ import annotations

import pytest
import torch

from unified.evaluation.pca import PCA
from unified.model.precision import arithmetic, current_device, has_bfloat16, resolve

CPU = torch.device("cpu")


@pytest.mark.parametrize("found", [{"avx512_bf16": True}, {"amx_bf16": True}, {"bf16": True}])
def test_auto_takes_bf16_where_the_processor_has_it(
    monkeypatch: pytest.MonkeyPatch, found: dict[str, bool]
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    assert has_bfloat16(CPU)
    assert resolve("auto", CPU) == "bf16"


def test_auto_takes_fp32_on_a_processor_that_would_emulate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True}, raising=False)
    assert resolve("auto", CPU) == "fp32"


@pytest.mark.parametrize("asked", ["fp32", "bf16"])
def test_what_was_asked_for_is_taken(monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    assert resolve(asked, CPU) == asked


def test_a_build_for_an_accelerator_runs_on_the_cpu_where_there_is_none() -> None:
    assert (current_device() == CPU) == (not torch.accelerator.is_available())


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)]
)
def test_networks_compute_as_in_training(precision: str, dtype: torch.dtype) -> None:
    x = torch.randn(3, 3)
    with arithmetic(precision, CPU):
        assert (x @ x).dtype == dtype


def test_principal_components_are_exact_at_any_precision() -> None:
    items_ND = torch.randn(20, 6)
    plain = PCA.fit(items_ND, 3)
    with arithmetic("bf16", CPU):
        lowered = PCA.fit(items_ND, 3)
        back_ND = lowered.reconstruct(items_ND, 3)
    assert torch.equal(lowered.components_KD, plain.components_KD)
    assert torch.equal(back_ND, plain.reconstruct(items_ND, 3))
