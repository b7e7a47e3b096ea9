"""The prior: a block-causal MMDiT that predicts the velocity of every latent in a packed batch.

    latents of each modality --> in-projection --+
                                                 |  multi-stream blocks: weights per modality,
                                                 |  one joint attention under the visibility table
                                                 v
                                       single-stream blocks: the same block, one set of weights
                                                 |
    velocity of each modality <-- out-projection-+

A block is the official Cola DLM block: parameter-free LayerNorm and shift-and-scale before each
branch, a gate after it, per-head LayerNorm on queries and keys, partial rotary embedding,
GELU-tanh MLP. With one modality and no multi-stream blocks this is exactly the text-only model.
Timesteps repeat (one per block; all clean positions share t = 0), so modulation is computed once
per *distinct* timestep and looked up per position.

Shape legend: R rows, L positions of a row, A axes, N positions of one stream, C channels of a
modality, W width, H heads, D channels of a head, T distinct timesteps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unified.config.schema import PriorConfig
from unified.model.attention import Seen, attend, see
from unified.model.cache import KVCache, Room
from unified.model.kernels.linear import Linear, product_dtype
from unified.model.layers import (
    FeedForward,
    LayerNorm,
    TimestepEmbedding,
    add_gated,
    layer_norm,
    modulate,
    rotary_turns,
    rotate,
    wide,
)
from unified.sequence.packing import PackedBatch

#: name of the single stream that all modalities share
SHARED = "shared"

#: is told the number of a block, from 1, and the streams that the block gave
Watch = Callable[[int, Mapping[str, Tensor]], None]


def unwatched(number: int, streams: Mapping[str, Tensor]) -> None:
    """Watches nothing."""


class Timesteps:
    """Distinct timesteps `t_T`, and what modules make of their embeddings (after SiLU).

    Passes that share an instance, as the steps of a sampler do, compute their modulation once.
    """

    def __init__(self, prior: Prior, t_T: Tensor):
        self.t_T = t_T
        self._c_TW = F.silu(prior.timestep(self.t_T))
        self._made: dict[nn.Module, Tensor] = {}

    def index(self, times: Tensor) -> Tensor:
        """The place of each of `times` [...] among the distinct ones, which are sorted, flat; a
        single number if all of them are one, expanded."""
        if not any(times.stride()):
            times = times.flatten()[:1]
        return torch.searchsorted(self.t_T, times).flatten()

    def through(self, module: nn.Module) -> Tensor:
        """`module` of the embeddings [T, ...]; kept, unless a gradient is to pass."""
        if torch.is_grad_enabled():
            return module(self._c_TW)
        if module not in self._made:
            self._made[module] = module(self._c_TW)
        return self._made[module]


@dataclass(frozen=True)
class Geometry:
    """Where the positions of rows are and who sees whom: the same for any latents and timesteps.

    `where` says which of the R * L positions a stream holds; a stream that holds all of them, in
    their order, has a slice.
    """

    shape: tuple[int, int]
    where: Mapping[str, Tensor | slice]
    turns: Tensor
    seen: Seen


@dataclass(frozen=True)
class Context:
    """What every block of one forward pass shares.

    ``t[stream]`` [N] is the place of each position's timestep among the distinct ones, or [1]
    that of all of them.
    """

    geometry: Geometry
    t: Mapping[str, Tensor]
    times: Timesteps
    cache: KVCache | None


class Modulation(NamedTuple):
    """What the branches of one stream in one block are modulated by, per distinct timestep: a shift
    and a scale [T, 2W] before each, and a gate [T, W] after it."""

    attention_in: Tensor
    attention_out: Tensor
    mlp_in: Tensor
    mlp_out: Tensor


class Stream(nn.Module):
    """The weights with which one block treats one stream."""

    def __init__(self, config: PriorConfig):
        super().__init__()
        width, inner = config.width, config.heads * config.head_dim
        self.eps, self.heads = config.norm_eps, config.heads
        self.attention_in = Linear(width, 2 * width)
        self.attention_out = Linear(width, width)
        self.mlp_in = Linear(width, 2 * width)
        self.mlp_out = Linear(width, width)
        self.proj_qkv = Linear(width, 3 * inner, bias=config.qk_bias)
        self.norm_q = LayerNorm(config.head_dim, eps=config.norm_eps)
        self.norm_k = LayerNorm(config.head_dim, eps=config.norm_eps)
        self.proj_out = Linear(inner, width, bias=config.qk_bias)
        self.mlp = FeedForward(width, config.mlp_ratio)

    def modulation(self, times: Timesteps) -> Modulation:
        parts = (self.attention_in, self.attention_out, self.mlp_in, self.mlp_out)
        return Modulation(*(times.through(part) for part in parts))

    def qkv(self, x_NW: Tensor, by: Modulation, t_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised queries and keys, and values, each [N, H, D]."""
        y_NW = modulate(layer_norm(x_NW, self.eps), by.attention_in, t_N)
        q, k, v = self.proj_qkv(y_NW).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        return self.norm_q(q), self.norm_k(k), v

    def finish(self, x_NW: Tensor, out_NHD: Tensor, by: Modulation, t_N: Tensor) -> Tensor:
        """Add the gated attention branch, then the gated MLP branch."""
        x_NW = add_gated(x_NW, self.proj_out(out_NHD.flatten(-2)), by.attention_out, t_N)
        y_NW = modulate(layer_norm(x_NW, self.eps), by.mlp_in, t_N)
        return add_gated(x_NW, self.mlp(y_NW), by.mlp_out, t_N)


