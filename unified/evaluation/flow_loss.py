"""The flow loss of one task's target, example by example.

Training reports one average over all tasks. Here each example of one task gets a number of its own:
the mean squared error of the predicted velocity over the positions and channels of the task's
target. Chance is keyed by (seed, draw, place in the list) and spent on the target alone, so example
i has the same timesteps and the same noise whatever it is conditioned on: losses under different
conditions are compared in pairs (see pairing.py). Latents are posterior means.

Shape legend: E examples, D draws of timestep and noise, N positions of the target's modality, M the
noisy ones, K latents of all items of a kind, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unified.data.batches import Items
from unified.data.streams import Prepared
from unified.flow.matching import FlowMatching
from unified.latents.modality import grid_of
from unified.latents.tensors import moved
from unified.pipeline import UnifiedPipeline
from unified.randomness import Chance, derive
from unified.sequence.layout import Layout, noisy_kind
from unified.sequence.packing import SEGMENTS, NoisyPlaces, PackedBatch, Packer, Sample
from unified.sequence.task import Task
from unified.sequence.visibility import Visibility, closure

BATCH = 64


@dataclass(frozen=True)
class EncodedItems:
    """The items of one kind: their latents (posterior means) [K, C] in any order, and of each
    example where its item begins in them, and on which grid it lies."""

    latents_KC: Tensor
    starts: Sequence[int]
    grids: Sequence[tuple[int, ...]]

    def of(self, examples: Sequence[int]) -> EncodedItems:
        """What these examples have, in the place of examples 0, 1, ..."""
        starts = [self.starts[i] for i in examples]
        return EncodedItems(self.latents_KC, starts, [self.grids[i] for i in examples])


#: kind -> the items of all examples
Encoded = Mapping[str, EncodedItems]


@dataclass(frozen=True)
class TargetLoss:
    """Loss [E, D] of every example and draw: the model's, and that of predicting velocity zero,
    which is what an untrained prior does."""

    model_ED: Tensor
    zero_ED: Tensor


@torch.no_grad()
def encode(pipeline: UnifiedPipeline, examples: Sequence[Prepared]) -> dict[str, EncodedItems]:
    """The items of every kind of examples of one task. ValueError unless it is just one task's."""
    streams = {e.stream for e in examples}
    if len(streams) != 1:
        raise ValueError(
            "the flow loss of a task needs examples of that task, at least one; found"
            f" {', '.join(sorted(streams)) or 'none'}"
        )
    layout = pipeline.tasks[streams.pop()].layout
    return {s.kind: _encode(pipeline, s.modality, s.kind, examples) for s in layout.filled}


def _encode(
    pipeline: UnifiedPipeline, m: str, kind: str, examples: Sequence[Prepared]
) -> EncodedItems:
    modality = pipeline.modalities[m].eval()
    device = next(modality.parameters()).device
    observed = [e.observations[kind] for e in examples]
    grids = [grid_of(modality, o) for o in observed]
    parts, order = [], []
    for start in range(0, len(observed), BATCH):
        part = observed[start : start + BATCH]
        items, places = Items.of(modality, part, [0] * len(part))
        parts.append(moved(items, device).posteriors(modality).mean_NC)
        order += [start + i for i in places]
    lengths = [math.prod(grids[i]) for i in order]
    begins = dict(zip(order, np.cumsum([0, *lengths]).tolist(), strict=False))
    return EncodedItems(torch.cat(parts), [begins[i] for i in range(len(examples))], grids)


def target_layout(task: Task) -> Layout:
    """The task's layout without any noisy segment but the target's, and without guidance."""
    whole = task.layout
    noisy = noisy_kind(whole, task.generates)
    return whole.only(closure(whole.sees, noisy) | {task.generates})


