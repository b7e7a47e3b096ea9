"""What a joint stage minimises (eq. 3.18): flow matching over all tasks, and the rest of the
equation where the autoencoders train along."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from unified.config.schema import FlowConfig, StageConfig
from unified.data.batches import Items
from unified.data.streams import Prepared
from unified.flow.matching import FlowMatching
from unified.flow.path import Path
from unified.latents.modality import Modality, Observed, grid_of
from unified.latents.ragged import Latents, Posteriors
from unified.model.prior import Prior
from unified.randomness import Chance, ItemChance
from unified.sequence.layout import Layout
from unified.sequence.packing import SEGMENTS, PackedBatch, Packer, Sample
from unified.sequence.visibility import Visibility
from unified.training.objectives.alignment import Aligned, Alignment
from unified.training.objectives.autoencoder import autoencoder_weights
from unified.training.objectives.objective import Objective, nothing


@dataclass(frozen=True)
class JointBatch:
    """Rows still without latents, the items whose latents they will hold, and what the alignment
    looks at, if there is one."""

    rows: PackedBatch
    items: dict[str, Items]
    step: Tensor
    counts: dict[str, float]
    aligned: Aligned | None = None

    @property
    def positions(self) -> tuple[float, float]:
        return self.rows.positions


@dataclass
class JointCollate:
    """Examples of any tasks to rows. Terms of the autoencoders in `learning` are counted too, and
    again under the names of `references`."""

    modalities: Mapping[str, Modality]
    packer: Packer
    flow: FlowMatching
    chance: Chance
    learning: set[str] = field(default_factory=set)
    references: set[str] = field(default_factory=set)
    aligned: str | None = None

    def __call__(self, examples: Sequence[Prepared], step: int) -> JointBatch:
        chance = replace(self.chance, step=step)
        items, order = {}, {}
        for m, modality in self.modalities.items():
            found = self._observed(examples, m)
            if found:
                keys = [key for _, _, key, _ in found]
                items[m], at = Items.of(modality, [o for *_, o in found], keys)
                order[m] = [found[k][:2] for k in at]
        samples = [Sample(e.stream, self._grids(e)) for e in examples]
        rows = self.packer(samples, order, [e.slot for e in examples])
        rows = self.flow.keep_beginnings(rows, chance)
        counts = FlowMatching.counts(rows) | self._own_counts(items)
        aligned = None if self.aligned is None else Aligned.of(self.aligned, rows, items)
        counts |= {} if aligned is None else aligned.counts
        return JointBatch(rows, items, torch.tensor(step), counts, aligned)

    def _observed(
        self, examples: Sequence[Prepared], m: str
    ) -> list[tuple[int, str, int, Observed]]:
        """(example, kind, whose chance, observation) of everything of modality `m`."""
        found = []
        for i, e in enumerate(examples):
            layout = self.packer.layouts[e.stream]
            for place, segment in enumerate(layout.segments):
                if segment.modality == m and segment.kind in e.observations:
                    key = SEGMENTS * e.slot + place
                    found.append((i, segment.kind, key, e.observations[segment.kind]))
        return found

    def _grids(self, example: Prepared) -> dict[str, tuple[int, ...]]:
        layout = self.packer.layouts[example.stream]
        return {
            kind: grid_of(self.modalities[layout[kind].modality], o)
            for kind, o in example.observations.items()
        }

    def _own_counts(self, items: Mapping[str, Items]) -> dict[str, float]:
        """Positions of the terms of the autoencoders that learn."""
        counts: dict[str, float] = {}
        for m in sorted(self.learning & items.keys()):
            observations = items[m].whole(
                f"stage {self.chance.stage} trains the {m} autoencoder, which stored latents have"
                " done without: set optimizer.vae_lr_ratio to 0, or train from the items"
            )
            own = self.modalities[m].counts(observations)
            own["entropy"] = own.pop("kl")
            if m in self.references:
                own["ref"] = own["entropy"]
            counts |= {f"{m}/{term}": n for term, n in own.items()}
        return counts


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
        self.collate = JointCollate(
            {name: self.modality(name) for name in modalities},
            Packer(
                layouts,
                self.visibility,
                prior.config.axes,
                stage.row_length,
                training=True,
                pad_rows=stage.pad_rows,
            ),
            self.flow,
            Chance(seed, stage.name),
            self.learning,
            set(self.references),
            None if alignment is None else alignment.config.modality,
        )

    def modality(self, name: str) -> Modality:
        found = self.modalities[name]
        assert isinstance(found, Modality)
        return found

    def forward(self, batch: JointBatch) -> dict[str, Tensor]:
        chance = Chance(self.seed, self.stage.name, batch.step)
        latents: dict[str, Tensor] = {}
        sums: dict[str, Tensor] = {}
        for m in self.modalities:
            if m in batch.items:
                latents[m], own = self._encode(m, batch.items[m], chance)
                sums |= own
            elif m in self.learning:
                sums[f"{m}/entropy"] = nothing(self.modality(m).parameters())
        rows = batch.rows.under(self.visibility.to(batch.step.device)).with_latents(latents)
        draws = self.flow.draw(rows, chance, self.prior.channels)
        noisy, targets = self.flow.corrupt(rows, draws)
        noisy = noisy.with_streams(self.prior.channels)
        if self.alignment is None:
            return sums | self.flow.loss(self.prior(noisy), targets)
        tap = self.alignment.tap()
        sums |= self.flow.loss(self.prior(noisy, watch=tap), targets)
        return sums | self.alignment.loss(tap, rows, batch.items, batch.aligned)

    def _encode(self, m: str, items: Items, chance: Chance) -> tuple[Tensor, dict[str, Tensor]]:
        """The latents [*, C] of all items of modality `m`, and its loss terms where it learns."""
        modality, own = self.modality(m), items.chance(chance)
        with nullcontext() if m in self.learning else torch.no_grad():
            posteriors = items.posteriors(modality)
        latents = self._latents(posteriors, own)
        if m not in self.learning:
            return latents.values, {}
        observations = items.whole(f"{m} learns from items")
        sums = modality.reconstruction(observations, latents)
        sums |= modality.masking(observations, own)
        sums["entropy"] = -posteriors.entropy()
        if m in self.references:
            sums["ref"] = self._reference_kl(m, items, posteriors)
        return latents.values, {f"{m}/{term}": value for term, value in sums.items()}

    def _latents(self, posteriors: Posteriors, own: ItemChance) -> Latents:
        if self.stage.posterior == "mean":
            return posteriors.mode
        return posteriors.sample(own.normal("posterior", posteriors.mean_NC.shape[1]))

    def _reference_kl(self, m: str, items: Items, posteriors: Posteriors) -> Tensor:
        """KL to the frozen reference encoder (the last term of eq. 3.18)."""
        reference = self.references[m]
        assert isinstance(reference, Modality)
        with torch.no_grad():
            anchors = items.posteriors(reference)
        return posteriors.kl(anchors)

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
