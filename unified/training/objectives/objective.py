"""What the training loop knows of an objective: it collates in a data worker, and then sums."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from unified.data.batches import Collate


class Objective(nn.Module, ABC):
    """What a stage minimises. Holds the modules of the stage, trained and frozen.

    A step is split in two. `collate` runs in a data worker, without any network: it makes a few
    tensors of the examples, and counts the positions of every loss term. `forward` runs where the
    networks are, draws all chance there (from counters keyed by seed, stage, step and item), and
    gives *sums* over positions. Because the counts are known first, the loop can add them up over
    accumulation steps and ranks before the first backward pass, and every split of a batch gives
    the same loss.
    """

    #: makes a batch of examples
    collate: Collate

    @abstractmethod
    def forward(self, batch: Any) -> dict[str, Tensor]:
        """Term -> sum over positions (float32, differentiable). `batch` is on the device."""

    @abstractmethod
    def weights(self, step: int) -> dict[str, float]:
        """The factor of every term that the objective can have in the total loss."""

    def for_validation(self) -> Objective:
        """What validation sums up, over the same modules: ``val/loss`` has to mean the same at
        every step, so nothing in it may change with the step but the weights."""
        return self

    @abstractmethod
    def groups(self) -> dict[str, list[nn.Parameter]]:
        """``main``: parameters at lr; ``vae``: parameters at ``lr * vae_lr_ratio`` (or none)."""


def nothing(parameters: Iterable[nn.Parameter]) -> Tensor:
    """0, with gradients of 0: what a process adds that has nothing of a kind, where others do."""
    learners = [p.sum() for p in parameters if p.requires_grad]
    return 0.0 * torch.stack(learners).sum() if learners else torch.zeros(())
