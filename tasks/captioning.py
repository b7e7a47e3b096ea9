"""Captioning: an instruction and an observed item are given, text answers.

    P   instruction      I   observed item      C   clean answer      N   its noisy twin

P is a kind of its own so that neither it nor I can see the answer, while the encoding of I still
depends on what is asked. P and I are fixed context: one clean block each. (Blocks of 2:)

        P P I I C C C C N N N N
      P # # # # . . . . . . . .
      P # # # # . . . . . . . .
      I # # # # . . . . . . . .
      I # # # # . . . . . . . .
      C # # # # # # . . . . . .
      C # # # # # # . . . . . .
      C # # # # # # # # . . . .
      C # # # # # # # # . . . .
      N # # # # . . . . # # . .
      N # # # # . . . . # # . .
      N # # # # # # . . . . # #
      N # # # # # # . . . . # #
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from unified.sequence.layout import Layout, Segment
from unified.sequence.task import Task, TaskConfig
from unified.sequence.visibility import ALL, BEFORE, SAME, UP_TO
from unified.tasks.example import take


class CaptioningConfig(TaskConfig):
    #: name of the modality of the instruction and the answer
    text: str = "text"
    #: name of the modality that is described
    observes: str = "image"
    #: what is asked of every image
    instruction: str = "Describe the image."
    #: field of the .json that holds what is asked of this image, in place of `instruction`
    question: str | None = None
    #: field of the .json that holds the answer, in place of the example's text
    answer: str | None = None
    #: latents per block of the answer
    block: int = Field(16, gt=0)


class Captioning(Task):
    Config: ClassVar[type[TaskConfig]] = CaptioningConfig
    config: CaptioningConfig

    @property
    def layout(self) -> Layout:
        text, block = self.config.text, self.config.block
        given = {"P": ALL, "I": ALL}
        return Layout(
            segments=(
                Segment("P", text, name="prompt"),
                Segment("I", self.config.observes, name=self.config.observes),
                Segment("C", text, block=block, name="answer"),
                Segment("N", text, noise="block", copies="C", block=block),
            ),
            sees={
                "P": given,
                "I": given,
                "C": {**given, "C": UP_TO},
                "N": {**given, "C": BEFORE, "N": SAME},
            },
            unconditional_rate=self.config.unconditional_rate,
        )

    @property
    def generates(self) -> str:
        return "C"

    @property
    def defaults(self) -> dict[str, Any]:
        """The instruction, unless every example has a question of its own."""
        return {} if self.config.question else {"P": self.config.instruction}

    def fill(self, example: Mapping[str, Any]) -> dict[str, Any]:
        text, question = self.config.text, self.config.question
        told = question and take(example, text, "captioning", question)
        return {
            "P": self.config.instruction if told is None else told,
            "I": take(example, self.config.observes, "captioning"),
            "C": take(example, text, "captioning", self.config.answer),
        }
