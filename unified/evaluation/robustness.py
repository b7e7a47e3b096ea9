"""Instruments for a latent space: how sharp its posteriors are, and how much noise it bears.

Shape legend: L positions of one item, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unified.evaluation.reconstruction import BATCH, posteriors
from unified.evaluation.statistics import ConfidenceInterval, bootstrap
from unified.flow.path import STRAIGHT, Path
from unified.flow.timesteps import TIMESTEP_SCALE
from unified.latents.modality import Modality, decode
from unified.latents.ragged import Latent, Posteriors
from unified.randomness import noise

#: timesteps of the robustness curve, in thousandths (figure 13 of the paper)
LEVELS = (0, 125, 250, 375, 500, 625, 750, 875, 1000)


def log_snr(found: Iterable[Posteriors]) -> float:
    """VAE logSNR in nats: log of mean square of the means over mean variance (eqs. 16.2-16.3).

    Means run over all coordinates of all items. ValueError if there are none.
    """
    signal = noise = 0.0
    count = 0
    for posterior in found:
        signal += float(posterior.mean_NC.double().square().sum())
        noise += float(posterior.logvar_NC.double().exp().sum())
        count += posterior.mean_NC.numel()
    if not count:
        raise ValueError("the logSNR of a VAE needs at least one item, found none")
    return math.log(signal) - math.log(noise)


@dataclass(frozen=True)
class Robustness:
    """What comes back at a timestep in [0, 1000], with a bootstrap interval over the items."""

    timestep: float
    fidelity: ConfidenceInterval


@torch.no_grad()
def noise_robustness(
    modality: Modality,
    observations: Sequence[Tensor],
    levels: Sequence[float] = LEVELS,
    seed: int = 0,
    path: Path = STRAIGHT,
) -> list[Robustness]:
    """What the decoder gives back of z_t on `path`, by t (figure 13 of the paper).

    z_0 are posterior means, and item i has the same eps at every level. How much came back is the
    modality's `fidelity`. ValueError for a level outside [0, 1000] and for no items.
    """
    outside = [level for level in levels if not 0 <= level <= TIMESTEP_SCALE]
    if outside:
        raise ValueError(f"a timestep lies between 0 and {TIMESTEP_SCALE}, found {outside[0]}")
    found = list(posteriors(modality, observations))
    z0 = torch.cat([p.mean_NC for p in found])
    eps = [noise(p.mean_NC.shape, seed, "robustness", i) for i, p in enumerate(found)]
    eps_NC, lengths = torch.cat(eps).to(z0), [len(p.mean_NC) for p in found]
    curve = []
    for level in levels:
        z_NC = path.at(z0, eps_NC, torch.tensor(level / TIMESTEP_SCALE).to(z0))
        pairs = zip(z_NC.split(lengths), found, strict=True)
        back = decode(modality, [Latent(z_LC, p.grid) for z_LC, p in pairs], BATCH)
        both = zip(observations, back, strict=True)
        values = torch.tensor([modality.fidelity(o, b) for o, b in both])
        curve.append(Robustness(level, bootstrap(values)))
    return curve
