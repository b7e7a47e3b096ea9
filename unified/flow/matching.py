"""Flow matching: latents are put on a path to noise, and its velocity is learned.

The path is straight unless ``flow.path`` names another (`unified.flow.path`; paper 3.2.2 and 16.9).
Training draws a timestep for each noise group, a block of noisy text or a whole noisy image, and
regresses the velocity. Sampling integrates
``dz/dt = v`` from t = 1 to 0 (`unified.flow.solvers`).

Shape legend: N positions of one modality over a batch, C channels, n positions of one span,
g noise groups of one span.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unified.config.plugins import build_path
from unified.config.schema import FlowConfig, TimestepConfig
from unified.flow.path import Path
from unified.flow.timesteps import draw_timesteps, round_timesteps
from unified.sequence.layout import Layout
from unified.sequence.packing import PackedBatch, Span
from unified.sequence.visibility import UNCONDITIONAL


@dataclass(frozen=True)
class Draws:
    """What chance decides about the positions of one modality, all [N] (noise [N, C]).

    `noisy` is where the loss counts: a noisy position that is not in a clean left part.
    """

    noise_NC: Tensor
    time_N: Tensor
    noisy_N: Tensor
    unconditional_N: Tensor
    weight_N: Tensor

    def to(self, device: torch.device | str) -> Draws:
        return Draws(*(t.to(device) for t in self.tensors))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.noise_NC, self.time_N, self.noisy_N, self.unconditional_N, self.weight_N

    @staticmethod
    def cat(parts: Sequence[Draws]) -> Draws:
        columns = zip(*(d.tensors for d in parts), strict=True)
        return Draws(*(torch.cat(column) for column in columns))


class FlowMatching:
    """Corruption and loss of training (paper 3.2.2), as a function of each sample's generator.

    `locations` are the timestep locations of modalities for which the configuration sets none.
    Without a `path`, it is the one that the configuration names.
    """

    def __init__(
        self,
        config: FlowConfig,
        layouts: Mapping[str, Layout],
        locations: Mapping[str, float] | None = None,
        path: Path | None = None,
    ):
        self.config = config
        self.path = path or build_path(config)
        self.layouts = layouts
        self.locations = locations or {}

    def timesteps(self, modality: str) -> TimestepConfig:
        """How the timesteps of a modality are drawn, with its location."""
        told = self.config.timesteps.get(modality, TimestepConfig())
        location = self.locations.get(modality, 0.0) if told.loc is None else told.loc
        return told.model_copy(update={"loc": location})

    def draw(
        self,
        batch: PackedBatch,
        tasks: Sequence[str],
        channels: Mapping[str, int],
        generators: Sequence[torch.Generator],
    ) -> dict[str, Draws]:
        """All chance of a batch: ``tasks[i]`` and ``generators[i]`` belong to sample i."""
        drawn: dict[str, list[Draws]] = {m: [] for m in batch.where}
        for span in batch.spans:
            m = span.segment.modality
            rate = self.layouts[tasks[span.sample]].unconditional_rate
            drawn[m].append(self._draw_span(span, channels[m], rate, generators[span.sample]))
        return {m: Draws.cat(parts) for m, parts in drawn.items()}

    def _draw_span(
        self, span: Span, channels: int, rate: float, generator: torch.Generator
    ) -> Draws:
        n = span.stop - span.start
        if span.segment.noise == "clean" or n == 0:
            no, zero = torch.zeros(n, dtype=torch.bool), torch.zeros(n)
            return Draws(torch.zeros(n, channels), zero, no, no, zero)
        group_n = span.block if span.segment.noise == "block" else torch.zeros_like(span.block)
        groups = int(group_n.max()) + 1
        t_g = draw_timesteps(groups, self.timesteps(span.segment.modality), generator)
        t_g = round_timesteps(t_g, self.config.round_timesteps)
        unconditional_g = torch.rand(groups, generator=generator) < rate
        known_n = self._known(span, group_n, groups, generator)
        noise_nc = torch.randn(n, channels, generator=generator)
        return Draws(
            noise_nc,
            torch.where(known_n, 0.0, t_g[group_n]),
            ~known_n,
            unconditional_g[group_n],
            torch.full((n,), span.segment.weight),
        )

    def _known(
        self, span: Span, group_n: Tensor, groups: int, generator: torch.Generator
    ) -> Tensor:
        """Positions of a clean left part: in some blocks 1 .. length-1 latents stay clean (5.2)."""
        chosen_g = torch.rand(groups, generator=generator) < self.config.clean_prefix_rate
        share_g = torch.rand(groups, generator=generator)
        if span.segment.noise != "block":
            return torch.zeros_like(group_n, dtype=torch.bool)
        length_g = torch.bincount(group_n, minlength=groups)
        left_g = 1 + (share_g * (length_g - 1).clamp(min=1)).long()
        left_g = torch.where(chosen_g & (length_g > 1), left_g, 0)
        starts_g = torch.cumsum(length_g, 0) - length_g
        within_n = torch.arange(len(group_n)) - starts_g[group_n]
        return within_n < left_g[group_n]

    def corrupt(
        self, batch: PackedBatch, draws: Mapping[str, Draws]
    ) -> tuple[PackedBatch, dict[str, Tensor]]:
        """The batch on the path at its timesteps, and the target velocity [N, C] per modality.

        Clean history never carries a gradient (eq. 3.17); the noisy block and the target do as
        the configuration says.
        """
        latents, targets = {}, {}
        time_RL, kind_RL = batch.time_RL.clone(), batch.coordinates.kind.clone()
        for m, z0 in batch.latents.items():
            d, held = draws[m], z0.detach()
            through = z0 if self.config.grad_through_noisy else held
            t_N1 = d.time_N[:, None]
            z_t = self.path.at(through, d.noise_NC, t_N1)
            latents[m] = torch.where(d.noisy_N[:, None], z_t, held)
            wanted = z0 if self.config.grad_through_target else held
            targets[m] = self.path.velocity(wanted, d.noise_NC, t_N1)
            time_RL.view(-1)[batch.where[m]] = d.time_N.to(time_RL)
            relabelled = batch.where[m][d.unconditional_N]
            kind_RL.view(-1)[relabelled] = batch.visibility.kind_index[UNCONDITIONAL]
        coordinates = replace(batch.coordinates, kind=kind_RL)
        return replace(batch, latents=latents, time_RL=time_RL, coordinates=coordinates), targets

    @staticmethod
    def counts(draws: Mapping[str, Draws]) -> dict[str, float]:
        """Number of loss positions per modality."""
        return {f"flow/{m}": float(d.noisy_N.sum()) for m, d in draws.items()}

    @staticmethod
    def loss(
        velocities: Mapping[str, Tensor], targets: Mapping[str, Tensor], draws: Mapping[str, Draws]
    ) -> dict[str, Tensor]:
        """Sum over loss positions of the weighted channel-mean squared error, per modality."""
        return {
            f"flow/{m}": flow_errors(velocities[m], targets[m], d).sum() for m, d in draws.items()
        }


def flow_errors(velocity_NC: Tensor, target_NC: Tensor, draws: Draws) -> Tensor:
    """Weighted squared error of each position [N]; 0 where the loss does not count."""
    wide = torch.promote_types(velocity_NC.dtype, torch.float32)
    error_N = (velocity_NC.to(wide) - target_NC.to(wide)).square().mean(-1)
    return error_N * draws.weight_N.to(wide) * draws.noisy_N
