"""Sizes of the text VAE. Names and defaults are the official model's, but for `block_size`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from unified.latents.modality import PluginConfig


class TextVAEConfig(PluginConfig):
    """What fixes the network's parameters and its forward pass."""

    #: rows of the embedding, without the mask token's; the tokenizer may have fewer tokens
    vocab_size: int = Field(100278, gt=0)
    dim: int = Field(1536, gt=0)
    ffn_dim: int = Field(6144, gt=0)
    encoder_num_blocks: int = Field(4, ge=0)
    decoder_num_blocks: int = Field(4, ge=0)
    num_heads: int = Field(12, gt=0)
    latent_dim: int = Field(16, gt=0)
    #: tokens per latent
    patch_size: int = Field(1, gt=0)
    #: how a prompt that ends inside a latent is filled up: by unknown tokens before its beginning,
    #: which training then shows in every number, or by pads after its end, as the official code
    boundary: Literal["lead", "right"] = "lead"
    #: latents that see each other both ways; 1 is strictly causal (the official files store theirs)
    block_size: int = Field(1, gt=0)
    act: Literal["swiglu", "gelu", "silu"] = "swiglu"
    post_norm: bool = True
    #: LayerNorm without parameters on the posterior mean, which gives latents unit scale
    encoder_last_ln: bool = True
    qk_norm: bool = True
    qk_bias: bool = False
    bias: bool = True
    rope_theta: float = Field(500000.0, gt=0)
    layer_norm_eps: float = Field(1e-6, gt=0)
    #: latents leave the encoder as ``(mean - shifting_factor) * scaling_factor``; the decoder is
    #: trained on, and fed with, exactly those
    scaling_factor: float = Field(1.0, gt=0)
    shifting_factor: float = 0.0

    @model_validator(mode="after")
    def _fits(self) -> TextVAEConfig:
        if self.dim % (2 * self.num_heads):
            raise ValueError(
                f"dim {self.dim} must be num_heads {self.num_heads} times an even number"
            )
        if self.act == "swiglu" and self.ffn_dim % 2:
            raise ValueError(f"ffn_dim {self.ffn_dim} must be even: swiglu splits it in two")
        return self
