"""The work of a step before its first forward, and how sums over it become averages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from unified.training.objectives.objective import Plan
from unified.training.parallel import over_ranks

if TYPE_CHECKING:
    from accelerate import Accelerator


class Slotted(Protocol):
    """An example that knows its place in the global batch."""

    @property
    def slot(self) -> int: ...

    @property
    def truncated(self) -> bool: ...


class Batches(Protocol):
    """The data: of the global batch of each step, in order, this process's part at least. `bad`
    counts the bad examples it met."""

    bad: int

    def batch(self, step: int) -> Sequence[Slotted]: ...

    def close(self) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Work:
    """What a step needs before its first forward: this rank's microbatches, what it counted in them
    (`Tally`), and the state of the data after them. Made ahead of time, in a thread."""

    plans: list[Plan]
    tally: Tally
    data: dict[str, Any]


@dataclass(frozen=True)
class Tally:
    """Numbers of a step that processes add up before it runs: positions by loss term, positions
    that hold a latent and all of them, examples that were bad and that were truncated, and how many
    processes were asked to stop."""

    counts: list[float]
    used: float
    laid: float
    bad: float
    truncated: float
    stop: float = 0.0

    def over(self, accelerator: Accelerator) -> Tally:
        """Added up over the processes."""
        rest = [self.used, self.laid, self.bad, self.truncated, self.stop]
        summed = over_ranks([*self.counts, *rest], accelerator)
        return Tally(summed[: len(self.counts)], *summed[len(self.counts) :])


def share(examples: Sequence[Any], part: int, parts: int) -> list[Any]:
    """The examples of microbatch `part` of `parts`."""
    return [example for example in examples if example.slot % parts == part]


def add(counts: Iterable[Mapping[str, float]], terms: Sequence[str]) -> list[float]:
    """Counts (or sums) by term, added up; ValueError for a term that has no weight."""
    total = dict.fromkeys(terms, 0.0)
    for part in counts:
        for term, value in part.items():
            if term not in total:
                raise ValueError(f"loss term {term} has no weight; there are {sorted(terms)}")
            total[term] += float(value)
    return [total[term] for term in terms]


def averages(sums: Sequence[float], counts: Mapping[str, float]) -> dict[str, float]:
    """Term -> sum / count, for the terms that have positions."""
    return {k: s / n for (k, n), s in zip(counts.items(), sums, strict=True) if n}


def total(losses: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """The loss that the optimizer sees, of averages by term."""
    return sum(weights[term] * value for term, value in losses.items())
