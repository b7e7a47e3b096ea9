"""The text VAE: token ids to a Gaussian per patch of tokens, and latents to logits.

    encoder   ids -> wte -> patch embedder -> blocks -> final layer -> (mean, logvar)
    decoder   z -> in layer -> blocks -> unpatch layer -> final norm -> final layer -> logits

State-dict names and layouts are those of the official checkpoints (Cola-DLM, Apache-2.0), so
their weights load as they are. The embedding has one row more than there are tokens: the mask
token of the BERT-style loss (paper eq. 3.16).

Shape legend: B batch, T tokens (L times patch_size), L latents, C latent channels, D width,
P patch_size, V vocab_size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unified.modalities.text.transformer import Blocks, TextKVCache
from unified.modalities.text.vae_config import TextVAEConfig
from unified.model.kernels.linear import Linear
from unified.model.layers import wide

LOGVAR_RANGE = (-30.0, 20.0)


class Encoder(nn.Module):
    def __init__(self, config: TextVAEConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size + 1, config.dim)
        self.patch_embedder = nn.Conv1d(
            config.dim, config.dim, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.blocks = Blocks(config, config.encoder_num_blocks)
        self.final_layer = Linear(config.dim, 2 * config.latent_dim, bias=config.bias)

    def forward(self, ids_BT: Tensor, lengths_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and log variance [B, L, C] of ids that are padded on the right.

        `lengths_B` counts each sample's real latents. ``block_size`` 1 never looks right, and
        does not need it.
        """
        x_BLD = self.patch_embedder(self.wte(ids_BT).transpose(1, 2)).transpose(1, 2).contiguous()
        out_BLE = wide(self.final_layer(self.blocks(x_BLD, lengths_B)))
        mean_BLC, logvar_BLC = out_BLE.chunk(2, dim=-1)
        if self.config.encoder_last_ln:
            mean_BLC = F.layer_norm(mean_BLC, mean_BLC.shape[-1:], eps=self.config.layer_norm_eps)
        return mean_BLC, logvar_BLC.clamp(*LOGVAR_RANGE)


class Decoder(nn.Module):
    def __init__(self, config: TextVAEConfig):
        super().__init__()
        self.config = config
        self.in_layer = Linear(config.latent_dim, config.dim, bias=config.bias)
        self.blocks = Blocks(config, config.decoder_num_blocks)
        self.unpatch_layer = Linear(config.dim, config.patch_size * config.dim)
        self.final_norm = nn.LayerNorm(config.dim, eps=config.layer_norm_eps)
        self.final_layer = Linear(config.dim, config.vocab_size, bias=config.bias)

    def forward(
        self, z_BLC: Tensor, cache: TextKVCache | None = None, lengths_B: Tensor | None = None
    ) -> Tensor:
        """Logits [B, T, V] of latents that are padded on the right.

        With a `cache`, `z_BLC` continues the latents that it holds, sample by sample, and is added
        to it; that equals decoding all of them at once, if cut at multiples of ``block_size``.
        `lengths_B` counts each sample's real new latents (None: all of them).
        """
        x_BLD = self.blocks(self.in_layer(z_BLC), lengths_B, cache)
        x_BLDP = self.unpatch_layer(x_BLD).unflatten(-1, (self.config.dim, -1))
        x_BTD = x_BLDP.transpose(2, 3).flatten(1, 2)
        return self.final_layer(self.final_norm(x_BTD))


class TextVAE(nn.Module):
    """Encoder and decoder, with freshly drawn weights."""

    def __init__(self, config: TextVAEConfig):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.apply(initialise)


@torch.no_grad()
def initialise(module: nn.Module) -> None:
    """Weights from N(0, 0.02), cut at three sigma; biases 0. Norms keep gain 1 and bias 0."""
    if isinstance(module, nn.Linear | nn.Conv1d | nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=0.02, a=-0.06, b=0.06)
    if isinstance(module, nn.Linear | nn.Conv1d) and module.bias is not None:
        nn.init.zeros_(module.bias)