class Block(nn.Module):
    """One block over one or more streams, which meet in a joint attention."""

    def __init__(self, config: PriorConfig, streams: list[str], layer: int):
        super().__init__()
        self.layer, self.head = layer, (config.heads, config.head_dim)
        self.streams = nn.ModuleDict({name: Stream(config) for name in streams})

    def forward(self, x: dict[str, Tensor], context: Context) -> dict[str, Tensor]:
        by = {m: self.streams[m].modulation(context.times) for m in x}  # type: ignore[operator]
        at, room, some = context.geometry, None, next(iter(x.values()))
        if context.cache is not None:
            shape = (*at.shape, *self.head)
            room = context.cache.room(self.layer, shape, product_dtype(some), some.device)
        return self.mix(x, by, context.t, at, room)

    def mix(
        self,
        x: dict[str, Tensor],
        by: dict[str, Modulation],
        t: Mapping[str, Tensor],
        at: Geometry,
        room: Room | None,
    ) -> dict[str, Tensor]:
        """The streams [N, W] through attention and MLP; the same graph for every block."""
        parts = {m: self.streams[m].qkv(x[m], by[m], t[m]) for m in x}  # type: ignore[operator]
        q, k, v = (gather_rows({m: p[i] for m, p in parts.items()}, at) for i in range(3))
        q, k = rotate(q, at.turns), rotate(k, at.turns)
        if room is not None:
            k, v = room.take(k, v)
        out = attend(q, k, v, at.seen).flatten(0, 1)
        return {
            m: self.streams[m].finish(x[m], out[at.where[m]], by[m], t[m])  # type: ignore[operator]
            for m in x
        }


class Head(nn.Module):
    """The out-projection of one modality: affine LayerNorm, modulation, Linear to C channels."""

    def __init__(self, config: PriorConfig, channels: int):
        super().__init__()
        self.norm = LayerNorm(config.width, eps=config.norm_eps)
        self.modulation = Linear(config.width, 2 * config.width)
        self.proj = Linear(config.width, channels)

    def forward(self, x_NW: Tensor, times: Timesteps, t_N: Tensor) -> Tensor:
        return self.proj(modulate(self.norm(x_NW), times.through(self.modulation), t_N))


