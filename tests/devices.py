"""The devices that tests run on: the CPU, and the accelerator where there is one."""

from __future__ import annotations

import torch

_FOUND = torch.accelerator.current_accelerator(check_available=True)
DEVICES = [torch.device("cpu"), *([] if _FOUND is None else [_FOUND])]
