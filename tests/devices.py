"""The devices that tests run on: the CPU, and the accelerator where there is one."""

from __future__ import annotations

import pytest
import torch

_FOUND = torch.accelerator.current_accelerator(check_available=True)
DEVICES = [torch.device("cpu"), *([] if _FOUND is None else [_FOUND])]


def need(processes: int) -> None:
    """Skip a test whose processes would share an accelerator: they find any, and take one each."""
    found = torch.accelerator.device_count()
    if 0 < found < processes:
        pytest.skip(f"{processes} processes need as many accelerators, or none; here: {found}")