class Prior(nn.Module):
    """The block-causal MMDiT. `channels` maps each modality to the width of its latents."""

    def __init__(self, config: PriorConfig, channels: Mapping[str, int]):
        super().__init__()
        if config.rope_dim % 2 or config.head_dim % 2 or config.rope_dim > config.head_dim:
            raise ValueError(
                "prior.rope_dim must be even and at most head_dim, which is even too; found"
                f" rope_dim {config.rope_dim} and head_dim {config.head_dim}"
            )
        self.config, self.channels = config, dict(channels)
        #: keep only what goes into each block for the backward pass: less memory, more work
        self.recompute = False
        #: the backend of `unified.model.attention`
        self.attention = "sdpa"
        #: rows and caches of generation are to have few different shapes: `compile` was called
        self.static = False
        self.project_in = nn.ModuleDict({m: Linear(c, config.width) for m, c in channels.items()})
        self.timestep = TimestepEmbedding(config.width)
        depth = config.multi_stream_depth + config.single_stream_depth
        self.blocks = nn.ModuleList(
            Block(config, list(channels) if i < config.multi_stream_depth else [SHARED], i)
            for i in range(depth)
        )
        self.project_out = nn.ModuleDict({m: Head(config, c) for m, c in channels.items()})
        self.initialise()

    def initialise(self) -> None:
        """AdaLN-zero: every block starts as the identity, the velocity as 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for stream in (m for m in self.modules() if isinstance(m, Stream)):
            for gate in (stream.attention_in, stream.attention_out, stream.mlp_in, stream.mlp_out):
                nn.init.zeros_(gate.weight)
        for head in (m for m in self.modules() if isinstance(m, Head)):
            nn.init.zeros_(head.modulation.weight)
            nn.init.zeros_(head.proj.weight)

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile the blocks (regional compilation: they share their graphs), as `torch.compile`
        with these options does."""
        for block in self.blocks:
            eager = MethodType(Block.mix, block)  # not what an earlier call has made of it
            block.mix = torch.compile(eager, *args, **options)  # type: ignore[assignment]
        self.static = True

    def forward(
        self,
        batch: PackedBatch,
        cache: KVCache | None = None,
        times: Timesteps | None = None,
        geometry: Geometry | None = None,
        watch: Watch = unwatched,
    ) -> dict[str, Tensor]:
        """Velocity [N, C] of every latent, per modality; nothing is committed to `cache`.

        For several passes, `times` may hold the batch's timesteps, and others, and `geometry` what
        `self.geometry` gave for it. `watch` sees the features between the blocks: streams [N, W],
        or ``SHARED`` [R * L, W].
        """
        x, context = self._run(batch, cache, times, geometry, watch)
        return {
            m: self.project_out[m](x[context.geometry.where[m]], context.times, context.t[m])
            for m in batch.latents
        }

    def geometry(self, batch: PackedBatch, cache: KVCache | None = None) -> Geometry:
        """Where the positions of `batch` are, behind what is committed to `cache`."""
        keys = cache.keys(batch.coordinates) if cache is not None else batch.coordinates
        turns = rotary_turns(batch.pos_RLA, self.config.rope_dim, self.config.head_dim)
        weight = self.timestep.proj_in.weight
        return Geometry(
            shape=batch.shape,
            where={m: slice(None) if m == batch.alone else w for m, w in batch.where.items()},
            turns=wide(turns.to(weight.dtype)),
            seen=Seen()
            if batch.open and cache is None
            else see(batch.rules, batch.coordinates, keys, self.attention, product_dtype(weight)),
        )

    def commit(self, batch: PackedBatch, cache: KVCache, times: Timesteps | None = None) -> None:
        """Write the (clean) latents of `batch` into `cache`."""
        self._run(batch, cache, times)
        cache.commit(batch.coordinates)

    def _run(
        self,
        batch: PackedBatch,
        cache: KVCache | None,
        times: Timesteps | None = None,
        geometry: Geometry | None = None,
        watch: Watch = unwatched,
    ) -> tuple[Tensor, Context]:
        """All blocks: features [R * L, W] and the context they were computed in."""
        at = geometry or self.geometry(batch, cache)
        times, index = self._timesteps(batch, times)
        context = Context(
            at,
            {m: index if index.numel() == 1 else index[at.where[m]] for m in batch.latents},
            times,
            cache,
        )
        x = {m: wide(self.project_in[m](z)) for m, z in batch.latents.items()}
        cut = self.config.multi_stream_depth
        for number, block in enumerate(self.blocks[:cut], 1):
            x = self._through(block, x, context)
            watch(number, x)
        x_NW = gather_rows(x, at).flatten(0, 1)
        whole = replace(at, where={SHARED: slice(None)})
        single = replace(context, geometry=whole, t={SHARED: index})
        for number, block in enumerate(self.blocks[cut:], cut + 1):
            x_NW = self._through(block, {SHARED: x_NW}, single)[SHARED]
            watch(number, {SHARED: x_NW})
        return x_NW, context

    def _timesteps(self, batch: PackedBatch, times: Timesteps | None) -> tuple[Timesteps, Tensor]:
        """The distinct timesteps, and the place of each position's among them, flat."""
        if times is None and batch.timesteps is not None:
            t_T, index_RL = batch.timesteps
            return Timesteps(self, t_T), index_RL.flatten()
        times = times or Timesteps(self, batch.time_RL.unique())
        return times, times.index(batch.time_RL)

    def _through(
        self, block: nn.Module, x: dict[str, Tensor], context: Context
    ) -> dict[str, Tensor]:
        """One block; with `recompute`, its inside is computed again in the backward pass."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(block, x, context, use_reentrant=False)
        return block(x, context)


def gather_rows(parts: Mapping[str, Tensor], at: Geometry) -> Tensor:
    """Streams [N, ...] put to their places in rows [R, L, ...]; padding is 0."""
    first, *others = parts.values()
    if not others and all(isinstance(at.where[m], slice) for m in parts):
        return first.unflatten(0, at.shape)
    out = first.new_zeros(at.shape[0] * at.shape[1], *first.shape[1:])
    for m, x in parts.items():
        out[at.where[m]] = x
    return out.unflatten(0, at.shape)
