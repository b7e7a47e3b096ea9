"""What validation measures beside the loss: of an autoencoder's reconstructions, and by functions
of one's own (``training.metrics``)."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from unified.config.registry import trusted
from unified.data.streams import Prepared
from unified.latents.modality import Modality
from unified.pipeline import UnifiedPipeline
from unified.training.parallel import over_ranks
from unified.training.work import share

if TYPE_CHECKING:
    from accelerate import Accelerator


@torch.no_grad()
def measured(
    modality: Modality,
    streams: Mapping[str, Sequence[Sequence[Prepared]]],
    accelerator: Accelerator,
) -> dict[str, float]:
    """The modality's `measures`, averaged over the items of all batches; each item is decoded from
    the mean of its posterior. The batches are shared among the processes."""
    if not modality.measures:
        return {}
    sums, count = dict.fromkeys(modality.measures, 0.0), 0.0
    for batch in (batch for batches in streams.values() for batch in batches):
        mine = share(batch, accelerator.process_index, accelerator.num_processes)
        if not mine:
            continue
        observations = [o for example in mine for o in example.observations.values()]
        back = modality.decode([p.mode for p in modality.encode(observations)])
        for observation, decoded in zip(observations, back, strict=True):
            found = modality.measure(observation, decoded)
            sums = {name: total + found[name] for name, total in sums.items()}
            count += 1
    *totals, items = over_ranks([*sums.values(), count], accelerator)
    return {name: total / items for name, total in zip(sums, totals, strict=True)}


def own(
    paths: Sequence[str],
    pipeline: UnifiedPipeline,
    step: int,
    taken: Container[str] = (),
    trust_remote_code: bool = False,
) -> dict[str, float]:
    """What the functions at `paths` give, each called with the pipeline and the number of finished
    steps. ValueError for what is no mapping of names to numbers, and for a name that is taken."""
    found: dict[str, float] = {}
    for path in paths:
        values = trusted("metric", path, trust_remote_code)(pipeline, step)
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
