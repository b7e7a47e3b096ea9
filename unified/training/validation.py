"""The losses of held-out examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from unified.training.objectives.objective import Objective
from unified.training.parallel import over_ranks
from unified.training.work import add, averages, share, total

if TYPE_CHECKING:
    from accelerate import Accelerator


@torch.no_grad()
def evaluate(
    objective: Objective,
    streams: Mapping[str, Sequence[Sequence[Any]]],
    accelerator: Accelerator,
) -> dict[str, float]:
    """``loss`` and the average of each term over the batches of all `streams`, and of each stream
    (``STREAM/TERM``); every batch is shared among the processes.

    The draws are those of steps 0, 1, ...: the same ones at every evaluation.
    """
    weights = objective.weights(0)
    terms = sorted(weights)
    found = {
        name: [over_ranks(part, accelerator) for part in _sums(objective, batches, accelerator)]
        for name, batches in streams.items()
    }
    everything = [
        [sum(column) for column in zip(*part, strict=True)]
        for part in zip(*found.values(), strict=True)
    ]
    means = {
        name: averages(sums, dict(zip(terms, counts, strict=True)))
        for name, (sums, counts) in {**found, "": everything}.items()
    }
    overall = means.pop("")
    each = {f"{name}/{term}": v for name, mean in means.items() for term, v in mean.items()}
    return {"loss": total(overall, weights), **overall, **each}


def _sums(
    objective: Objective, batches: Sequence[Sequence[Any]], accelerator: Accelerator
) -> tuple[list[float], list[float]]:
    """This process's sums and counts of each term, over its share of `batches`."""
    terms = sorted(objective.weights(0))
    sums, counts = [0.0] * len(terms), [0.0] * len(terms)
    for index, batch in enumerate(batches):
        mine = share(batch, accelerator.process_index, accelerator.num_processes)
        plan = objective.plan(mine or batch[:1], index)
        losses = {term: float(loss) for term, loss in objective(plan).items()}
        if not mine:  # without a part of its own, a process keeps the others company
            continue
        sums = [a + b for a, b in zip(sums, add([losses], terms), strict=True)]
        counts = [a + b for a, b in zip(counts, add([plan.counts], terms), strict=True)]
    return sums, counts
