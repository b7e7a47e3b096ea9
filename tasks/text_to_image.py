"""Text to image: a caption is given, an item of another modality is painted.

    C   clean caption      I   noisy image, one block, one timestep      N   noisy twin of C

I is the primary target and N an auxiliary one, of weight `caption_weight`. The two do not see
each other: they are coupled through the clean caption and the shared weights. (Blocks of 2:)

        C C C C I I N N N N
      C # # . . . . . . . .
      C # # . . . . . . . .
      C # # # # . . . . . .
      C # # # # . . . . . .
      I # # # # # # . . . .
      I # # # # # # . . . .
      N . . . . . . # # . .
      N . . . . . . # # . .
      N # # . . . . . . # #
      N # # . . . . . . # #
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from unified.sequence.layout import Layout, Segment
from unified.sequence.task import Task, TaskConfig
from unified.sequence.visibility import ALL, BEFORE, SAME, UP_TO
from unified.tasks.example import take


class TextToImageConfig(TaskConfig):
    #: name of the modality of the caption
    text: str = "text"
    #: name of the modality that is painted
    paints: str = "image"
    #: field of the .json that holds the caption, in place of the example's text
    caption: str | None = None
    #: latents per block of the caption
    block: int = Field(16, gt=0)
    #: weight of the auxiliary caption loss; the image's is 1
    caption_weight: float = Field(0.2, ge=0)


class TextToImage(Task):
    Config: ClassVar[type[TaskConfig]] = TextToImageConfig
    config: TextToImageConfig

    @property
    def layout(self) -> Layout:
        text, block, weight = self.config.text, self.config.block, self.config.caption_weight
        return Layout(
            segments=(
                Segment("C", text, block=block, name="prompt"),
                Segment("I", self.config.paints, noise="segment", name=self.config.paints),
                Segment("N", text, noise="block", copies="C", block=block, weight=weight),
            ),
            sees={
                "C": {"C": UP_TO},
                "I": {"C": ALL, "I": ALL},
                "N": {"C": BEFORE, "N": SAME},
            },
            unconditional_rate=self.config.unconditional_rate,
        )

    @property
    def generates(self) -> str:
        return "I"

    def fill(self, example: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "C": take(example, self.config.text, "text_to_image", self.config.caption),
            "I": take(example, self.config.paints, "text_to_image"),
        }
