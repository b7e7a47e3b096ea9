"""The transformer block of the text VAE, and the rule of who sees whom.

*Block.* The reference model's post-norm is asymmetric: around attention the residual stream is
normalised, around the feed-forward the branch is,

    x <- LN(x) + Attention(x)        x <- x + LN(FFN(x))

and with pre-norm both branches read LN(x). Queries and keys are normalised over the full width,
all heads together, then rotated (half-split pairs, over the whole head).

*Visibility.* A query sees a key iff ``pos_q // block >= pos_k // block``: both ways within a block,
causal between blocks, strictly causal for blocks of one. Padding stands at position FAR, beyond
all others, so the same rule hides it from every real query, and no query sees nothing.

*Cache.* Keys and values are kept as they leave the projection, before norm and rotation.

Shape legend: B batch, L latents, S keys (cached and new; the queries are the last of them),
D width, H heads, h channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unified.modalities.text.vae_config import TextVAEConfig
from unified.model.attention import dot_product
from unified.model.kernels.linear import Linear

FAR = 1 << 24


class TextKVCache:
    """Keys and values of what one stack has read, by block, and their positions [B, S].

    Samples may differ in length: padding is kept in place, at position FAR.
    """

    def __init__(self) -> None:
        self.positions_BS: Tensor | None = None
        self.layers: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def place(self, new_BL: Tensor) -> Tensor:
        """Continue each sample's count by `new_BL`, counted from 0; returns all, [B, S]."""
        old_BS = self.positions_BS
        if old_BS is not None:
            seen_B1 = (old_BS != FAR).sum(1, keepdim=True)
            new_BL = torch.cat([old_BS, torch.where(new_BL == FAR, FAR, new_BL + seen_B1)], 1)
        self.positions_BS = new_BL
        return new_BL

    def extend(self, layer: nn.Module, k_BLD: Tensor, v_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new keys and values of `layer`; returns all of them, [B, S, D] each."""
        if layer in self.layers:
            k_old, v_old = self.layers[layer]
            k_BLD, v_BLD = torch.cat([k_old, k_BLD], 1), torch.cat([v_old, v_BLD], 1)
        self.layers[layer] = k_BLD, v_BLD
        return k_BLD, v_BLD

    def keep_rows(self, rows: list[int]) -> None:
        """Drop all samples but these."""
        if self.positions_BS is not None:
            self.positions_BS = self.positions_BS[rows]
        self.layers = {layer: (k[rows], v[rows]) for layer, (k, v) in self.layers.items()}


def rotary_table(positions_BS: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Tensor:
    """cos and sin [2, B, 1, S, h/2] of ``pos * theta^(-2j/h)``, in `dtype`."""
    pair = torch.arange(0, head_dim, 2, device=positions_BS.device, dtype=dtype)
    angle = positions_BS[:, None, :, None].to(dtype) * theta ** (-pair / head_dim)
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x_BHSh: Tensor, table: Tensor) -> Tensor:
    """Turn channel pairs (j, j + h/2) by the angles of `table`, its last S where it has more."""
    cos, sin = table[..., -x_BHSh.shape[2] :, :]
    a, b = x_BHSh.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).type_as(x_BHSh)


class TransformerBlock(nn.Module):
    """One transformer block; parameter names are those of the official checkpoints."""

    def __init__(self, config: TextVAEConfig):
        super().__init__()
        self.config, dim, eps = config, config.dim, config.layer_norm_eps
        self.norm_attn = nn.LayerNorm(dim, eps=eps)
        self.qkv_proj = Linear(dim, 3 * dim, bias=config.qk_bias)
        if config.qk_norm:
            self.q_norm, self.k_norm = nn.LayerNorm(dim, eps=eps), nn.LayerNorm(dim, eps=eps)
        self.attn_out_proj = Linear(dim, dim, bias=config.bias)
        self.norm_ffn = nn.LayerNorm(dim, eps=eps)
        gated = config.act == "swiglu"
        self.ffn_proj = Linear(dim, config.ffn_dim, bias=config.bias)
        self.ffn_out = Linear(config.ffn_dim // (1 + gated), dim, bias=config.bias)

    def forward(
        self, x_BLD: Tensor, table: Tensor, mask: Tensor | None, cache: TextKVCache | None
    ) -> Tensor:
        if self.config.post_norm:
            x_BLD = self.norm_attn(x_BLD) + self._attend(x_BLD, table, mask, cache)
            return x_BLD + self.norm_ffn(self._feed_forward(x_BLD))
        x_BLD = x_BLD + self._attend(self.norm_attn(x_BLD), table, mask, cache)
        return x_BLD + self._feed_forward(self.norm_ffn(x_BLD))

    def _attend(
        self, x_BLD: Tensor, table: Tensor, mask: Tensor | None, cache: TextKVCache | None
    ) -> Tensor:
        q, k, v = self.qkv_proj(x_BLD).chunk(3, dim=-1)
        if cache is not None:
            k, v = cache.extend(self, k, v)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.unflatten(-1, (self.config.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        q, k = rotate(q, table), rotate(k, table)
        out = dot_product(q, k, v, mask, is_causal=mask is None)
        return self.attn_out_proj(out.transpose(1, 2).flatten(2))

    def _feed_forward(self, x_BLD: Tensor) -> Tensor:
        if self.config.act == "swiglu":
            value, gate = self.ffn_proj(x_BLD).chunk(2, dim=-1)
            return self.ffn_out(F.silu(gate) * value)
        return self.ffn_out(self.ffn_proj(x_BLD, self.config.act))


class Blocks(nn.ModuleList):
    """A stack of blocks, with what they share: positions, rotation and mask."""

    def __init__(self, config: TextVAEConfig, count: int):
        super().__init__(TransformerBlock(config) for _ in range(count))
        self.config = config

    def forward(
        self, x_BLD: Tensor, lengths_B: Tensor | None = None, cache: TextKVCache | None = None
    ) -> Tensor:
        """Transform `x_BLD`, of which sample b is real up to ``lengths_B[b]`` (None: all of it).

        With `cache`, `x_BLD` continues what it holds and is added to it.
        """
        batch, length, _ = x_BLD.shape
        plain = cache is None and self.config.block_size == 1  # no real query can see padding
        positions = torch.arange(length, device=x_BLD.device)[None]
        if not plain:
            positions = positions.expand(batch, -1)
            if lengths_B is not None:
                real_BL = positions < lengths_B.to(x_BLD.device)[:, None]
                positions = torch.where(real_BL, positions, FAR)
        if cache is not None:
            positions = cache.place(positions)
        head_dim, theta = self.config.dim // self.config.num_heads, self.config.rope_theta
        dtype = torch.promote_types(x_BLD.dtype, torch.float32)
        table = rotary_table(positions, head_dim, theta, dtype)
        mask = None if plain else self.mask(positions, length)
        for block in self:
            x_BLD = block(x_BLD, table, mask, cache)
        return x_BLD

    def mask(self, positions_BS: Tensor, length: int) -> Tensor:
        """Boolean [B, 1, L, S]: which of all keys the last `length` see."""
        block_BS = positions_BS // self.config.block_size
        return block_BS[:, None, -length:, None] >= block_BS[:, None, None, :]
