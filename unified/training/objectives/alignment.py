"""Alignment of the prior's features with those of a frozen encoder (REPA, arXiv 2410.06940).

    features of the prior after some block, at noisy positions --> three-layer MLP --+
                                                                                     |  - cosine
    observation, without noise --> frozen encoder --> interpolated to the latents' grid --+

An encoder is any callable from a list of observations of one shape (for images uint8 [3, H, W]) to
one tensor of features each: on a grid of its own, ``[h, w, F]``, or flat, ``[h * w, F]``, where the
grid has the shape of the latents' grid, finer or coarser. It is a part of no checkpoint.

Shape legend: N positions of one modality over the whole batch, M those of them that are noisy,
B observations of one shape, L latents of one item, K latents of all items that are looked at, W
width of the prior, F width of the encoder's features, ``g`` any number of grid axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unified.config.schema import AlignmentConfig
from unified.data.batches import Items
from unified.latents.modality import Modality, decode
from unified.latents.ragged import Latent, Runs
from unified.model.layers import wide
from unified.model.prior import SHARED
from unified.sequence.packing import NoisyPlaces, PackedBatch
from unified.training.objectives.objective import nothing

#: how features are interpolated on a grid of so many axes
INTERPOLATION = {1: "linear", 2: "bilinear", 3: "trilinear"}

Encoder = Callable[[list[Tensor]], Sequence[Tensor]]


@dataclass
class Tap:
    """Watches a forward pass of the prior, and keeps the streams that one block gave."""

    layer: int
    streams: Mapping[str, Tensor] = field(default_factory=dict)

    def __call__(self, number: int, streams: Mapping[str, Tensor]) -> None:
        if number == self.layer:
            self.streams = streams

    def features(self, m: str, batch: PackedBatch) -> Tensor:
        """Those of modality `m` [N, W]."""
        return self.streams[m] if m in self.streams else self.streams[SHARED][batch.where[m]]


@dataclass(frozen=True)
class Aligned:
    """What of a batch is aligned: of each run of the observations, how many are looked at and on
    which grid, `picked_B` their places within their runs, and for each noisy position which of
    the K latents of these it is."""

    runs: Runs
    picked_B: Tensor
    at_M: Tensor
    source_M: Tensor
    counts: dict[str, float]

    @classmethod
    def of(cls, m: str, rows: PackedBatch, items: Mapping[str, Items]) -> Aligned | None:
        """Of all of `m` that is noisy; None where nothing is. ValueError for observations that are
        no longer there to be encoded. Runs in a data worker."""
        if m not in rows.noisy or not rows.noisy[m].shape[1]:
            return None
        mine = items[m]
        noisy = NoisyPlaces(*rows.noisy[m])
        latent_M = rows.take[m][noisy.at].numpy()
        mine.whole(
            f"alignment reads the observations of {m}, but this stage has only their latents: train"
            " it without stored latents, or without alignment"
        )
        item_K = np.cumsum(mine.spot_2N[1].numpy() == 0) - 1  # which item a latent is of
        wanted = np.unique(item_K[latent_M])
        grids = mine.grids
        first = np.array([0, *accumulate(count for count, _ in grids)])
        run_B = np.searchsorted(first, wanted, side="right") - 1
        runs = tuple((int((run_B == r).sum()), grid) for r, (_, grid) in enumerate(grids))
        kept_K = np.isin(item_K, wanted)
        source_M = (np.cumsum(kept_K) - 1)[latent_M]
        picked = torch.from_numpy(wanted - first[run_B])
        counts = {f"align/{m}": float(len(latent_M))}
        return cls(runs, picked, noisy.at, torch.from_numpy(source_M), counts)


class Alignment(nn.Module):
    """The projection, which is trained, and the encoder, which is neither trained nor stored."""

    def __init__(self, config: AlignmentConfig, encoder: Encoder, width: int, features: int):
        super().__init__()
        self.config = config
        self.projection = nn.Sequential(
            nn.Linear(width, config.hidden),
            nn.SiLU(),
            nn.Linear(config.hidden, config.hidden),
            nn.SiLU(),
            nn.Linear(config.hidden, features),
        )
        self._unregistered = (encoder,)  # a module in a tuple is no submodule

    @classmethod
    def build(
        cls, config: AlignmentConfig, modality: Modality, width: int, make: Callable[..., Any]
    ) -> Alignment:
        """For a prior of this `width`. What the modality makes of zeros tells F.

        `make` is what its encoder's name stands for. ValueError for one that gives no features.
        """
        encoder = make_encoder(config, make)
        grid = modality.grid_for(None)
        zeros = torch.zeros(math.prod(grid), modality.channels)
        parameter = next(modality.parameters())
        with torch.no_grad():
            (observation,) = decode(modality, [Latent(zeros, grid)])
            found = encode(encoder, observation[None].to(parameter.device), grid)
        return cls(config, encoder, width, found.shape[-1])

    @property
    def encoder(self) -> Encoder:
        return self._unregistered[0]

    @property
    def term(self) -> str:
        return f"align/{self.config.modality}"

    def tap(self) -> Tap:
        return Tap(self.config.layer)

    def loss(
        self,
        tap: Tap,
        rows: PackedBatch,
        items: Mapping[str, Items],
        aligned: Aligned | None,
    ) -> dict[str, Tensor]:
        """Sum over the noisy positions of minus the cosine similarity; where there are none, 0 with
        gradients of 0."""
        if aligned is None:
            return {self.term: nothing(self.parameters())}
        m = self.config.modality
        x_MW = tap.features(m, rows).index_select(0, aligned.at_M)
        projected_MF = wide(self.projection(x_MW))
        target_MF = self._target(items[m], aligned).to(projected_MF)
        return {self.term: -F.cosine_similarity(projected_MF, target_MF, dim=-1).sum()}

    @torch.no_grad()
    def _target(self, items: Items, aligned: Aligned) -> Tensor:
        """The encoder's features at the noisy positions."""
        assert items.observations is not None
        picked = aligned.picked_B.split([count for count, _ in aligned.runs])
        parts = [
            encode(self.encoder, group.index_select(0, of), grid).flatten(0, 1)
            for group, of, (count, grid) in zip(
                items.observations.groups(), picked, aligned.runs, strict=True
            )
            if count
        ]
        return torch.cat(parts).index_select(0, aligned.source_M)


