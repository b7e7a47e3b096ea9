"""The image codec: diffusers' `AutoencoderKL`, between pixels and cells of latents.

Two rearrangements, both optional, stand around the network. Neither has weights:

- `pixel_patch`: the network sees pixels in patches, p x p x 3 numbers as channels at 1/p of the
  resolution. It then has log2(p) levels less, the ones that cost most and learn least.
- `patch`: the network's latents are merged p x p into one cell of p * p times the channels. A codec
  that downsamples 8x into 16 channels becomes one of 16x and 64 channels, exactly.

Together a cell covers ``pixel_patch * 2 ** (levels - 1) * patch`` pixels each way.

Shape legend: B images, H height, W width, C channels of a cell, h and w the grid of cells.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn

from unified.latents.modality import PluginConfig
from unified.modalities.image.convolution import write_out

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

#: log-variance of a new network's posteriors: low enough that the noise does not drown the small
#: means of an untrained encoder
INITIAL_LOGVAR = -4.0


class NetworkConfig(PluginConfig):
    """A new `AutoencoderKL`. Each entry of `block_out_channels` is a level of half the size."""

    block_out_channels: tuple[int, ...] = Field((128, 128, 256, 512, 512), min_length=1)
    layers_per_block: int = Field(2, ge=1)
    norm_groups: int = Field(32, ge=1)
    #: one attention layer among all cells in the middle of encoder and decoder
    attention: bool = True
    pixel_patch: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _groups_divide(self) -> NetworkConfig:
        if wrong := [width for width in self.block_out_channels if width % self.norm_groups]:
            raise ValueError(
                f"block_out_channels must be multiples of norm_groups {self.norm_groups}, which"
                f" {wrong} are not"
            )
        return self


class Codec(nn.Module):
    """`AutoencoderKL` with both patchings: pixels in [-1, 1] to Gaussians of cells, and back."""

    def __init__(self, network: AutoencoderKL, patch: int) -> None:
        super().__init__()
        write_out(network)
        self.network = network
        self.patch = patch
        colours = network.config["in_channels"]
        self.pixel_patch = round((colours / 3) ** 0.5)
        if 3 * self.pixel_patch**2 != colours or network.config["out_channels"] != colours:
            raise ValueError(
                f"an image codec must read and write 3 colours (or 3 * p * p in patches), but this"
                f" one reads {colours} and writes {network.config['out_channels']} channels"
            )
        levels = len(network.config["block_out_channels"])
        #: pixels that a cell covers each way
        self.cell = self.pixel_patch * 2 ** (levels - 1) * patch

    @property
    def channels(self) -> int:
        """C, the width of a cell."""
        return int(self.network.config["latent_channels"]) * self.patch**2

    @property
    def dtype(self) -> torch.dtype:
        return next(self.network.parameters()).dtype

    def encode(self, x_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, each [B, C, h, w], of q(z | x) in the network's own scale."""
        patches = rearrange(
            x_B3HW, "B c (h p) (w q) -> B (c p q) h w", p=self.pixel_patch, q=self.pixel_patch
        )
        posterior = self.network.encode(patches).latent_dist
        return self._merge(posterior.mean), self._merge(posterior.logvar)

    def decode(self, z_BChw: Tensor) -> Tensor:
        """Pixels [B, 3, H, W], about within [-1, 1]."""
        z = rearrange(z_BChw, "B (c p q) h w -> B c (h p) (w q)", p=self.patch, q=self.patch)
        patches = self.network.decode(z).sample
        return rearrange(
            patches, "B (c p q) h w -> B c (h p) (w q)", p=self.pixel_patch, q=self.pixel_patch
        )

    def _merge(self, z: Tensor) -> Tensor:
        return rearrange(z, "B c (h p) (w q) -> B (c p q) h w", p=self.patch, q=self.patch)


def new_network(config: NetworkConfig, latent_channels: int) -> AutoencoderKL:
    """An `AutoencoderKL` with random weights."""
    from diffusers import AutoencoderKL

    colours, levels = 3 * config.pixel_patch**2, len(config.block_out_channels)
    network = AutoencoderKL(
        in_channels=colours,
        out_channels=colours,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        latent_channels=latent_channels,
        norm_num_groups=config.norm_groups,
        mid_block_add_attention=config.attention,
        scaling_factor=1.0,
    )
    nn.init.constant_(network.quant_conv.bias[latent_channels:], INITIAL_LOGVAR)
    return network


def load_network(folder: Path | str, subfolder: str = "") -> AutoencoderKL:
    """An `AutoencoderKL` from a local folder or a hub id; safetensors only.

    Raises `ValueError`, naming the tensors, unless file and network have exactly the same ones.
    """
    from diffusers import AutoencoderKL

    where = f"{folder}/{subfolder}" if subfolder else str(folder)
    try:
        network, info = AutoencoderKL.from_pretrained(
            folder, subfolder=subfolder or None, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{where} cannot be loaded as an AutoencoderKL: {error}") from error
    wrong: dict[str, Any] = {kind: names for kind, names in info.items() if names}
    if wrong:
        raise ValueError(f"the tensors in {where} are not those of its config.json: {wrong}")
    return network
