"""What validation measures of an autoencoder's reconstructions, beside the loss of its stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from unified.data.streams import Prepared
from unified.latents.modality import Modality
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
