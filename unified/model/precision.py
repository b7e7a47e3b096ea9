"""Which arithmetic networks use: bfloat16 autocast only where the hardware has it.

A processor without bfloat16 instructions emulates them, up to seventy times slower than float32.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

#: instruction sets that multiply bfloat16 matrices, by the names PyTorch gives them
CPU_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")


def current_device() -> torch.device:
    """This machine's accelerator if it can be used, else the CPU.

    PyTorch names the accelerator that it was built for even where there is none.
    """
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def has_bfloat16(device: torch.device) -> bool:
    """Whether `device` computes in bfloat16 itself."""
    if device.type == "cpu":
        found: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
        return any(found.get(name, False) for name in CPU_BFLOAT16)
    supported = getattr(torch.get_device_module(device), "is_bf16_supported", None)
    return True if supported is None else bool(supported())


def resolve(precision: str, device: torch.device) -> str:
    """``auto`` as ``bf16`` or ``fp32``; what was asked for otherwise."""
    if precision != "auto":
        return precision
    return "bf16" if has_bfloat16(device) else "fp32"


def arithmetic(precision: str | None, device: torch.device) -> AbstractContextManager[object]:
    """Within it, networks on `device` compute in this `precision`, ``fp32``, ``bf16`` or ``auto``;
    without one, as around it."""
    if precision is None:
        return nullcontext()
    lower = resolve(precision, device) == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=lower)
