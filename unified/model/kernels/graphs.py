"""CUDA graphs: the many small calls of a function of tensors, recorded once and replayed as one.

A pass of the prior over one block is a few hundred kernels, each of which Python has to launch;
where the block is short, the device waits for Python. All steps of a block launch the same kernels
on the same memory, but for the noisy latents and the timestep. So the first step runs as it is
(whatever is made once, is made there), the second is recorded, and from then on the recording runs.

All recordings are made on one stream beside the main one, one at a time.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor

Run = Callable[..., tuple[Tensor, ...]]

#: held while something is recorded
_recording = Lock()


def replays(device: torch.device) -> bool:
    """Whether work on `device` can be recorded."""
    try:
        return _module(device).CUDAGraph is not None
    except AttributeError:
        return False


def _module(device: torch.device) -> Any:
    return torch.get_device_module(device)


@cache
def _aside(device: torch.device) -> Any:
    """A stream for recordings, which must not be made on the one that all else uses. A new one
    each time would come with workspaces of its own."""
    with torch.accelerator.device_index(device.index):
        return _module(device).Stream()


class Recording:
    """A function that does the same with all tensors [...] of the same shapes: it reads no value
    back from the device, and what it reads beside its arguments stays where it is.

    It is told anew in every call and not kept, so that a recording is never part of a cycle: the
    garbage collector could otherwise delete it in the middle of making another, which no device
    takes.
    """

    def __init__(self) -> None:
        self.warm = False
        self.graph: Any = None

    def __call__(self, run: Run, *given: Tensor) -> tuple[Tensor, ...]:
        """What ``run(*given)`` gives."""
        if not self.warm:
            self.warm = True
            return run(*given)
        if self.graph is None:
            self._record(run, given)
        for mine, now in zip(self.given, given, strict=True):
            mine.copy_(now)
        self.graph.replay()
        return tuple(made.clone() for made in self.made)

    def _record(self, run: Run, given: tuple[Tensor, ...]) -> None:
        """Record one run, which does not happen yet."""
        device = given[0].device
        module, aside = _module(device), _aside(device)
        self.given = [x.clone() for x in given]
        graph = module.CUDAGraph()
        with _recording, torch.accelerator.device_index(device.index), _no_collection():
            here = module.current_stream()
            aside.wait_stream(here)
            with module.stream(aside):
                # other threads may use the device meanwhile
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    self.made = run(*self.given)
                finally:
                    graph.capture_end()
            here.wait_stream(aside)
        self.graph = graph


@contextmanager
def _no_collection() -> Iterator[None]:
    """Nothing is deleted but what is let go of."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
