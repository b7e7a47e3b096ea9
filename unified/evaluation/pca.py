"""Principal components: what a linear autoencoder with k numbers an item reaches.

Computed in the precision of the items, under autocast as well.

Shape legend: N items, D numbers of an item, K components.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PCA:
    """The mean [D] and orthonormal directions [K, D], in order of falling variance."""

    mean_D: Tensor
    components_KD: Tensor

    @classmethod
    def fit(cls, items_ND: Tensor, components: int) -> PCA:
        """The first `components` directions of `items_ND`.

        Exact, through the N x N matrix of inner products: N is the smaller side for images.
        ValueError if there are not more items than components.
        """
        if not components < len(items_ND):
            raise ValueError(f"{components} components need more items, found {len(items_ND)}")
        mean_D = items_ND.mean(0)
        centred_ND = items_ND - mean_D
        with torch.autocast(items_ND.device.type, enabled=False):
            _, vectors_NN = torch.linalg.eigh(centred_ND @ centred_ND.T)
            directions_KD = vectors_NN[:, -components:].flip(1).T @ centred_ND
        # a direction without variance is rounding noise, along the others as much as beside them
        return cls(mean_D, torch.linalg.qr(directions_KD.T)[0].T)

    def reconstruct(self, items_ND: Tensor, components: int) -> Tensor:
        """`items_ND` from their first `components` coefficients alone."""
        kept_KD = self.components_KD[:components]
        with torch.autocast(items_ND.device.type, enabled=False):
            return self.mean_D + (items_ND - self.mean_D) @ kept_KD.T @ kept_KD
