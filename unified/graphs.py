"""CUDA graphs: the many small calls of a function of tensors, recorded once and replayed as one.

A pass of the prior over one block is a few hundred kernels, each of which Python has to launch;
where the block is short, the device waits for Python. All steps of a block launch the same kernels
on the same memory, but for the noisy latents and the timestep. So the first step runs as it is
(whatever is made once, is made there), the second is recorded, and from then on the recording runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Run = Callable[..., tuple[Tensor, ...]]


def replays(device: torch.device) -> bool:
    """Whether work on `device` can be recorded."""
    try:
        return _module(device).CUDAGraph is not None
    except AttributeError:
        return False


def _module(device: torch.device) -> Any:
    return torch.get_device_module(device)


class Replayed:
    """`run`, which must do the same with all tensors [...] of the same shapes: nothing in it may
    read a value back from the device, and what it reads beside its arguments must stay where it
    is."""

    def __init__(self, run: Run):
        self.run, self.warm = run, False
        self.graph: Any = None

    def __call__(self, *given: Tensor) -> tuple[Tensor, ...]:
        if not self.warm:
            self.warm = True
            return self.run(*given)
        if self.graph is None:
            self._record(given)
        for mine, now in zip(self.given, given, strict=True):
            mine.copy_(now)
        self.graph.replay()
        return tuple(made.clone() for made in self.made)

    def _record(self, given: tuple[Tensor, ...]) -> None:
        """Record one run, which does not happen yet; never on the stream that all else uses."""
        device = given[0].device
        module = _module(device)
        self.given = [x.clone() for x in given]
        self.graph = module.CUDAGraph()
        with torch.accelerator.device_index(device.index):
            here, aside = module.current_stream(), module.Stream()
            aside.wait_stream(here)
            with module.stream(aside):
                # other threads may use the device meanwhile
                self.graph.capture_begin(capture_error_mode="thread_local")
                try:
                    self.made = self.run(*self.given)
                finally:
                    self.graph.capture_end()
            here.wait_stream(aside)
