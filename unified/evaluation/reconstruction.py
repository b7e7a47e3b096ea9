"""What an autoencoder gives back of observations that it is shown."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unified.latents.modality import Modality, Observed, decode, encode
from unified.latents.ragged import Latent, Posteriors
from unified.randomness import noise

BATCH = 32


@torch.no_grad()
def posteriors(modality: Modality, observations: Sequence[Observed]) -> list[Posteriors]:
    """The posterior of each observation, `BATCH` of them encoded at once."""
    return encode(modality.eval(), observations, BATCH)


def sampled(posterior: Posteriors, *purpose: int | str) -> Latent:
    """A sample of the posterior of one item, by chance of its own."""
    eps = noise(posterior.mean_NC.shape, *purpose)
    return Latent(posterior.sample(eps).values, posterior.grid)


@torch.no_grad()
def reconstruct(
    modality: Modality, observations: Sequence[Tensor], seed: int | None = None
) -> list[Tensor]:
    """Decoded posterior means, or with a `seed` posterior samples, one per observation.

    Observation i draws from (seed, i), so its sample does not depend on its batch.
    """
    latents = [
        Latent(p.mean_NC, p.grid) if seed is None else sampled(p, seed, "reconstruction", i)
        for i, p in enumerate(posteriors(modality, observations))
    ]
    return decode(modality, latents, BATCH)
