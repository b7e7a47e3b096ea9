"""Editing: an item and an instruction are given, a changed item of the same size is generated.

    S   source item      P   instruction      I   noisy target, one block, one timestep

S and P are fixed context, one clean block each, and see each other: how the source is read depends
on what is asked. I lies on the positions of S, cell on cell, so that what shall stay where it is
need only look straight down; timestep and visibility tell the two apart. (Two latents each:)

        S S P P I I
      S # # # # . .
      S # # # # . .
      P # # # # . .
      P # # # # . .
      I # # # # # #
      I # # # # # #
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from unified.sequence.layout import Layout, Segment
from unified.sequence.task import Task, TaskConfig
from unified.sequence.visibility import ALL
from unified.tasks.example import take


class EditingConfig(TaskConfig):
    #: name of the modality of the instruction
    text: str = "text"
    #: name of the modality that is edited
    edits: str = "image"
    #: name of the example's item that is edited: ``source`` is the member KEY.source.webp
    original: str = "source"
    #: field of the .json that holds the instruction, in place of the example's text
    instruction: str | None = None


class Editing(Task):
    Config: ClassVar[type[TaskConfig]] = EditingConfig
    config: EditingConfig

    @property
    def layout(self) -> Layout:
        edits, given = self.config.edits, {"S": ALL, "P": ALL}
        return Layout(
            segments=(
                Segment("S", edits, name="source"),
                Segment("P", self.config.text, name="prompt"),
                Segment("I", edits, noise="segment", name=edits, positions_of="S"),
            ),
            sees={"S": given, "P": given, "I": {**given, "I": ALL}},
            unconditional_rate=self.config.unconditional_rate,
        )

    @property
    def generates(self) -> str:
        return "I"

    def fill(self, example: Mapping[str, Any]) -> dict[str, Any]:
        source = f"{self.config.original}.{self.config.edits}"
        return {
            "S": take(example, source, "editing"),
            "P": take(example, self.config.text, "editing", self.config.instruction),
            "I": take(example, self.config.edits, "editing"),
        }
