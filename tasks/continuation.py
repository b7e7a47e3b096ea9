"""Continuation: text goes on, block after block. The text-only model is this task alone.

C   clean text; every block sees itself and what came before
N   its noisy twin; every block sees itself and the clean text before it

    C C C C N N N N
  C # # . . . . . .
  C # # . . . . . .
  C # # # # . . . .
  C # # # # . . . .
  N . . . . # # . .
  N . . . . # # . .
  N # # . . . . # #
  N # # . . . . # #
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from unified.sequence.layout import Layout, Segment
from unified.sequence.task import Task, TaskConfig
from unified.sequence.visibility import BEFORE, SAME, UP_TO
from unified.tasks.example import take


class ContinuationConfig(TaskConfig):
    #: name of the modality that is continued
    text: str = "text"
    #: field of the .json that holds the passage, in place of the example's text
    field: str | None = None
    #: latents per block
    block: int = Field(16, gt=0)
    #: longest passage in latents; a longer one is cut
    max_tokens: int = Field(128, gt=0)


class Continuation(Task):
    Config: ClassVar[type[TaskConfig]] = ContinuationConfig
    config: ContinuationConfig

    @property
    def layout(self) -> Layout:
        text, block = self.config.text, self.config.block
        return Layout(
            segments=(
                Segment("C", text, block=block, name="prompt"),
                Segment("N", text, noise="block", copies="C", block=block),
            ),
            sees={"C": {"C": UP_TO}, "N": {"C": BEFORE, "N": SAME}},
            unconditional_rate=self.config.unconditional_rate,
        )

    @property
    def generates(self) -> str:
        return "C"

    @property
    def continues(self) -> str:
        return "C"

    @property
    def limits(self) -> dict[str, int]:
        """Kind -> most latents of its item; a longer item is cut, not refused."""
        return {"C": self.config.max_tokens}

    def fill(self, example: Mapping[str, Any]) -> dict[str, Any]:
        return {"C": take(example, self.config.text, "continuation", self.config.field)}
