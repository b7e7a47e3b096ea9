"""What an autoencoder's stage minimises: reconstruction + beta KL + lambda_mask masking (eq. 3.16),
and what the stage's critics make of the reconstructions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unified.config.schema import StageConfig
from unified.data.batches import Items
from unified.data.streams import Prepared
from unified.latents.critic import Critic
from unified.latents.modality import Modality, unencoded
from unified.latents.ragged import numbers
from unified.randomness import Chance
from unified.sequence.packing import SEGMENTS
from unified.training.objectives.objective import Objective


@dataclass(frozen=True)
class AutoencoderBatch:
    """The items of one microbatch; `critics` are those that have joined in."""

    items: Items
    step: Tensor
    critics: list[str]
    counts: dict[str, float]
    positions: tuple[float, float]


@dataclass(frozen=True)
class AutoencoderCollate:
    """Examples of one modality to their batch."""

    modality: Modality
    critics: Mapping[str, Critic]

    def __call__(self, examples: Sequence[Prepared], step: int) -> AutoencoderBatch:
        observed = [o for e in examples for o in e.observations.values()]
        keys = [SEGMENTS * e.slot + k for e in examples for k in range(len(e.observations))]
        items, _ = Items.of(self.modality, unencoded(observed), keys)
        joined = [name for name, critic in self.critics.items() if critic.start <= step]
        observations = items.whole("an autoencoder trains on the items themselves")
        counts = self.modality.counts(observations)
        for name in joined:
            counts |= self.critics[name].counts(observations)
        latents = float(numbers(self.modality.grids(observations)))
        return AutoencoderBatch(items, torch.tensor(step), joined, counts, (latents, latents))


class AutoencoderObjective(Objective):
    """One modality's own stage."""

    def __init__(
        self,
        modality: Modality,
        stage: StageConfig,
        seed: int,
        critics: Mapping[str, Critic] | None = None,
    ):
        super().__init__()
        self.modality, self.stage, self.seed = modality, stage, seed
        self.critics = nn.ModuleDict(critics or {})
        self.collate = AutoencoderCollate(modality, critics or {})

    def critic(self, name: str) -> Critic:
        critic = self.critics[name]
        assert isinstance(critic, Critic)
        return critic

    def forward(self, batch: AutoencoderBatch) -> dict[str, Tensor]:
        critics = [self.critic(name) for name in batch.critics]
        chance = batch.items.chance(Chance(self.seed, self.stage.name, batch.step))
        observations = batch.items.observations
        assert observations is not None
        return self.modality.loss(observations, chance, critics)

    def weights(self, step: int) -> dict[str, float]:
        """The KL's rises to beta over the first ``loss.kl_warmup_steps``."""
        weights = autoencoder_weights(self.modality, self.stage)
        weights["kl"] *= min(1.0, (step + 1) / max(1, self.stage.loss.kl_warmup_steps))
        for name in self.critics:
            weights |= self.critic(name).weights()
        return weights

    def groups(self) -> dict[str, list[nn.Parameter]]:
        learning = [n for n in self.critics if self.critic(n).learns]
        modules = [self.modality, *(self.critics[n] for n in learning)]
        return {"main": [p for m in modules for p in m.parameters()], "vae": []}

    def for_validation(self) -> AutoencoderObjective:
        """The KL at its full weight, and no critic that learns."""
        loss = self.stage.loss.model_copy(update={"kl_warmup_steps": 0})
        stage = self.stage.model_copy(update={"loss": loss})
        fixed = {n: self.critic(n) for n in self.critics if not self.critic(n).learns}
        return AutoencoderObjective(self.modality, stage, self.seed, fixed)


def autoencoder_weights(modality: Modality, stage: StageConfig) -> dict[str, float]:
    """The modality's own weights, but `beta` and `mask` where the stage sets them."""
    weights = modality.weights()
    for term, value in (("kl", stage.loss.beta), ("mask", stage.loss.mask)):
        if value is not None and term in weights:
            weights[term] = value
    return weights
