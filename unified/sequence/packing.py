"""The latent sequence: segments laid out by a task, samples packed into rows.

A `Layout` is a list of typed segments and the table of who sees whom. A `Sample` is a layout
filled with latents. `pack` puts many samples, of any tasks, into a few rows of equal length:

    row 0:  [ C C C C | I I I I | N N N N ][ P P | I I I I | C C | N N ] pad
             sample 0 (text_to_image)       sample 1 (captioning)

Three rules fix the integers of every position:

* *Blocks* are one clock per sample: a segment starts at the block after the last one so far, a
  segment without a block length is one block, and a twin has the blocks of what it copies.
* *Positions* are integers per axis. A segment starts at s, the first integer above all positions
  so far; text sits on the diagonal (s+i, s+i, s+i), an image at (s, s+y, s+x): a grid fills the
  last axes and is constant on the others. A twin has the positions of what it copies.
* *Latents* are stored per modality, since channel widths differ, in the order of the samples.

Shape legend: R rows, L positions of a row, A axes, N positions of one modality over the whole
batch (in sample order), C channels of that modality.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from unified.sequence.layout import Layout, Placed, Segment, needed, place
from unified.sequence.visibility import Coordinates, Visibility


@dataclass(frozen=True)
class Sample:
    """One example of one task, by the grid of each filled segment's latents.

    A segment without a grid is absent. The block clock and the positions begin at `clock` and
    `start`, so that generation can place a later part of a sample on its own.
    """

    task: str
    grids: Mapping[str, tuple[int, ...]]
    clock: int = 0
    start: int = 0


@dataclass(frozen=True)
class Span:
    """Where one segment of one sample lies: ``latents[modality][start:stop]``."""

    sample: int
    segment: Segment
    start: int
    stop: int
    #: index of each position's block within the segment [stop - start], for one draw per block
    block: Tensor
    #: which of the segment's latents are there; None is all
    kept: Tensor | None = None


@dataclass(frozen=True)
class PackedBatch:
    """Rows of latents, as the prior reads them.

    `coordinates` and `pos_RLA` say where each position stands; `time_RL` is its timestep in [0, 1]
    (0 is clean). `latents` holds [N, C] per modality and `where` the index of each into R * L.
    `spans` lists the segments of sample 0, 1, ... in the order of their layout, which is also the
    order of the latents.
    """

    visibility: Visibility
    coordinates: Coordinates
    pos_RLA: Tensor
    time_RL: Tensor
    where: dict[str, Tensor]
    spans: list[Span]
    latents: dict[str, Tensor] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        rows, length = self.time_RL.shape
        return rows, length

    def to(self, device: torch.device | str) -> PackedBatch:
        return replace(
            self,
            visibility=self.visibility.to(device),
            coordinates=self.coordinates.to(device),
            pos_RLA=self.pos_RLA.to(device),
            time_RL=self.time_RL.to(device),
            where={m: w.to(device) for m, w in self.where.items()},
            latents={m: z.to(device) for m, z in self.latents.items()},
        )

    def with_latents(self, values: Sequence[Mapping[str, Tensor]]) -> PackedBatch:
        """This batch holding ``values[sample][kind]`` [L, C]; a twin takes what it copies."""
        parts: dict[str, list[Tensor]] = {m: [] for m in self.where}
        for s in self.spans:
            z = values[s.sample][s.segment.copies or s.segment.kind]
            parts[s.segment.modality].append(z if s.kept is None else z[s.kept.to(z.device)])
        return replace(self, latents={m: torch.cat(p) for m, p in parts.items()})

    def with_streams(self, channels: Mapping[str, int]) -> PackedBatch:
        """This batch with a stream of no latents for each modality that it lacks, so that all
        weights take part in every step, on every process (with gradients of 0)."""
        like = next(iter(self.latents.values()), self.time_RL)
        nowhere = torch.zeros(0, dtype=torch.int64, device=like.device)
        return replace(
            self,
            where={m: self.where.get(m, nowhere) for m in channels},
            latents={m: self.latents.get(m, like.new_zeros(0, c)) for m, c in channels.items()},
        )

    @property
    def positions(self) -> tuple[float, float]:
        """Positions that hold a latent, and all positions of the rows."""
        return float(sum(map(len, self.where.values()))), float(self.time_RL.numel())


def pack(
    samples: Sequence[Sample],
    layouts: Mapping[str, Layout],
    visibility: Visibility,
    row_length: int | None,
    axes: int,
    training: bool = False,
) -> PackedBatch:
    """Lay samples out in as few rows of `row_length` as best-fit-decreasing finds.

    Without a `row_length`, sample i has row i to itself. Rows are cut to the longest one used.
    For `training`, clean blocks that no loss depends on are left out (`needed`). ValueError for a
    sample longer than a row.
    """
    placed = _place_all(samples, layouts, visibility, axes, training)
    lengths = [sum(len(p.blocks) for p in sample) for sample in placed]
    starts, rows, width = _arrange(lengths, row_length)
    at = _cat([start + torch.arange(n) for start, n in zip(starts, lengths, strict=True)])
    parts = [(i, p) for i, sample in enumerate(placed) for p in sample]

    def lay(values: list[Tensor], blank: int) -> Tensor:
        flat = _cat(values)
        laid = torch.full((rows * width, *flat.shape[1:]), blank)
        laid[at] = flat
        return laid.unflatten(0, (rows, width))

    tables, kinds = visibility.table_index, visibility.kind_index
    coordinates = Coordinates(
        sample=lay([torch.full_like(p.blocks, i) for i, p in parts], -1),
        table=lay([torch.full_like(p.blocks, tables[samples[i].task]) for i, p in parts], 0),
        kind=lay([torch.full_like(p.blocks, kinds[p.segment.kind]) for _, p in parts], 0),
        block=lay([p.blocks for _, p in parts], 0),
    )
    pos_RLA = lay([p.positions for _, p in parts] or [torch.zeros(0, axes, dtype=torch.int64)], 0)
    where, spans = _by_modality(parts, at)
    return PackedBatch(visibility, coordinates, pos_RLA, torch.zeros(rows, width), where, spans)


def _place_all(
    samples: Sequence[Sample],
    layouts: Mapping[str, Layout],
    visibility: Visibility,
    axes: int,
    training: bool,
) -> list[list[Placed]]:
    """The segments of every sample; those of one shape are placed once."""
    shapes = [(s.task, tuple(s.grids.items()), s.clock, s.start) for s in samples]
    placed: dict[Hashable, list[Placed]] = {}
    for shape, s in zip(shapes, samples, strict=True):
        if shape not in placed:
            parts = place(layouts[s.task], s.grids, axes, s.clock, s.start)
            placed[shape] = needed(parts, s.task, visibility) if training else parts
    return [placed[shape] for shape in shapes]


def _cat(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


def _by_modality(
    parts: Sequence[tuple[int, Placed]], at: Tensor
) -> tuple[dict[str, Tensor], list[Span]]:
    """Each modality's places in the flattened rows [N], and all spans, in the order of samples."""
    where: dict[str, list[Tensor]] = {}
    spans: list[Span] = []
    taken: dict[str, int] = {}
    for (i, p), here in zip(parts, at.split([len(p.blocks) for _, p in parts]), strict=True):
        m = p.segment.modality
        start = taken.get(m, 0)
        taken[m] = start + len(here)
        spans.append(Span(i, p.segment, start, taken[m], p.blocks - p.blocks[:1], p.kept))
        where.setdefault(m, []).append(here)
    return {m: torch.cat(w) for m, w in where.items()}, spans


def _arrange(lengths: Sequence[int], row_length: int | None) -> tuple[list[int], int, int]:
    """(start of each sample in the flattened rows, number of rows, width of a row)."""
    if row_length is not None:
        return _best_fit(lengths, row_length)
    width = max(lengths, default=0)
    return [i * width for i in range(len(lengths))], len(lengths), width


def _best_fit(lengths: Sequence[int], row_length: int) -> tuple[list[int], int, int]:
    """The longest sample first, each into the fullest row that has room for it."""
    used: list[int] = []
    spot: dict[int, tuple[int, int]] = {}
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[i] > row_length:
            raise ValueError(
                f"a sample of {lengths[i]} latents does not fit a row of {row_length}:"
                " raise row_length, or shorten the text or the image"
            )
        fitting = [r for r, n in enumerate(used) if n + lengths[i] <= row_length]
        row = max(fitting, key=lambda r: used[r], default=len(used))
        if row == len(used):
            used.append(0)
        spot[i] = (row, used[row])
        used[row] += lengths[i]
    width = max(used, default=0)
    starts = [spot[i][0] * width + spot[i][1] for i in range(len(lengths))]
    return starts, len(used), width