def make_encoder(config: AlignmentConfig, make: Callable[..., Any]) -> Encoder:
    """The encoder of the configuration; a module among them is frozen, and stays in evaluation."""
    try:
        signature(make).bind(**config.options)
    except TypeError as error:
        raise ValueError(f"alignment.options do not fit {config.encoder}: {error}") from None
    encoder: Any = make(**config.options)
    if not callable(encoder):
        raise ValueError(
            f"{config.encoder} should give a callable from observations to features, found"
            f" {type(encoder).__name__}"
        )
    return encoder.requires_grad_(False).eval() if isinstance(encoder, nn.Module) else encoder


def encode(encoder: Encoder, observations: Tensor, grid: tuple[int, ...]) -> Tensor:
    """The encoder's features [B, L, F] of observations of one shape, on this grid."""
    if isinstance(encoder, nn.Module):
        encoder.to(observations.device)
    found = list(encoder(list(observations)))
    if len(found) != len(observations):
        raise ValueError(
            f"the encoder gave {len(found)} tensors of features for {len(observations)}"
            " observations"
        )
    return on_grid(wide(torch.stack(found).to(observations.device)), grid)


def on_grid(features: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Features [B, ...] on a grid of their own, [*g, F] or flat, interpolated to `grid`:
    [B, L, F]."""
    own_BgF = with_grid(features, grid)
    if own_BgF.shape[1:-1] == grid:
        return own_BgF.flatten(1, -2)
    mode = INTERPOLATION[len(grid)]
    there = F.interpolate(own_BgF.movedim(-1, 1), size=grid, mode=mode)
    return there.flatten(2).transpose(1, 2)


def with_grid(features: Tensor, like: tuple[int, ...]) -> Tensor:
    """Flat features [B, l, F] as [B, *g, F], on a grid of the same shape as `like`, finer or
    coarser."""
    if features.ndim == len(like) + 2:
        return features
    if features.ndim == 3:
        finer = (features.shape[1] / math.prod(like)) ** (1 / len(like))
        own = [max(1, round(n * finer)) for n in like]
        if math.prod(own) == features.shape[1]:
            return features.unflatten(1, own)
    raise ValueError(
        f"the encoder gave features of shape {list(features.shape[1:])} for latents on a grid of"
        f" {' x '.join(map(str, like))}: they should be on a grid of {len(like)} axes, or flat on"
        " one of that shape, without class tokens"
    )