@torch.no_grad()
def target_loss(
    pipeline: UnifiedPipeline, task: str, encoded: Encoded, draws: int = 2, seed: int = 0
) -> TargetLoss:
    """The loss of every example of `task`, under `draws` timesteps and noises each."""
    pipeline.prior.eval()
    measured = _Measured(pipeline, task, encoded)
    count = len(next(iter(encoded.values())).starts)
    parts = [range(start, min(start + BATCH, count)) for start in range(0, count, BATCH)]
    columns = [
        torch.cat(
            [measured.losses(part, Chance(derive(seed, "flow loss"), step=d)) for part in parts]
        )
        for d in range(draws)
    ]
    both_2ED = torch.stack(columns).permute(2, 1, 0)
    return TargetLoss(both_2ED[0], both_2ED[1])


class _Measured:
    """One task of a pipeline, and examples of it, set up to be measured."""

    def __init__(self, pipeline: UnifiedPipeline, task: str, encoded: Encoded):
        self.prior, self.task, self.encoded = pipeline.prior, task, encoded
        self.layout = target_layout(pipeline.tasks[task])
        self.noisy = self.layout[noisy_kind(self.layout, pipeline.tasks[task].generates)]
        locations = {name: m.timestep_location for name, m in pipeline.modalities.items()}
        layouts = {task: self.layout}
        self.flow = FlowMatching(pipeline.config.flow, layouts, locations, pipeline.path)
        rules = Visibility({task: self.layout.sees})
        like = next(self.prior.parameters())
        self.device, self.dtype = like.device, like.dtype
        self.visibility = rules.to(self.device)
        self.packer = Packer(layouts, rules, self.prior.config.axes)

    def losses(self, examples: Sequence[int], chance: Chance) -> Tensor:
        """Losses [e, 2] of a few examples: the model's and that of velocity zero.

        Whole targets are noisy: a clean left part is an augmentation of training.
        """
        batch, m = self._batch(examples), self.noisy.modality
        draws = self.flow.draw(batch, chance, self.prior.channels)
        noisy, targets = self.flow.corrupt(batch, draws)
        velocity_NC = self.prior(noisy)[m]
        errors_2M = torch.stack(
            [targets[m].errors(v) for v in (velocity_NC, torch.zeros_like(velocity_NC))]
        )
        errors_M2 = (errors_2M / self.noisy.weight).T.cpu()
        example_M = NoisyPlaces(*batch.noisy[m]).item.cpu() // SEGMENTS - examples[0]
        sums = errors_M2.new_zeros(len(examples), 2).index_add(0, example_M, errors_M2)
        return sums / example_M.bincount(minlength=len(examples))[:, None]

    def _batch(self, examples: Sequence[int]) -> PackedBatch:
        kinds = [s.kind for s in self.layout.filled]
        grids = {kind: self.encoded[kind].grids for kind in kinds}
        samples = [Sample(self.task, {k: grids[k][i] for k in kinds}) for i in examples]
        order: dict[str, list[tuple[int, str]]] = {}
        latents: dict[str, list[Tensor]] = {}
        for segment in self.layout.filled:  # kind by kind, of all examples
            items = self.encoded[segment.kind].of(examples)
            latents.setdefault(segment.modality, []).append(self._chosen(items))
            places = [(i, segment.kind) for i in range(len(examples))]
            order.setdefault(segment.modality, []).extend(places)
        packed = self.packer(samples, order, examples).to(self.device).under(self.visibility)
        return packed.with_latents({m: torch.cat(parts) for m, parts in latents.items()})

    def _chosen(self, items: EncodedItems) -> Tensor:
        """The latents of some examples' items, one item after the other."""
        lengths = [math.prod(grid) for grid in items.grids]
        shift = np.array(items.starts) - np.cumsum(lengths) + lengths
        index = torch.from_numpy(np.arange(sum(lengths)) + np.repeat(shift, lengths))
        chosen = items.latents_KC.index_select(0, index.to(items.latents_KC.device))
        return chosen.to(self.device, self.dtype)
