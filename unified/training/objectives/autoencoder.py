"""What an autoencoder's stage minimises (eq. 3.16)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unified.config.schema import StageConfig
from unified.data.streams import Prepared
from unified.latents.critic import Critic
from unified.latents.modality import (
    Modality,
    unencoded,
)
from unified.randomness import generator
from unified.training.objectives.objective import Objective


@dataclass(frozen=True)
class Seeds:
    """The generators of one step: one per example, keyed by what it is for."""

    seed: int
    stage: str
    step: int

    def each(self, examples: Sequence[Prepared], purpose: str) -> list[torch.Generator]:
        return [generator(self.seed, self.stage, self.step, e.slot, purpose) for e in examples]


@dataclass(frozen=True)
class AutoencoderPlan:
    observations: list[Tensor]
    generators: list[torch.Generator]
    #: those that have joined in
    critics: list[str]
    counts: dict[str, float]
    positions: tuple[float, float]


class AutoencoderObjective(Objective):
    """One modality's own stage: reconstruction + beta KL + lambda_mask masking (eq. 3.16), and
    what the stage's critics make of the reconstructions."""

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

    def critic(self, name: str) -> Critic:
        critic = self.critics[name]
        assert isinstance(critic, Critic)
        return critic

    def plan(self, examples: Sequence[Prepared], step: int) -> AutoencoderPlan:
        observations = unencoded(o for e in examples for o in e.observations.values())
        generators = Seeds(self.seed, self.stage.name, step).each(examples, "autoencoder")
        critics = [name for name in self.critics if self.critic(name).start <= step]
        latents = float(sum(math.prod(self.modality.grid(o)) for o in observations))
        counts = self.modality.counts(observations)
        for name in critics:
            counts |= self.critic(name).counts(observations)
        return AutoencoderPlan(observations, generators, critics, counts, (latents, latents))

    def forward(self, plan: AutoencoderPlan) -> dict[str, Tensor]:
        critics = [self.critic(name) for name in plan.critics]
        return self.modality.loss(plan.observations, plan.generators, critics)

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
