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
from unified.evaluation.statistics import Interval, bootstrap
from unified.flow.path import STRAIGHT, Path
from unified.flow.timesteps import TIMESTEP_SCALE
from unified.latents.modality import Latent, Modality, Posterior, draw
from unified.randomness import generator

#: timesteps of the robustness curve, in thousandths (figure 13 of the paper)
LEVELS = (0, 125, 250, 375, 500, 625, 750, 875, 1000)


def log_snr(found: Iterable[Posterior]) -> float:
    """VAE logSNR in nats: log of mean square of the means over mean variance (eqs. 16.2-16.3).

    Means run over all coordinates of all items. ValueError if there are none.
    """
    signal = noise = 0.0
    count = 0
    for posterior in found:
        signal += float(posterior.mean_LC.double().square().sum())
        noise += float(posterior.logvar_LC.double().exp().sum())
        count += posterior.mean_LC.numel()
    if not count:
        raise ValueError("the logSNR of a VAE needs at least one item, found none")
    return math.log(signal) - math.log(noise)


@dataclass(frozen=True)
class Robustness:
    """What comes back at a timestep in [0, 1000], with a bootstrap interval over the items."""

    timestep: float
    fidelity: Interval


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
    noises = [draw(p, generator(seed, "robustness", i)) for i, p in enumerate(found)]
    curve = []
    for level in levels:
        t = torch.tensor(level / TIMESTEP_SCALE)
        noisy = [
            Latent(path.at(p.mean_LC, eps.to(p.mean_LC), t.to(p.mean_LC)), p.grid)
            for p, eps in zip(found, noises, strict=True)
        ]
        parts = (noisy[start : start + BATCH] for start in range(0, len(noisy), BATCH))
        back = [o for part in parts for o in modality.decode(part)]
        pairs = zip(observations, back, strict=True)
        values = torch.tensor([modality.fidelity(o, b) for o, b in pairs])
        curve.append(Robustness(level, bootstrap(values)))
    return curve
