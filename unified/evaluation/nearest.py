"""Who is nearest: retrieval among references, and nearest centroids.

Shape legend: Q queries, R references, D numbers of a vector.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from unified.evaluation.reconstruction import posteriors
from unified.latents.modality import Modality
from unified.randomness import generator

Label = TypeVar("Label", bound=Hashable)


def latent_vectors(modality: Modality, observations: Sequence[Tensor]) -> Tensor:
    """Posterior means of observations of one grid, each as one vector: [number, L * C]."""
    found = list(posteriors(modality, observations))
    grids = {p.grid for p in found}
    if len(grids) > 1:
        raise ValueError(f"vectors need observations of one size, found the grids {sorted(grids)}")
    return torch.stack([p.mean_NC.flatten() for p in found]).cpu()


def retrieved(
    query_QD: Tensor,
    reference_RD: Tensor,
    own: Sequence[int],
    groups: Sequence[Hashable],
    candidates: int = 10,
    seed: int = 0,
) -> list[bool]:
    """Is each query nearest to its own reference among `candidates` references of one group?

    ``own[q]`` is the index of query q's reference, ``groups[r]`` the group of reference r. The
    other candidates are drawn from the group, so that chance is right once in `candidates` times.
    ValueError for a group with too few references.
    """
    hits = []
    for q, r in enumerate(own):
        others = [i for i in range(len(groups)) if groups[i] == groups[r] and i != r]
        if len(others) < candidates - 1:
            raise ValueError(
                f"retrieval among {candidates} needs as many references of group {groups[r]!r},"
                f" found {len(others) + 1}"
            )
        order = torch.randperm(len(others), generator=generator(seed, "candidates", q)).tolist()
        chosen = [r] + [others[i] for i in order[: candidates - 1]]
        distance_C = (reference_RD[chosen] - query_QD[q]).square().sum(1)
        hits.append(bool((distance_C[0] < distance_C[1:]).all()))
    return hits


def nearest_centroids(
    query_QD: Tensor, reference_RD: Tensor, labels: Sequence[Label], shrinkage: float = 0.03
) -> list[Label]:
    """For every query, the label whose references' mean is nearest; ``labels[r]`` is r's.

    Distance is measured in units of how references scatter about their own mean (Mahalanobis):
    what varies much within every label says little about the label. `shrinkage` adds that share of
    the average variance to each direction, since there may be fewer references than directions.
    """
    names = list(dict.fromkeys(labels))
    reference_RD, query_QD = reference_RD.double(), query_QD.double()
    index_R = torch.tensor([names.index(x) for x in labels])
    mean_KD = torch.stack([reference_RD[index_R == k].mean(0) for k in range(len(names))])
    scatter_RD = reference_RD - mean_KD[index_R]
    covariance_DD = scatter_RD.mT @ scatter_RD / len(scatter_RD)
    floor = shrinkage * covariance_DD.diagonal().mean().clamp_min(1e-12)
    covariance_DD.diagonal().add_(floor)
    difference_QKD = query_QD[:, None] - mean_KD
    scaled_QKD = torch.linalg.solve(covariance_DD, difference_QKD.flatten(0, 1).mT).mT
    distance_QK = (difference_QKD.flatten(0, 1) * scaled_QKD).sum(1).view(len(query_QD), -1)
    return [names[k] for k in distance_QK.argmin(1).tolist()]
