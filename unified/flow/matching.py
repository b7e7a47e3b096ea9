"""Flow matching: what training does to a batch, and the loss of what the prior makes of it.

Training draws a timestep for each noise group, a block of noisy text or a whole noisy image, puts
the group's latents on the path at that time, and regresses the velocity there (paper 3.2.2).

    t_G    one timestep a group         U_G    whether the group is relabelled U, for guidance
    eps    noise of every noisy latent

Shape legend: N positions of one modality over a batch, M those of them that are noisy, G noise
groups, T = G + 1 distinct timesteps (0 first), C channels, R rows, L positions of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unified.config.plugins import build_path
from unified.config.schema import FlowConfig, TimestepConfig
from unified.flow.path import Path
from unified.flow.timesteps import round_timesteps
from unified.randomness import Chance, gaussian, unit
from unified.sequence.layout import Layout, modality_names
from unified.sequence.packing import NoiseGroups, NoisyPlaces, PackedBatch
from unified.sequence.visibility import UNCONDITIONAL


@dataclass(frozen=True)
class Draws:
    """What chance decides about a batch: timesteps `t_G` and relabelling as U `unconditional_G` of
    each noise group, and the noise [M, C] of each modality's noisy positions."""

    t_G: Tensor
    unconditional_G: Tensor
    noise: dict[str, Tensor]


@dataclass(frozen=True)
class Target:
    """What the velocity of one modality should be: at these of its N positions (`at_M`), these
    velocities [M, C], each with its weight in the loss [M]."""

    at_M: Tensor
    velocity_MC: Tensor
    weight_M: Tensor

    def errors(self, velocity_NC: Tensor) -> Tensor:
        """Weighted channel-mean squared error [M] of the velocities [N, C] of all positions, in at
        least float32."""
        found_MC = velocity_NC.index_select(0, self.at_M)
        wide = torch.promote_types(found_MC.dtype, torch.float32)
        error_M = (found_MC.to(wide) - self.velocity_MC.to(wide)).square().mean(-1)
        return error_M * self.weight_M.to(wide)


