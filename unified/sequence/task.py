"""What a task is: a layout of segments, and how an example fills it.

A task is data: its `layout` names segments, their modality and who sees whom; `fill` says which
item of an example goes into which segment. Nothing here runs a network.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor

from unified.latents.modality import Modality, PluginConfig
from unified.sequence.layout import Layout, Segment, noisy_kind
from unified.sequence.visibility import closure


class TaskConfig(PluginConfig):
    """What every task's configuration has."""

    #: relative frequency of this task among the examples of a joint stage
    ratio: float = 1.0
    #: the data source its examples come from, or several with their weights
    source: str | Annotated[dict[str, Annotated[float, Field(gt=0)]], Field(min_length=1)]
    #: share of noisy images and noisy text blocks relabelled U in training, for guidance
    unconditional_rate: float = 0.1

    @property
    def sources(self) -> dict[str, float]:
        """Source -> its share of this task's examples."""
        named = {self.source: 1.0} if isinstance(self.source, str) else self.source
        total = sum(named.values())
        return {name: weight / total for name, weight in named.items()}


class Task(ABC):
    """Base class of a task plugin (``tasks/NAME.py``)."""

    Config: ClassVar[type[TaskConfig]]

    def __init__(self, config: Any):
        self.config = config

    @property
    @abstractmethod
    def layout(self) -> Layout:
        """The segments and their table."""

    @cached_property
    def _layout(self) -> Layout:
        """`layout`, made once: every item of every example is observed by it."""
        return self.layout

    @property
    @abstractmethod
    def generates(self) -> str:
        """The kind that this task's generation realises, e.g. ``"C"`` or ``"I"``."""

    @property
    def limits(self) -> Mapping[str, int]:
        """Kind -> most latents of its item in training; a longer item is cut, not refused."""
        return {}

    @abstractmethod
    def fill(self, example: Mapping[str, Any]) -> dict[str, Any]:
        """Kind -> item, for every segment that is not a twin; `example` maps a modality's name
        (``image``), or an item's name and its modality's (``source.image``), to an item."""

    @property
    def continues(self) -> str | None:
        """The kind whose beginning may be given, if there is one."""
        return None

    @property
    def defaults(self) -> Mapping[str, Any]:
        """Kind -> item that a command or a page fills in where it is told none, e.g. the
        instruction of training."""
        return {}

    @property
    def given(self) -> tuple[Segment, ...]:
        """The segments that generation takes items for: those whose content can reach what is
        generated, and the beginning of what may be continued."""
        layout = self.layout
        noisy = noisy_kind(layout, self.generates)
        kinds = closure(layout.sees, noisy) - {noisy, self.generates} | {self.continues}
        return tuple(s for s in layout.filled if s.kind in kinds)

    def observe(
        self,
        modalities: Mapping[str, Modality],
        kind: str,
        item: Any,
        lead: int = 0,
        limit: int | None = None,
    ) -> Tensor:
        """The observation of `item` as segment `kind`, in training and in generation alike.

        A segment that generation must learn to end is closed, and one with blocks fills whole
        blocks. A `lead` is drawn in training, for what may be continued from any of the
        modality's ``leads`` phases. A `limit` of latents goes before that of `limits`.
        """
        segment = self._layout[kind]
        modality = modalities[segment.modality]
        ends = segment.block is not None or self._layout.is_target(segment)
        limit = self.limits.get(kind) if limit is None else limit
        phase = {"lead": lead} if lead else {}
        return modality.observe(item, block=segment.block, ends=ends, limit=limit, **phase)
