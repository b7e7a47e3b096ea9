"""The FLOPs of the prior, by a formula.

The convention: what the mathematics needs, not what a kernel happens to compute.

* A linear layer costs 2 FLOPs per weight and position that it acts on: queries, keys and values,
  output, MLP, and the projections of each modality in and out. Norms, activations, rotary
  embedding, gates and biases are not counted, padding neither.
* Modulation, and the timestep's embedding, cost that once per *distinct* timestep.
* Attention costs two products per pair of positions that see each other, 4 H D FLOPs; a pair that
  the task's table hides costs nothing. (A dense kernel computes it nonetheless.)
* Training costs three times the forward pass, where gradients flow.

A GPU's share of its peak in these FLOPs is the model FLOPs utilisation (MFU). Recomputation under
activation checkpointing is no model FLOP: it lowers the MFU.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from unified.config.schema import PriorConfig
from unified.model.layers import SINUSOID_WIDTH
from unified.sequence.layout import Layout
from unified.sequence.packing import PackedBatch, Sample, pack
from unified.sequence.visibility import Coordinates, Visibility

#: forward and backward, relative to the forward pass alone
TRAINING = 3
#: outputs of a block's modulation, and of a head's, in widths: a shift and a scale for each branch
#: and a gate after it, and one shift and scale
BLOCK_MODULATION, HEAD_MODULATION = 6, 2


def prior_flops(
    config: PriorConfig,
    channels: Mapping[str, int],
    positions: Mapping[str, int],
    pairs: int,
    timesteps: int,
) -> int:
    """FLOPs of one forward pass of the prior.

    `positions` is how many there are of each modality (those of a cache do not count), `pairs` how
    many (query, key) pairs see each other (with those of a cache), `timesteps` how many distinct
    timesteps there are.
    """
    width, inner = config.width, config.heads * config.head_dim
    depth = config.multi_stream_depth + config.single_stream_depth
    block = 4 * width * inner + 2 * config.mlp_ratio * width**2
    streams = len(positions) * config.multi_stream_depth + config.single_stream_depth
    modulation = (BLOCK_MODULATION * streams + HEAD_MODULATION * len(positions)) * width**2
    embedding = SINUSOID_WIDTH * width + 2 * width**2
    projections = sum(2 * channels[m] * width * n for m, n in positions.items())
    weights = depth * block * sum(positions.values()) + projections
    return 2 * (weights + timesteps * (modulation + embedding)) + 4 * depth * inner * pairs


def batch_flops(config: PriorConfig, channels: Mapping[str, int], batch: PackedBatch) -> int:
    """FLOPs of one forward pass over `batch`: its visible pairs and distinct timesteps, exactly."""
    timesteps = batch.time_RL[batch.coordinates.sample >= 0].unique().numel()
    positions = {m: len(where) for m, where in batch.where.items()}
    return prior_flops(config, channels, positions, visible_pairs(batch), timesteps)


def layout_flops(
    config: PriorConfig,
    channels: Mapping[str, int],
    layout: Layout,
    grids: Mapping[str, tuple[int, ...]],
) -> int:
    """FLOPs of one forward pass over one example, whose filled segments have these grids (kind ->
    ``(length,)`` or ``(h, w)``), in training: every noise group has a timestep of its own."""
    visibility = Visibility({"": layout.sees})
    batch = pack([Sample("", grids)], {"": layout}, visibility, None, config.axes, training=True)
    positions = {m: len(where) for m, where in batch.where.items()}
    return prior_flops(config, channels, positions, visible_pairs(batch), timesteps(batch))


def timesteps(batch: PackedBatch) -> int:
    """Distinct timesteps that `batch` has in training: one per noise group, and 0 if there is
    anything clean."""
    clean = (batch.coordinates.sample >= 0) & (batch.group_RL == 0)
    return batch.groups.shape[1] + int(clean.any())


def visible_pairs(batch: PackedBatch) -> int:
    """How many (query, key) pairs of `batch` see each other, counted by block."""
    fields = ("sample", "table", "kind", "block")
    at, visibility = batch.coordinates.to("cpu"), batch.rules.to("cpu")
    rows = torch.stack([getattr(at, f) for f in fields])
    pairs = 0
    for row_4L in rows.unbind(1):
        groups_4G, size_G = row_4L.unique(dim=1, return_counts=True)
        seen_GG = visibility.dense(Coordinates(*(g[None] for g in groups_4G)))[0]
        pairs += int(size_G @ seen_GG.long() @ size_G)
    return pairs
