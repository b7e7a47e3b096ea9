"""What validation measures: the losses of held-out examples, an autoencoder's own measures, and
what functions of one's own give (``training.metrics``)."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from unified.data.streams import Prepared
from unified.latents.modality import Modality, decode, encode, modes, unencoded
from unified.latents.tensors import moved
from unified.pipeline import UnifiedPipeline
from unified.training.objectives.objective import Objective
from unified.training.parallel import over_ranks
from unified.training.work import add, total

if TYPE_CHECKING:
    from accelerate import Accelerator

#: stream -> batches of held-out examples
HeldOut = Mapping[str, Sequence[Sequence[Prepared]]]


class Validation:
    """The losses of an objective over held-out examples. They are collated once, and the draws are
    those of steps 0, 1, ...: the same ones at every evaluation. Each batch is shared among the
    processes."""

    def __init__(self, objective: Objective, streams: HeldOut, accelerator: Accelerator):
        self.objective, self.accelerator = objective, accelerator
        self.parts = {
            name: [self._part(batch, index) for index, batch in enumerate(batches)]
            for name, batches in streams.items()
        }

    def _part(self, batch: Sequence[Prepared], index: int) -> tuple[bool, Any]:
        """This process's share, collated, and whether it counts: without one of its own, a process
        keeps the others company."""
        mine = share(batch, self.accelerator)
        return bool(mine), self.objective.collate(mine or batch[:1], index)

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """``loss`` and the average of each term over the batches of all streams, and of each
        stream (``STREAM/TERM``)."""
        weights = self.objective.weights(0)
        found = {name: self._sums(parts, sorted(weights)) for name, parts in self.parts.items()}
        means = {name: self._means(*both) for name, both in found.items()}
        everything = [
            {term: sum(part[i][term] for part in found.values()) for term in weights}
            for i in (0, 1)
        ]
        means[""] = self._means(*everything)
        overall = means.pop("")
        each = {f"{name}/{term}": v for name, mean in means.items() for term, v in mean.items()}
        return {"loss": total(overall, weights), **overall, **each}

    @staticmethod
    def _means(sums: Mapping[str, float], counts: Mapping[str, float]) -> dict[str, float]:
        return {term: sums[term] / n for term, n in counts.items() if n}

    def _sums(
        self, parts: Sequence[tuple[bool, Any]], terms: Sequence[str]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Sums and counts of each term, over all processes."""
        sums: list[dict[str, float]] = []
        counts = []
        for counted, batch in parts:
            losses = self.objective(moved(batch, self.accelerator.device))
            if counted:
                sums.append({term: float(loss) for term, loss in losses.items()})
                counts.append(batch.counts)
        both = [list(add(x, terms).values()) for x in (sums, counts)]
        first, second = (over_ranks(values, self.accelerator) for values in both)
        return dict(zip(terms, first, strict=True)), dict(zip(terms, second, strict=True))


def share(batch: Sequence[Prepared], accelerator: Accelerator) -> list[Prepared]:
    """This process's part of a batch."""
    return [e for e in batch if e.slot % accelerator.num_processes == accelerator.process_index]


@torch.no_grad()
def measured(modality: Modality, streams: HeldOut, accelerator: Accelerator) -> dict[str, float]:
    """The modality's `measures`, averaged over the items of all batches; each item is decoded from
    the mean of its posterior. The batches are shared among the processes."""
    if not modality.measures:
        return {}
    sums, count = dict.fromkeys(modality.measures, 0.0), 0.0
    for batch in (share(batch, accelerator) for batches in streams.values() for batch in batches):
        observations = unencoded(o for example in batch for o in example.observations.values())
        back = decode(modality, modes(encode(modality, observations)))
        for observation, decoded in zip(observations, back, strict=True):
            found = modality.measure(observation, decoded)
            sums = {name: total + found[name] for name, total in sums.items()}
            count += 1
    *totals, items = over_ranks([*sums.values(), count], accelerator)
    return {name: total / items for name, total in zip(sums, totals, strict=True)}


def own(
    metrics: Mapping[str, Callable[..., Any]],
    pipeline: UnifiedPipeline,
    step: int,
    taken: Container[str] = (),
) -> dict[str, float]:
    """What the functions in `metrics` give, which has them by their paths; each is called with the
    pipeline and the number of finished steps. ValueError for what is no mapping of names to
    numbers, and for a name that is taken."""
    found: dict[str, float] = {}
    for path, metric in metrics.items():
        values = metric(pipeline, step)
        if not isinstance(values, Mapping):
            raise ValueError(
                f"the metric {path!r} should return names and numbers, found {values!r}"
            )
        for name, value in values.items():
            if name in taken or name in found:
                raise ValueError(
                    f"the metric {path!r} returns {name}, which validation already has"
                )
            try:
                found[str(name)] = float(value)
            except (TypeError, ValueError):
                raise ValueError(
                    f"the metric {path!r} returns {value!r} as {name}, which should be a number"
                ) from None
    return found
