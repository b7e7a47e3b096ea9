"""Streams: how an example becomes the observations of one training sample.

A joint stage has one stream per task, and an autoencoder stage one per source. A stream holds no
position: `Mixture` decides which example comes next.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from unified.data.examples import Example
from unified.modality import Modality
from unified.sequence import Segment
from unified.task import Task


@dataclass(frozen=True)
class Prepared:
    """The observations of one sample by kind; `slot` is its place in the global batch."""

    stream: str
    key: str
    slot: int
    observations: dict[str, Tensor]


class Stream(Protocol):
    """What `Mixture` and `fixed_examples` need of a stream."""

    name: str
    modalities: Mapping[str, Modality]

    def prepare(self, example: Example, generator: torch.Generator) -> dict[str, Tensor]:
        """Kind -> observation. A stream that augments draws from `generator` and nothing else.

        ValueError for an example that cannot be used.
        """


class TaskStream:
    """The samples of one task: its segments filled, each observed by its modality.

    With `row_length`, a sample with more latents (twins included) than a row holds is an error.
    """

    def __init__(
        self,
        name: str,
        task: Task,
        modalities: Mapping[str, Modality],
        row_length: int | None = None,
    ):
        self.name = name
        self.modalities = modalities
        self._task = task
        self._layout = task.layout
        self._row_length = row_length
        unknown = {s.modality for s in self._layout.segments} - set(modalities)
        if unknown:
            raise ValueError(
                f"task {name} needs the modality {', '.join(sorted(unknown))}; configured are"
                f" {', '.join(modalities)}"
            )

    def prepare(self, example: Example, generator: torch.Generator) -> dict[str, Tensor]:
        with example.naming():
            items = self._task.fill(example)
            observations = {
                s.kind: self._task.observe(
                    self.modalities, s.kind, items[s.kind], self._lead(s, generator)
                )
                for s in self._layout.filled
            }
            self._check_fits(observations)
        return observations

    def _lead(self, segment: Segment, generator: torch.Generator) -> int:
        """The phase of what may be continued: a prompt can end at any place within a latent."""
        if segment.kind != self._task.continues:
            return 0
        return draw_lead(self.modalities[segment.modality], generator)

    def _check_fits(self, observations: Mapping[str, Tensor]) -> None:
        lengths = {
            s.kind: math.prod(self.modalities[s.modality].grid(observations[s.copies or s.kind]))
            for s in self._layout.segments
        }
        total = sum(lengths.values())
        if self._row_length is not None and total > self._row_length:
            parts = " + ".join(f"{kind} {n}" for kind, n in lengths.items())
            raise ValueError(
                f"the sample has {total} latents ({parts}) and a row holds {self._row_length};"
                " shorten the item or raise row_length"
            )


def draw_lead(modality: Modality, generator: torch.Generator) -> int:
    """One of the modality's phases; nothing is drawn where there is only one."""
    return int(torch.randint(modality.leads, (), generator=generator)) if modality.leads > 1 else 0


class ItemStream:
    """The items of one modality, as its autoencoder trains on them: one observation, kind ``X``.

    Items are closed (``ends``), so that the autoencoder learns whatever marks an end. With `crop`,
    a longer item gives a random part of that many latents.
    """

    def __init__(
        self,
        name: str,
        modality: str,
        modalities: Mapping[str, Modality],
        crop: int | None = None,
    ):
        self._crop = crop
        self.name = name
        self.modalities = modalities
        self._modality = modality
        if modality not in modalities:
            raise ValueError(
                f"stream {name} asks for the modality {modality}; configured are"
                f" {', '.join(modalities)}"
            )

    def prepare(self, example: Example, generator: torch.Generator) -> dict[str, Tensor]:
        modality = self.modalities[self._modality]
        with example.naming():
            item = example[self._modality]
            if self._crop is None:
                lead = draw_lead(modality, generator)
                return {"X": modality.observe(item, ends=True, **({"lead": lead} if lead else {}))}
            whole = modality.observe(item, ends=True, limit=sys.maxsize)
            return {"X": modality.crop(whole, self._crop, generator)}
