"""What an autoencoder gives back of observations that it is shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from unified.latents.modality import Modality, Observed, Posterior, draw, posteriors_of
from unified.randomness import generator

BATCH = 32


@torch.no_grad()
def posteriors(modality: Modality, observations: Sequence[Observed]) -> Iterator[Posterior]:
    """The posterior of each observation, `BATCH` of them encoded at once."""
    modality.eval()
    for start in range(0, len(observations), BATCH):
        yield from posteriors_of(modality, observations[start : start + BATCH])


@torch.no_grad()
def reconstruct(
    modality: Modality, observations: Sequence[Tensor], seed: int | None = None
) -> list[Tensor]:
    """Decoded posterior means, or with a `seed` posterior samples, one per observation.

    Observation i draws from (seed, i), so its sample does not depend on its batch.
    """
    latents = [
        posterior.mode
        if seed is None
        else posterior.sample(draw(posterior, generator(seed, "reconstruction", i)))
        for i, posterior in enumerate(posteriors(modality, observations))
    ]
    parts = (latents[start : start + BATCH] for start in range(0, len(latents), BATCH))
    return [observation for part in parts for observation in modality.decode(part)]
