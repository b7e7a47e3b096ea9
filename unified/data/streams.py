"""Streams: how an example becomes the observations of one training sample.

A joint stage has one stream per task, and an autoencoder stage one per source. A stream holds no
position: `Mixture` decides which example comes next.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import torch
from torch import Tensor

from unified.data.examples import Example
from unified.data.stored import LATENTS, fingerprint, from_bytes, phased
from unified.latents.modality import Modality, Observed, grid_of
from unified.latents.ragged import Posteriors
from unified.sequence.layout import needed, place
from unified.sequence.task import Task
from unified.sequence.visibility import Visibility


@dataclass(frozen=True)
class Prepared:
    """The observations of one sample by kind; `slot` is its place in the global batch, and
    `truncated` says that an item was cut to fit a row."""

    stream: str
    key: str
    slot: int
    observations: Mapping[str, Observed]
    truncated: bool = False


class Stream(Protocol):
    """What `Mixture` and `fixed_examples` need of a stream."""

    name: str
    modalities: Mapping[str, Modality]

    def prepare(
        self, example: Example, generator: torch.Generator
    ) -> tuple[Mapping[str, Observed], bool]:
        """Kind -> observation, and whether one was truncated. A stream that augments draws from
        `generator` and nothing else.

        ValueError for an example that cannot be used.
        """


class TaskStream:
    """The samples of one task: its segments filled, each observed by its modality.

    A sample with more latents than `row_length` (twins included, and without what no loss depends
    on) is an error, or with `too_long="truncate"` has the end of its longest text cut off, by
    whole blocks.
    """

    def __init__(
        self,
        name: str,
        task: Task,
        modalities: Mapping[str, Modality],
        row_length: int | None = None,
        too_long: Literal["error", "truncate"] = "error",
    ):
        self.name = name
        self._counted: dict[tuple[tuple[str, tuple[int, ...]], ...], dict[str, int]] = {}
        self.modalities = modalities
        self._task = task
        self._layout = task.layout
        self._row_length = row_length
        self._truncates = too_long == "truncate"
        unknown = {s.modality for s in self._layout.segments} - set(modalities)
        if unknown:
            raise ValueError(
                f"task {name} needs the modality {', '.join(sorted(unknown))}; configured are"
                f" {', '.join(modalities)}"
            )

    def prepare(
        self, example: Example, generator: torch.Generator
    ) -> tuple[Mapping[str, Observed], bool]:
        kind = self.continues
        lead = 0 if kind is None else draw_lead(self.modalities[self.kinds[kind]], generator)
        if LATENTS in example.raw.members:
            return self._stored(example, lead), False
        return self.observe(example, lead)

    @property
    def continues(self) -> str | None:
        """The kind that may begin at any phase: a prompt can end at any place within a latent."""
        return self._task.continues

    @property
    def phases(self) -> int:
        """How many there are."""
        kind = self.continues
        return 1 if kind is None else self.modalities[self.kinds[kind]].leads

    @cached_property
    def kinds(self) -> dict[str, str]:
        """Kind -> modality, of the segments that an example fills."""
        return {s.kind: s.modality for s in self._layout.filled}

    def observe(self, example: Example, lead: int = 0) -> tuple[dict[str, Tensor], bool]:
        """Kind -> observation, and whether one was truncated; what may be continued begins at the
        phase `lead`."""
        with example.naming():
            items = self._task.fill(example)
            leads = {kind: lead if kind == self.continues else 0 for kind in self.kinds}
            observations = {
                kind: self._task.observe(self.modalities, kind, items[kind], lead)
                for kind, lead in leads.items()
            }
            excess = self._excess(observations)
            if excess > 0 and self._truncates:
                kind, limit = self._shorter(observations, excess)
                observations[kind] = self._task.observe(
                    self.modalities, kind, items[kind], leads[kind], limit
                )
            if self._excess(observations) > 0:
                raise ValueError(self._too_long(observations))
        return observations, excess > 0

    def _stored(self, example: Example, lead: int) -> dict[str, Posteriors]:
        """The posteriors that the example brings along."""
        with example.naming():
            found = from_bytes(example.raw.members[LATENTS], self.encoders)
            names = {k: phased(k, lead if k == self.continues else 0) for k in self.kinds}
            missing = [name for name in names.values() if name not in found]
            if missing:
                raise ValueError(
                    f"task {self.name} needs the latents of {', '.join(missing)}, found"
                    f" {', '.join(sorted(found))}: they were stored for another task"
                )
            stored = {kind: found[name] for kind, name in names.items()}
            if self._excess(stored) > 0:
                raise ValueError(self._too_long(stored))
        return stored

    @cached_property
    def encoders(self) -> dict[str, str]:
        """Modality -> fingerprint of its autoencoder as it is when this is first asked for."""
        return {m: fingerprint(self.modalities[m]) for m in set(self.kinds.values())}

    def _lengths(self, observations: Mapping[str, Observed]) -> dict[str, int]:
        """Kind -> latents that a row has to hold, twins included."""
        grids = {k: self._grid(k, o) for k, o in observations.items()}
        shape = tuple(grids.items())
        if shape not in self._counted:
            placed = place(self._layout, grids, axes=max(map(len, grids.values())))
            kept, _ = needed(placed, "", self._visibility)
            self._counted[shape] = {p.segment.kind: len(p.blocks) for p in kept}
        return self._counted[shape]

    def _grid(self, kind: str, observed: Observed) -> tuple[int, ...]:
        return grid_of(self.modalities[self.kinds[kind]], observed)

    @cached_property
    def _visibility(self) -> Visibility:
        return Visibility({"": self._layout.sees})

    def _excess(self, observations: Mapping[str, Observed]) -> int:
        """By how many latents a sample exceeds a row."""
        if self._row_length is None:
            return 0
        return sum(self._lengths(observations).values()) - self._row_length

    def _shorter(self, observations: Mapping[str, Observed], excess: int) -> tuple[str, int]:
        """The longest segment with blocks, and the most latents that it may have: whole blocks,
        and less by the excess, which it shares with its twins."""
        lengths = {k: math.prod(self._grid(k, o)) for k, o in observations.items()}
        segments = [s for s in self._layout.filled if s.block is not None]
        if not segments:
            raise ValueError(self._too_long(observations))
        segment = max(segments, key=lambda s: lengths[s.kind])
        times = 1 + sum(s.copies == segment.kind for s in self._layout.segments)
        limit = (lengths[segment.kind] - math.ceil(excess / times)) // segment.block  # type: ignore[operator]
        if limit < 1:
            raise ValueError(self._too_long(observations))
        return segment.kind, limit * segment.block  # type: ignore[operator]

    def _too_long(self, observations: Mapping[str, Observed]) -> str:
        lengths = self._lengths(observations)
        parts = " + ".join(f"{kind} {n}" for kind, n in lengths.items())
        return (
            f"the sample has {sum(lengths.values())} latents ({parts}) and a row holds"
            f" {self._row_length}; shorten the item, raise row_length, or set too_long: truncate"
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

    def prepare(
        self, example: Example, generator: torch.Generator
    ) -> tuple[dict[str, Tensor], bool]:
        modality = self.modalities[self._modality]
        with example.naming():
            item = example[self._modality]
            if self._crop is None:
                phase = {"lead": lead} if (lead := draw_lead(modality, generator)) else {}
                return {"X": modality.observe(item, ends=True, **phase)}, False
            whole = modality.observe(item, ends=True, limit=sys.maxsize)
            return {"X": modality.crop(whole, self._crop, generator)}, False
