"""Alignment of the prior's features with those of a frozen encoder (REPA, arXiv 2410.06940).

    features of the prior after some block, at noisy positions --> three-layer MLP --+
                                                                                     |  - cosine
    observation, without noise --> frozen encoder --> interpolated to the latents' grid --+

An encoder is any callable from a list of observations (for images uint8 [3, H, W], of any sizes) to
one tensor of features each: on a grid of its own, ``[h, w, F]``, or flat, ``[h * w, F]``, where the
grid has the shape of the latents' grid, finer or coarser. It is a part of no checkpoint.

Shape legend: N positions of one modality over the whole batch, L latents of one item, W width of
the prior, F width of the encoder's features, ``g`` any number of grid axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unified.config.registry import trusted
from unified.config.schema import AlignmentConfig
from unified.data.streams import Prepared
from unified.flow.matching import Draws
from unified.latents.modality import Latent, Modality
from unified.model.layers import wide
from unified.model.prior import SHARED
from unified.sequence.packing import PackedBatch

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
        cls, config: AlignmentConfig, modality: Modality, width: int, trust_remote_code: bool
    ) -> Alignment:
        """For a prior of this `width`. What the modality makes of zeros tells F.

        ValueError for an encoder that is not trusted, not found, or gives no such features.
        """
        encoder = make_encoder(config, trust_remote_code)
        grid = modality.grid_for(None)
        zeros = torch.zeros(math.prod(grid), modality.channels)
        parameter = next(modality.parameters())
        with torch.no_grad():
            (observation,) = modality.decode([Latent(zeros.to(parameter), grid)])
            (found_gF,) = encode(encoder, [observation], [grid], parameter.device)
        return cls(config, encoder, width, found_gF.shape[-1])

    @property
    def encoder(self) -> Encoder:
        return self._unregistered[0]

    @property
    def term(self) -> str:
        return f"align/{self.config.modality}"

    def tap(self) -> Tap:
        return Tap(self.config.layer)

    def counts(self, draws: Mapping[str, Draws]) -> dict[str, float]:
        """The number of noisy positions, where there are any."""
        m = self.config.modality
        count = float(draws[m].noisy_N.sum()) if m in draws else 0.0
        return {self.term: count} if count else {}

    def loss(
        self,
        tap: Tap,
        batch: PackedBatch,
        draws: Mapping[str, Draws],
        examples: Sequence[Prepared],
        grids: Sequence[Mapping[str, tuple[int, ...]]],
    ) -> dict[str, Tensor]:
        """Sum over the noisy positions (one at least) of minus the cosine similarity. `grids` is by
        example and kind; ValueError for observations that are no longer there to be encoded."""
        noisy_N = draws[self.config.modality].noisy_N
        x_NW = tap.features(self.config.modality, batch)[noisy_N]
        projected_NF = wide(self.projection(x_NW))
        target_NF = self._target(batch, noisy_N, examples, grids).to(projected_NF)
        return {self.term: -F.cosine_similarity(projected_NF, target_NF, dim=-1).sum()}

    @torch.no_grad()
    def _target(
        self,
        batch: PackedBatch,
        noisy_N: Tensor,
        examples: Sequence[Prepared],
        grids: Sequence[Mapping[str, tuple[int, ...]]],
    ) -> Tensor:
        """The encoder's features at the noisy positions."""
        m = self.config.modality
        spans = [s for s in batch.spans if s.segment.modality == m and s.segment.noise != "clean"]
        places = [(s.sample, s.segment.copies or s.segment.kind) for s in spans]
        told = [examples[i].observations[kind] for i, kind in places]
        observed = [o for o in told if isinstance(o, Tensor)]
        if len(observed) < len(told):
            raise ValueError(
                f"alignment reads the observations of {m}, but this stage has only their latents:"
                " train it without stored latents, or without alignment"
            )
        found = encode(self.encoder, observed, [grids[i][k] for i, k in places], noisy_N.device)
        parts = [y_LF[noisy_N[s.start : s.stop]] for s, y_LF in zip(spans, found, strict=True)]
        return torch.cat(parts)


def make_encoder(config: AlignmentConfig, trust_remote_code: bool) -> Encoder:
    """The encoder of the configuration; a module among them is frozen, and stays in evaluation."""
    make = trusted("encoder", config.encoder, trust_remote_code)
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


def encode(
    encoder: Encoder,
    observations: Sequence[Tensor],
    grids: Sequence[tuple[int, ...]],
    device: torch.device,
) -> list[Tensor]:
    """The encoder's features of each observation, on these grids and flat [L, F]."""
    if isinstance(encoder, nn.Module):
        encoder.to(device)
    found = list(encoder([o.to(device) for o in observations]))
    if len(found) != len(observations):
        raise ValueError(
            f"the encoder gave {len(found)} tensors of features for {len(observations)}"
            " observations"
        )
    return [on_grid(wide(y.to(device)), grid) for y, grid in zip(found, grids, strict=True)]


def on_grid(features: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Features on a grid of their own, [*g, F] or flat, interpolated to `grid`: [L, F]."""
    own_gF = with_grid(features, grid)
    if own_gF.shape[:-1] == grid:
        return own_gF.flatten(0, -2)
    mode = INTERPOLATION[len(grid)]
    there = F.interpolate(own_gF.movedim(-1, 0)[None], size=grid, mode=mode)
    return there[0].flatten(1).T


def with_grid(features: Tensor, like: tuple[int, ...]) -> Tensor:
    """Flat features [l, F] as [*g, F], on a grid of the same shape as `like`, finer or coarser."""
    if features.ndim == len(like) + 1:
        return features
    if features.ndim == 2:
        finer = (len(features) / math.prod(like)) ** (1 / len(like))
        own = [max(1, round(n * finer)) for n in like]
        if math.prod(own) == len(features):
            return features.unflatten(0, own)
    raise ValueError(
        f"the encoder gave features of shape {list(features.shape)} for latents on a grid of"
        f" {' x '.join(map(str, like))}: they should be on a grid of {len(like)} axes, or flat on"
        " one of that shape, without class tokens"
    )