class FlowMatching:
    """Corruption and loss of training.

    `locations` are the timestep locations of modalities for which the configuration sets none.
    Without a `path`, it is the one that the configuration names (`unified.flow.path`).
    """

    def __init__(
        self,
        config: FlowConfig,
        layouts: Mapping[str, Layout],
        locations: Mapping[str, float] | None = None,
        path: Path | None = None,
    ):
        self.config, self.locations = config, locations or {}
        self.path = path or build_path(config)
        self.names = modality_names(layouts)
        self._tables: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    def timesteps(self, modality: str) -> TimestepConfig:
        """How the timesteps of a modality are drawn, with its location."""
        told = self.config.timesteps.get(modality, TimestepConfig())
        location = self.locations.get(modality, 0.0) if told.loc is None else told.loc
        return told.model_copy(update={"loc": location})

    # ---- in a data worker ----------------------------------------------------------------------

    def keep_beginnings(self, batch: PackedBatch, chance: Chance) -> PackedBatch:
        """`batch`, in some noise groups of which the first 1 .. length-1 latents stay clean (5.2).

        These are no loss positions, so this is decided where losses are counted.
        """
        groups = NoiseGroups(*batch.groups)
        if not self.config.clean_prefix_rate or not len(groups.item):
            return batch
        chosen_G = chance.uniform("keep", groups.item, groups.number)
        share_G = chance.uniform("how much", groups.item, groups.number)
        left_G = 1 + (share_G * (groups.size - 1).clamp(min=1)).long()
        keep_G = (chosen_G < self.config.clean_prefix_rate) & (groups.size > 1)
        left_G = torch.where(keep_G & (groups.blockwise > 0), left_G, 0)
        noisy, step_RL = {}, batch.step_RL.clone()
        for m, columns in batch.noisy.items():
            of = NoisyPlaces(*columns)
            known_M = of.within < left_G[of.group - 1]
            step_RL.view(-1)[batch.where[m][of.at[known_M]]] = 0
            noisy[m] = columns[:, ~known_M]
        return replace(batch, noisy=noisy, step_RL=step_RL)

    @staticmethod
    def counts(batch: PackedBatch) -> dict[str, float]:
        """Number of loss positions per modality."""
        return {f"flow/{m}": float(noisy.shape[1]) for m, noisy in batch.noisy.items()}

    # ---- on the device -------------------------------------------------------------------------

    def draw(self, batch: PackedBatch, chance: Chance, channels: Mapping[str, int]) -> Draws:
        """All chance of a batch, on its device."""
        groups = NoiseGroups(*batch.groups)
        rate_G, _ = batch.chances
        noise = {}
        for m, columns in batch.noisy.items():
            of = NoisyPlaces(*columns)
            noise[m] = chance.normal("noise", of.item, of.place, channels[m])
        unconditional_G = chance.uniform("unconditional", groups.item, groups.number) < rate_G
        return Draws(self._timesteps(groups, chance), unconditional_G, noise)

    def _timesteps(self, groups: NoiseGroups, chance: Chance) -> Tensor:
        """Timesteps [G] in [0, 1]: ``sigmoid(loc + scale n)``, n normal (16.5-16.8), or uniform."""
        loc, scale, uniform = (table[groups.modality] for table in self._of_modalities(groups.item))
        words = chance.words("timestep", groups.item, groups.number)
        n_G, u_G = gaussian(words)[0], unit(words[2])
        t_G = torch.where(uniform > 0, u_G, torch.sigmoid(loc + scale * n_G))
        return round_timesteps(t_G, self.config.round_timesteps)

    def _of_modalities(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Location, scale, and whether uniform, by number of the modality; kept by device."""
        if like.device not in self._tables:
            told = [self.timesteps(m) for m in self.names]
            rows = [(t.loc or 0.0, t.scale, float(t.distribution == "uniform")) for t in told]
            loc, scale, uniform = torch.tensor(rows).T.contiguous().to(like.device)
            self._tables[like.device] = (loc, scale, uniform)
        return self._tables[like.device]

    def corrupt(self, batch: PackedBatch, draws: Draws) -> tuple[PackedBatch, dict[str, Target]]:
        """The batch on the path at its timesteps, and what the velocities should be.

        Clean history never carries a gradient (eq. 3.17); the noisy block and the target do as
        the configuration says.
        """
        latents, targets = {}, {}
        t_T = torch.cat([draws.t_G.new_zeros(1), draws.t_G])
        for m, z_NC in batch.latents.items():
            of, held_NC = NoisyPlaces(*batch.noisy[m]), z_NC.detach()
            z0_MC, eps_MC = z_NC.index_select(0, of.at), draws.noise[m].to(z_NC)
            through = z0_MC if self.config.grad_through_noisy else z0_MC.detach()
            t_M1 = t_T[of.group][:, None].to(z_NC)
            z_t = self.path.at(through, eps_MC, t_M1)
            latents[m] = held_NC.index_copy(0, of.at, z_t)
            aimed = z0_MC if self.config.grad_through_target else z0_MC.detach()
            weight_M = batch.chances[1][of.group - 1]
            targets[m] = Target(of.at, self.path.velocity(aimed, eps_MC, t_M1), weight_M)
        relabelled = torch.cat([draws.unconditional_G.new_zeros(1), draws.unconditional_G])
        kind_RL = batch.coordinates.kind.masked_fill(
            relabelled[batch.group_RL], batch.rules.kind_index[UNCONDITIONAL]
        )
        like = next(iter(batch.latents.values()), t_T)
        t_T = t_T.to(torch.promote_types(like.dtype, torch.float32))
        corrupted = replace(
            batch,
            latents=latents,
            coordinates=replace(batch.coordinates, kind=kind_RL),
            time_RL=t_T[batch.step_RL],
            timesteps=(t_T, batch.step_RL),
        )
        return corrupted, targets

    @staticmethod
    def loss(velocities: Mapping[str, Tensor], targets: Mapping[str, Target]) -> dict[str, Tensor]:
        """Sum over loss positions of the weighted squared error, per modality; of a modality that
        is absent, the sum of no velocities."""
        absent = {f"flow/{m}": v.sum() for m, v in velocities.items() if m not in targets}
        return absent | {f"flow/{m}": t.errors(velocities[m]).sum() for m, t in targets.items()}
