"""A discriminator of patches (PatchGAN), and the hinge losses between it and the decoder.

The discriminator D gives every patch x of an image a number: above 0, it takes the patch for one of
an original. With decoded patches y,

    discriminator   E[max(0, 1 - D(x))] / 2 + E[max(0, 1 + D(y))] / 2
    adversarial     E[-D(y)]

The first teaches D and the second the autoencoder, in one backward pass: `discriminator` is taken
of y detached, and `adversarial` with D's parameters detached, so that gradients pass through D and
stop at y. Every image is judged by itself (GroupNorm, no statistics of the batch), so how a batch
is split changes nothing.

Source of the patches: Isola et al. 2017; of the hinge loss: Lim and Ye 2017.

Shape legend: B images, H height, W width, h and w the grid of patches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from unified.latents.critic import Critic
from unified.latents.modality import PluginConfig
from unified.latents.ragged import Ragged
from unified.model.layers import wide

#: channels of one group of GroupNorm
GROUP = 8
#: the deepest layers have at most this many times the channels of the first
WIDEST = 8


class AdversarialConfig(PluginConfig):
    """When it starts, what its terms weigh, and the discriminator's size."""

    #: the step it joins in at: a decoder should know what images look like by then
    start: int = Field(0, ge=0)
    #: weight of the decoder's term per patch, relative to the L1 error per colour value
    weight: float = Field(0.1, ge=0)
    #: weight of the discriminator's own term
    discriminator_weight: float = Field(1.0, gt=0)
    #: channels of the first layer
    width: int = Field(64, ge=GROUP, multiple_of=GROUP)
    #: layers that halve the resolution; there is one patch for each 2^layers x 2^layers pixels
    layers: int = Field(3, ge=1)


class Adversarial(Critic):
    """The discriminator of a stage, and both sides' terms."""

    Config = AdversarialConfig
    learns = True
    config: AdversarialConfig

    def __init__(self, config: AdversarialConfig) -> None:
        super().__init__(config)
        self.discriminator = discriminator(config.width, config.layers)

    @property
    def start(self) -> int:
        return self.config.start

    def counts(self, observations: Ragged) -> dict[str, float]:
        """Patches of the decoded images; patches of originals and of decoded images."""
        patches = float(sum(n * self._patches(*shape[1:]) for n, shape in observations.runs))
        return {"adversarial": patches, "discriminator": 2 * patches}

    def forward(self, originals: Sequence[Tensor], decoded: Sequence[Tensor]) -> dict[str, Tensor]:
        judged = [self._judge(x, y) for x, y in zip(originals, decoded, strict=True)]
        adversarial, own = (torch.stack(sums).sum() for sums in zip(*judged, strict=True))
        return {"adversarial": adversarial, "discriminator": own}

    def weights(self) -> dict[str, float]:
        return {
            "adversarial": self.config.weight,
            "discriminator": self.config.discriminator_weight,
        }

    def _judge(self, real_B3HW: Tensor, fake_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """The sums of both terms over pairs of images of one size."""
        held = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        deceived_B1hw = wide(functional_call(self.discriminator, held, (fake_B3HW,)))
        real_B1hw, fake_B1hw = wide(
            self.discriminator(torch.cat([real_B3HW, fake_B3HW.detach()]))
        ).chunk(2)
        own_B1hw = F.relu(1 - real_B1hw) + F.relu(1 + fake_B1hw)
        return -deceived_B1hw.sum(), own_B1hw.sum()

    def _patches(self, height: int, width: int) -> int:
        """h * w; ValueError for an image without a patch."""
        layers = self.config.layers
        patches = (height >> layers) * (width >> layers)
        if not patches:
            raise ValueError(
                f"an image of {width} x {height} pixels has no patch for a discriminator of"
                f" {layers} layers, which needs {2**layers} pixels each way; use fewer layers"
            )
        return patches


def discriminator(width: int, layers: int) -> nn.Sequential:
    """[B, 3, H, W] to [B, 1, h, w], h = H // 2^layers: `layers` convolutions of stride 2 and two of
    stride 1, twice as wide from one to the next."""
    widths = [width * min(2**depth, WIDEST) for depth in range(layers + 1)]
    parts: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
    for depth in range(1, layers + 1):
        kernel, stride = (4, 2) if depth < layers else (3, 1)
        before, after = widths[depth - 1 : depth + 1]
        parts += [
            nn.Conv2d(before, after, kernel, stride, 1),
            nn.GroupNorm(after // GROUP, after),
            nn.LeakyReLU(0.2),
        ]
    return nn.Sequential(*parts, nn.Conv2d(widths[-1], 1, 3, 1, 1))
