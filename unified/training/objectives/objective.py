"""What the training loop knows of an objective: it can plan, and then sum."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn


class Plan(Protocol):
    """What an objective drew for some examples: `counts` is term -> number of positions of the
    loss, `positions` how many hold a latent and how many there are, padding included."""

    @property
    def counts(self) -> Mapping[str, float]: ...

    @property
    def positions(self) -> tuple[float, float]: ...


class Objective(nn.Module, ABC):
    """What a stage minimises. Holds the modules of the stage, trained and frozen."""

    @abstractmethod
    def plan(self, examples: Sequence[Any], step: int) -> Plan:
        """Everything random about these examples at this step. Runs on the CPU, no network."""

    @abstractmethod
    def forward(self, plan: Any) -> dict[str, Tensor]:
        """Term -> sum over positions (float32, differentiable)."""

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
