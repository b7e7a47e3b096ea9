"""What a critic is: a network that judges the items an autoencoder gives back, while it trains.

A stage names critics in ``loss.critics``, and a modality says which ones there are of its items
(`Modality.critics`). They belong to the stage: checkpoints hold them, pipelines do not.

As everywhere, terms are sums, and the counts they run over are known before the forward pass.
There is one loss and one backward pass, so a critic that learns to tell items from reconstructions
sees to it that each of its terms reaches the side it is meant for, and no other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from unified.latents.ragged import Ragged

if TYPE_CHECKING:
    from unified.latents.modality import PluginConfig


class Critic(nn.Module, ABC):
    """Base of a critic. `learns` says whether it trains beside the autoencoder; then its terms
    are measured with a moving scale, and are no part of ``val/loss``."""

    Config: ClassVar[type[PluginConfig]]
    learns: ClassVar[bool] = False

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    @property
    def start(self) -> int:
        """The step it joins in at."""
        return 0

    @abstractmethod
    def counts(self, observations: Ragged) -> dict[str, float]:
        """Term -> number of positions its sum runs over, without running a network."""

    @abstractmethod
    def forward(self, originals: Sequence[Tensor], decoded: Sequence[Tensor]) -> dict[str, Tensor]:
        """Term -> sum, of items as the network sees them and what the decoder makes of them: one
        tensor [b, ...] for the items of each shape."""

    @abstractmethod
    def weights(self) -> dict[str, float]:
        """The factor of each term."""
