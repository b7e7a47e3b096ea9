"""What a task is: a layout of segments, and how an example fills it.

A task is data: its `layout` names segments, their modality and who sees whom; `fill` says which
item of an example goes into which segment. Nothing here runs a network.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from unified.modality import PluginConfig
from unified.sequence import Layout


class TaskConfig(PluginConfig):
    """What every task's configuration has."""

    #: relative frequency of this task among the examples of a joint stage
    ratio: float = 1.0
    #: name of the data source its examples come from
    source: str
    #: share of noisy images and noisy text blocks relabelled U in training, for guidance
    unconditional_rate: float = 0.1


class Task(ABC):
    """Base class of a task plugin (``tasks/NAME.py``)."""

    Config: ClassVar[type[TaskConfig]]

    def __init__(self, config: Any):
        self.config = config

    @property
    @abstractmethod
    def layout(self) -> Layout:
        """The segments and their table."""

    @property
    @abstractmethod
    def generates(self) -> str:
        """The kind that this task's generation realises, e.g. ``"C"`` or ``"I"``."""

    @abstractmethod
    def fill(self, example: Mapping[str, Any]) -> dict[str, Any]:
        """Kind -> item, for every segment that is not a twin. Keys of `example` are modality names."""
