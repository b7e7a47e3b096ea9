"""The work of a step before its first forward, and what comes of it.

The device runs ahead of the host: no step waits for its own losses. They are copied to the host
behind the step's kernels, and looked at when the next step is on its way, or before anything is
saved, validated or reported.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from unified.data.batches import Batch
from unified.training.parallel import summed

if TYPE_CHECKING:
    from accelerate import Accelerator


class Batches(Protocol):
    """The data: this process's microbatches of each step, in order. `bad` and `truncated` count
    the examples that it met and that were so."""

    bad: int
    truncated: int

    def batch(self, step: int) -> Sequence[Batch]: ...

    def close(self) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Tally:
    """Numbers of a step that processes add up: positions that hold a latent and all of them,
    examples that were bad and that were truncated, and how many processes were asked to stop."""

    used: float
    laid: float
    bad: float
    truncated: float
    stop: float = 0.0

    @property
    def numbers(self) -> list[float]:
        return [self.used, self.laid, self.bad, self.truncated, self.stop]


@dataclass(frozen=True)
class Work:
    """What a step needs before its first forward: this process's microbatches, the positions of
    each loss term in them, and the state of the data after them. Made ahead of time, in a
    thread."""

    parts: list[Any]
    counts: dict[str, float]
    tally: Tally
    data: dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What came of a step: sums of the terms, their counts, the tally and the gradient's norm, over
    all processes and microbatches, on their way to the host."""

    step: int
    terms: tuple[str, ...]
    weights: Mapping[str, float]
    rates: Mapping[str, float]
    numbers: Tensor
    arrived: Any

    @classmethod
    def of(
        cls,
        step: int,
        weights: Mapping[str, float],
        rates: Mapping[str, float],
        numbers: Tensor,
    ) -> Outcome:
        """Begin to copy `numbers` to the host, behind what the device is about to do."""
        if not pins(numbers.device):  # asked for when they are read, one step later
            return cls(step, tuple(sorted(weights)), weights, rates, numbers, None)
        host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        host.copy_(numbers, non_blocking=True)
        arrived = torch.Event(device=numbers.device)
        arrived.record()
        return cls(step, tuple(sorted(weights)), weights, rates, host, arrived)

    def read(self) -> tuple[dict[str, float], Tally, float]:
        """The average of each term that has positions, the tally, and the gradient's norm; waits
        until they are here."""
        if self.arrived is not None:
            self.arrived.synchronize()
        found = self.numbers.tolist()
        k = len(self.terms)
        sums, counts, (*tally, norm) = found[:k], found[k : 2 * k], found[2 * k :]
        parts = zip(self.terms, sums, counts, strict=True)
        return {term: s / n for term, s, n in parts if n}, Tally(*tally), norm


def pins(device: torch.device) -> bool:
    """Whether memory of the host is pinned for copies to and from `device`."""
    return device.type not in ("cpu", "mps")


def over_all(work: Work, terms: Sequence[str], stop: bool, accelerator: Accelerator) -> Tensor:
    """Counts of the terms and the tally [K + 5], over all processes, on the device."""
    numbers = [work.counts[term] for term in terms] + work.tally.numbers
    numbers[-1] = float(stop)
    return summed(on_device(numbers, accelerator.device), accelerator)


def on_device(numbers: Sequence[float], device: torch.device) -> Tensor:
    """Plain numbers on the device, in float64 where it has that; nothing waits for them."""
    tensor = torch.tensor(numbers, dtype=torch.float32 if device.type == "mps" else torch.float64)
    return tensor.pin_memory().to(device, non_blocking=True) if pins(device) else tensor.to(device)


def stacked(losses: Mapping[str, Tensor], terms: Sequence[str], like: Tensor) -> Tensor:
    """The sums [K] of these terms, 0 for one that is not there, in the dtype of `like`."""
    nothing = like.new_zeros(())
    return torch.stack([losses.get(term, nothing).to(like.dtype) for term in terms])


def add(counts: Iterable[Mapping[str, float]], terms: Sequence[str]) -> dict[str, float]:
    """Counts by term, added up; ValueError for a term that has no weight."""
    total = dict.fromkeys(terms, 0.0)
    for part in counts:
        for term, value in part.items():
            if term not in total:
                raise ValueError(f"loss term {term} has no weight; there are {sorted(terms)}")
            total[term] += float(value)
    return total


def total(losses: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """The loss that the optimizer sees, of averages by term."""
    return sum(weights[term] * value for term, value in losses.items())
