"""The flow loss of one task's target, example by example.

Training reports one average over all tasks. Here each example of one task gets a number of its own:
the mean squared error of the predicted velocity over the positions and channels of the task's
target. Chance is keyed by (seed, draw, place in the list) and spent on the target alone, so example
i has the same timesteps and the same noise whatever it is conditioned on: losses under different
conditions are compared in pairs (see pairing.py). Latents are posterior means.

Shape legend: E examples, D draws of timestep and noise, N positions of the target's modality.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unified.data.streams import Prepared
from unified.evaluation.reconstruction import posteriors
from unified.flow.matching import FlowMatching, flow_errors
from unified.latents.modality import Latent
from unified.pipeline import UnifiedPipeline
from unified.randomness import generator
from unified.sequence.layout import Layout, noisy_kind
from unified.sequence.packing import PackedBatch, Sample, pack
from unified.sequence.task import Task
from unified.sequence.visibility import Visibility, closure

BATCH = 64

#: kind -> latent of one example
Encoded = Mapping[str, Latent]


@dataclass(frozen=True)
class TargetLoss:
    """Loss [E, D] of every example and draw: the model's, and that of predicting velocity zero,
    which is what an untrained prior does."""

    model_ED: Tensor
    zero_ED: Tensor


def encode(pipeline: UnifiedPipeline, examples: Sequence[Prepared]) -> list[dict[str, Latent]]:
    """Kind -> posterior mean, for every example."""
    encoded: list[dict[str, Latent]] = [{} for _ in examples]
    for name, modality in pipeline.modalities.items():
        found = [
            (i, kind, observation)
            for i, example in enumerate(examples)
            for kind, observation in example.observations.items()
            if pipeline.tasks[example.stream].layout[kind].modality == name
        ]
        latents = posteriors(modality, [observation for _, _, observation in found])
        for (i, kind, _), posterior in zip(found, latents, strict=True):
            encoded[i][kind] = posterior.mode
    return encoded


def target_layout(task: Task) -> Layout:
    """The task's layout without any noisy segment but the target's, and without guidance."""
    whole = task.layout
    noisy = noisy_kind(whole, task.generates)
    return whole.only(closure(whole.sees, noisy) | {task.generates})


@torch.no_grad()
def target_loss(
    pipeline: UnifiedPipeline, task: str, encoded: Sequence[Encoded], draws: int = 2, seed: int = 0
) -> TargetLoss:
    """The loss of every example of `task`, under `draws` timesteps and noises each."""
    if not encoded:
        raise ValueError(f"the flow loss of {task} needs at least one example, found none")
    pipeline.prior.eval()
    measured = _Measured(pipeline, task)
    columns = []
    for d in range(draws):
        parts = [
            measured.losses(
                encoded[start : start + BATCH], [(seed, d, start + i) for i in range(BATCH)]
            )
            for start in range(0, len(encoded), BATCH)
        ]
        columns.append(torch.cat(parts))
    both_2ED = torch.stack(columns).permute(2, 1, 0)
    return TargetLoss(both_2ED[0], both_2ED[1])


class _Measured:
    """One task of a pipeline, set up to be measured."""

    def __init__(self, pipeline: UnifiedPipeline, task: str):
        self.prior, self.task = pipeline.prior, task
        self.layout = target_layout(pipeline.tasks[task])
        self.noisy = self.layout[noisy_kind(self.layout, pipeline.tasks[task].generates)]
        # whole targets are noisy: a clean left part is an augmentation of training
        config = pipeline.config.flow.model_copy(update={"clean_prefix_rate": 0.0})
        locations = {name: m.timestep_location for name, m in pipeline.modalities.items()}
        self.flow = FlowMatching(config, {task: self.layout}, locations)
        self.visibility = Visibility({task: self.layout.sees})

    def losses(self, encoded: Sequence[Encoded], keys: Sequence[tuple[int, int, int]]) -> Tensor:
        """Losses [e, 2] of a few examples: the model's and that of velocity zero."""
        batch = self._batch(encoded)
        chance = [generator(*key, "flow") for key in keys[: len(encoded)]]
        tasks = [self.task] * len(encoded)
        draws = self.flow.draw(batch, tasks, self.prior.channels, chance)
        device = next(self.prior.parameters()).device
        draws = {m: d.to(device) for m, d in draws.items()}
        noisy, targets = self.flow.corrupt(batch, draws)
        m = self.noisy.modality
        velocity_NC = self.prior(noisy)[m]
        errors_N2 = torch.stack(
            [
                flow_errors(v, targets[m], draws[m]) / self.noisy.weight
                for v in (velocity_NC, torch.zeros_like(velocity_NC))
            ],
            dim=-1,
        ).cpu()
        spans = [s for s in batch.spans if s.segment.kind == self.noisy.kind]
        return torch.stack([errors_N2[s.start : s.stop].mean(0) for s in spans])

    def _batch(self, encoded: Sequence[Encoded]) -> PackedBatch:
        like = next(self.prior.parameters())
        kinds = [s.kind for s in self.layout.filled]
        samples = [Sample(self.task, {k: e[k].grid for k in kinds}) for e in encoded]
        axes = self.prior.config.axes
        batch = pack(samples, {self.task: self.layout}, self.visibility, None, axes)
        values = [{k: e[k].values.to(like) for k in kinds} for e in encoded]
        return batch.to(like.device).with_latents(values)
