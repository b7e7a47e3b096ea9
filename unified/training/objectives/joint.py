"""What a stage minimises: the autoencoder's objective (eq. 3.16) or the joint one (eq. 3.18).

An objective splits a step in two. `plan` runs on the CPU without any network: it draws all chance,
from generators keyed by (seed, stage, step, slot), and counts the positions of every loss term.
`forward` then gives *sums* over positions. Because the counts are known first, the loop can add
them up over accumulation steps and ranks before the first backward pass, and every split of a
batch gives the same loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unified.config.schema import FlowConfig, StageConfig
from unified.data.streams import Prepared
from unified.flow.matching import Draws, FlowMatching
from unified.flow.path import Path
from unified.latents.modality import (
    Latent,
    Modality,
    Observed,
    Posterior,
    draw,
    grid_of,
    posteriors_of,
    unencoded,
)
from unified.model.prior import Prior
from unified.sequence.layout import Layout
from unified.sequence.packing import PackedBatch, Sample, pack
from unified.sequence.visibility import Visibility
from unified.training.objectives.alignment import Alignment
from unified.training.objectives.autoencoder import Seeds, autoencoder_weights
from unified.training.objectives.objective import Objective


def nothing(parameters: Iterable[nn.Parameter]) -> Tensor:
    """0, with gradients of 0: what a process adds that has nothing of a kind, where others do."""
    learners = [p.sum() for p in parameters if p.requires_grad]
    return 0.0 * torch.stack(learners).sum() if learners else torch.zeros(())


def flow_loss(
    velocities: Mapping[str, Tensor], targets: Mapping[str, Tensor], draws: Mapping[str, Draws]
) -> dict[str, Tensor]:
    """The sums of the flow loss; of a modality that is absent, the sum of no velocities."""
    absent = {f"flow/{m}": v.sum() for m, v in velocities.items() if m not in draws}
    return absent | FlowMatching.loss(velocities, targets, draws)


@dataclass(frozen=True)
class JointPlan:
    """A packed batch still without latents, and everything chance decides about it."""

    examples: Sequence[Prepared]
    batch: PackedBatch
    draws: dict[str, Draws]
    seeds: Seeds
    counts: dict[str, float]

    @property
    def positions(self) -> tuple[float, float]:
        return self.batch.positions


class JointObjective(Objective):
    """Flow matching over all tasks, and (where the autoencoders train) the rest of eq. 3.18."""

    def __init__(
        self,
        prior: Prior,
        modalities: Mapping[str, Modality],
        layouts: Mapping[str, Layout],
        stage: StageConfig,
        flow: FlowConfig,
        seed: int,
        references: Mapping[str, Modality] | None = None,
        alignment: Alignment | None = None,
        path: Path | None = None,
    ):
        super().__init__()
        self.prior = prior
        self.modalities = nn.ModuleDict(modalities)
        self.references = nn.ModuleDict(references or {}).requires_grad_(False)
        self.alignment = alignment
        self.layouts, self.stage, self.seed = layouts, stage, seed
        self.visibility = Visibility({name: x.sees for name, x in layouts.items()})
        locations = {name: m.timestep_location for name, m in modalities.items()}
        self.flow = FlowMatching(flow, layouts, locations, path)
        learns = stage.optimizer.vae_lr_ratio > 0
        self.learning = {name for name, x in modalities.items() if learns and not x.frozen}
        for name, modality in modalities.items():
            modality.requires_grad_(name in self.learning)

    # ---- before the network ----

    def plan(self, examples: Sequence[Prepared], step: int) -> JointPlan:
        seeds = Seeds(self.seed, self.stage.name, step)
        samples = [Sample(e.stream, self._grids(e)) for e in examples]
        axes = self.prior.config.axes
        rows = self.stage.row_length
        batch = pack(samples, self.layouts, self.visibility, rows, axes, training=True)
        tasks = [e.stream for e in examples]
        draws = self.flow.draw(batch, tasks, self.prior.channels, seeds.each(examples, "flow"))
        counts = FlowMatching.counts(draws)
        if self.alignment is not None:
            counts |= self.alignment.counts(draws)
        for m in sorted(self.learning):
            observed = [o for _, _, o in self.observed(examples, m) if isinstance(o, Tensor)]
            if len(observed) < len(self.observed(examples, m)):
                raise ValueError(
                    f"stage {self.stage.name} trains the {m} autoencoder, which stored latents have"
                    " done without: set optimizer.vae_lr_ratio to 0, or train from the items"
                )
            counts |= {f"{m}/{term}": n for term, n in self.modality(m).counts(observed).items()}
            counts |= {f"{m}/entropy": counts.pop(f"{m}/kl")}
            if m in self.references:
                counts[f"{m}/ref"] = counts[f"{m}/entropy"]
        return JointPlan(examples, batch, draws, seeds, counts)

    def modality(self, name: str) -> Modality:
        found = self.modalities[name]
        assert isinstance(found, Modality)
        return found

    def _grids(self, example: Prepared) -> dict[str, tuple[int, ...]]:
        layout = self.layouts[example.stream]
        return {
            kind: grid_of(self.modality(layout[kind].modality), o)
            for kind, o in example.observations.items()
        }

    def observed(self, examples: Sequence[Prepared], m: str) -> list[tuple[int, str, Observed]]:
        """(example, kind, observation) of everything modality `m` has to encode."""
        return [
            (i, kind, o)
            for i, e in enumerate(examples)
            for kind, o in e.observations.items()
            if self.layouts[e.stream][kind].modality == m
        ]

    # ---- with the network ----

    def forward(self, plan: JointPlan) -> dict[str, Tensor]:
        device = next(self.prior.parameters()).device
        values: list[dict[str, Tensor]] = [{} for _ in plan.examples]
        sums: dict[str, Tensor] = {}
        for m in self.modalities:
            sums |= self._encode(m, plan, values)
        draws = {m: d.to(device) for m, d in plan.draws.items()}
        batch = plan.batch.to(device).with_latents(values)
        noisy, targets = self.flow.corrupt(batch, draws)
        noisy = noisy.with_streams(self.prior.channels)
        if self.alignment is None:
            return sums | flow_loss(self.prior(noisy), targets, draws)
        if self.alignment.term not in plan.counts:
            sums[self.alignment.term] = nothing(self.alignment.parameters())
            return sums | flow_loss(self.prior(noisy), targets, draws)
        tap = self.alignment.tap()
        sums |= flow_loss(self.prior(noisy, watch=tap), targets, draws)
        grids = [self._grids(e) for e in plan.examples]
        return sums | self.alignment.loss(tap, batch, draws, plan.examples, grids)

    def _encode(
        self, m: str, plan: JointPlan, values: list[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Latents of everything of modality `m` into `values`; its loss terms where it learns."""
        modality, observed = self.modality(m), self.observed(plan.examples, m)
        if not observed:
            learning = m in self.learning
            return {f"{m}/entropy": nothing(self.modality(m).parameters())} if learning else {}
        with nullcontext() if m in self.learning else torch.no_grad():
            posteriors = posteriors_of(modality, [o for _, _, o in observed])
        generators = plan.seeds.each(plan.examples, f"posterior/{m}")
        latents = [
            self._latent(p, generators[i])
            for p, (i, _, _) in zip(posteriors, observed, strict=True)
        ]
        for latent, (i, kind, _) in zip(latents, observed, strict=True):
            values[i][kind] = latent.values
        if m not in self.learning:
            return {}
        masks = plan.seeds.each([plan.examples[i] for i, _, _ in observed], f"mask/{m}")
        observations = unencoded(o for _, _, o in observed)
        sums = modality.reconstruction(observations, latents)
        sums |= modality.masking(observations, masks)
        sums["entropy"] = -torch.stack([p.entropy() for p in posteriors]).sum()
        if m in self.references:
            sums["ref"] = self._reference_kl(m, observations, posteriors)
        return {f"{m}/{term}": value for term, value in sums.items()}

    def _latent(self, posterior: Posterior, generator: torch.Generator) -> Latent:
        if self.stage.posterior == "mean":
            return posterior.mode
        return posterior.sample(draw(posterior, generator))

    def _reference_kl(
        self, m: str, observations: Sequence[Tensor], posteriors: Sequence[Posterior]
    ) -> Tensor:
        """KL to the frozen reference encoder (the last term of eq. 3.18)."""
        reference = self.references[m]
        assert isinstance(reference, Modality)
        with torch.no_grad():
            anchors = reference.encode(observations)
        return torch.stack([p.kl(a) for p, a in zip(posteriors, anchors, strict=True)]).sum()

    # ---- weights ----

    def weights(self, step: int) -> dict[str, float]:
        """lambda_fm on the flow, lambda_vae on the autoencoders' terms, lambda_ref on drift."""
        del step
        loss = self.stage.loss
        weights = {f"flow/{m}": loss.fm * loss.modality.get(m, 1.0) for m in self.modalities}
        for m in self.learning:
            own = autoencoder_weights(self.modality(m), self.stage)
            own["entropy"] = own.pop("kl")
            weights |= {f"{m}/{term}": loss.vae * w for term, w in own.items()}
            weights[f"{m}/ref"] = loss.ref
        if self.alignment is not None:
            weights[self.alignment.term] = self.alignment.config.weight
        return weights

    def groups(self) -> dict[str, list[nn.Parameter]]:
        vae = [p for m in sorted(self.learning) for p in self.modalities[m].parameters()]
        projection = [] if self.alignment is None else list(self.alignment.parameters())
        return {"main": [*self.prior.parameters(), *projection], "vae": vae}
