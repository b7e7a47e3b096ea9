"""The latent sequence: samples packed into rows.

A `Sample` is a layout filled with latents. `pack` puts many samples, of any tasks, into a few rows
of equal length:

    row 0:  [ C C C C | I I I I | N N N N ][ P P | I I I I | C C | N N ] pad
             sample 0 (text_to_image)       sample 1 (captioning)

All that is said of a position are integers, and they depend on the sample's shape alone. So a shape
is laid out once (a *template*), and packing a batch is a few operations on whole arrays, whatever
the batch size. Latents are not here yet: a batch says which latent of each modality every position
takes, and with what it is to be corrupted.

Shape legend: R rows, L positions of a row, A axes, N positions of one modality over the whole
batch (in sample order), M those of them that are noisy, G noise groups, C channels of a modality,
P positions of one sample, K columns.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from unified.latents.tensors import map_tensors
from unified.sequence.layout import Layout, Placed, modality_names, needed, place
from unified.sequence.visibility import Coordinates, Visibility

#: shapes of samples whose templates are kept
TEMPLATES = 8192
#: segments that a layout has at most: items are numbered ``SEGMENTS * slot + segment``
SEGMENTS = 256

#: columns of a template, before those of the positions: what stands at each position
MODALITY, KIND, BLOCK, ITEM, AT, SEGMENT, GROUP, NUMBER, WITHIN, BLOCKWISE = range(10)
COLUMNS = 10


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

    @property
    def shape(self) -> tuple[object, ...]:
        return self.task, tuple(self.grids.items()), self.clock, self.start


class NoisyPlaces(NamedTuple):
    """The noisy positions of one modality, [M] each: which of its N positions they are, whose
    chance they have (`item`) and where in that item (`place`), their noise group (from 1) and their
    place in it."""

    at: Tensor
    item: Tensor
    place: Tensor
    group: Tensor
    within: Tensor


class NoiseGroups(NamedTuple):
    """Noise groups [G]: a block of noisy text, or a whole noisy image. One timestep each.

    ``item`` and ``number`` (within its segment) say whose chance a group has, ``size`` how many
    positions it holds, ``modality`` the number of its modality, ``blockwise`` whether (1) it is a
    block of its segment or (0) all of it.
    """

    item: Tensor
    number: Tensor
    size: Tensor
    modality: Tensor
    blockwise: Tensor


@dataclass(frozen=True)
class PackedBatch:
    """Rows of latents, as the prior reads them.

    `coordinates` and `pos_RLA` say where each position stands. ``where[m]`` is the place of each of
    a modality's N positions among all R * L, ``take[m]`` which of its latents stands there (a twin
    takes what it copies), and ``latents[m]`` [N, C] the values, once there are any. `time_RL` is
    the timestep of each position in [0, 1] (0 is clean); where several share one, `timesteps` has
    the distinct ones [T] and the place of each position's among them [R, L].

    What is to be corrupted: ``noisy[m]`` [5, M] (see `NoisyPlaces`), `groups` [5, G] (see
    `NoiseGroups`) with `chances` [2, G] (the rate of relabelling as U, and the weight of the loss),
    and the group of every position `group_RL`, from 1; 0 is clean. `step_RL` is the same, but 0
    also where a part of a group stays clean.
    """

    coordinates: Coordinates
    pos_RLA: Tensor
    time_RL: Tensor
    where: dict[str, Tensor]
    take: dict[str, Tensor]
    noisy: dict[str, Tensor]
    groups: Tensor
    chances: Tensor
    group_RL: Tensor
    step_RL: Tensor
    #: whether every position sees all of its row, as far as packing knows
    open: bool = False
    #: the one modality whose latents are all positions, in their order
    alone: str | None = None
    latents: dict[str, Tensor] = field(default_factory=dict)
    timesteps: tuple[Tensor, Tensor] | None = None
    visibility: Visibility | None = None

    @property
    def shape(self) -> tuple[int, int]:
        rows, length = self.time_RL.shape
        return rows, length

    @property
    def rules(self) -> Visibility:
        """Who sees whom, once the batch is where the prior is."""
        assert self.visibility is not None, "a packed batch is read under a visibility: see `under`"
        return self.visibility

    def under(self, visibility: Visibility) -> PackedBatch:
        """This batch, read under `visibility`, which is on its device."""
        return replace(self, visibility=visibility)

    def to(self, device: torch.device | str) -> PackedBatch:
        moved = map_tensors(self, lambda t: t.to(device))
        return moved if self.visibility is None else moved.under(self.visibility.to(device))

    def with_latents(self, latents: Mapping[str, Tensor]) -> PackedBatch:
        """This batch holding these latents [*, C] of each modality, each where it belongs."""
        taken = {m: latents[m].index_select(0, take_N) for m, take_N in self.take.items()}
        return replace(self, latents=taken)

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


class Packer:
    """Packs samples of some layouts into rows of `row_length` (None: a row for each sample).

    For `training`, clean blocks that no loss depends on are left out (`needed`).
    """

    def __init__(
        self,
        layouts: Mapping[str, Layout],
        visibility: Visibility,
        axes: int,
        row_length: int | None = None,
        training: bool = False,
    ):
        self.layouts, self.axes, self.row_length = layouts, axes, row_length
        self.visibility, self.training = visibility, training
        self.names = modality_names(layouts)
        self._template = lru_cache(TEMPLATES)(self._lay_out)
        self._rules = {task: self._rules_of(layout) for task, layout in layouts.items()}

    def __call__(
        self,
        samples: Sequence[Sample],
        order: Mapping[str, Sequence[tuple[int, str]]] | None = None,
        slots: Sequence[int] | None = None,
    ) -> PackedBatch:
        """Lay samples out in as few rows as best-fit-decreasing finds.

        `order` says in which order a modality's latents come, as (sample, kind); by default, sample
        by sample. `slots` number the samples for chance. Rows are cut to the longest one used.
        ValueError for a sample longer than a row.
        """
        templates = [self._template(s.shape) for s in samples]
        lengths = [len(t.columns) for t in templates]
        starts, rows, width = _arrange(lengths, self.row_length)
        flat_PK = _joined([t.columns for t in templates], COLUMNS + self.axes)
        sample_P = np.repeat(np.arange(len(samples)), lengths)
        at_P = np.arange(len(flat_PK)) + np.repeat(np.array(starts) - _begins(lengths), lengths)
        slot_P = np.array(range(len(samples)) if slots is None else slots, np.int64)[sample_P]
        tables = self.visibility.table_index
        table_P = np.array([tables[s.task] for s in samples], np.int64)[sample_P]
        counts = [t.groups for t in templates]
        group_P = np.where(flat_PK[:, GROUP] > 0, flat_PK[:, GROUP] + _begins(counts)[sample_P], 0)

        def lay(flat_P: np.ndarray, blank: int = 0) -> Tensor:
            laid = np.full((rows * width, *flat_P.shape[1:]), blank, np.int64)
            laid[at_P] = flat_P
            return torch.from_numpy(laid.reshape(rows, width, *flat_P.shape[1:]))

        coordinates = Coordinates(
            sample=lay(sample_P, -1),
            table=lay(table_P),
            kind=lay(flat_PK[:, KIND]),
            block=lay(flat_PK[:, BLOCK]),
        )
        where, take, noisy = {}, {}, {}
        item_P = SEGMENTS * slot_P + flat_PK[:, SEGMENT]
        latent_P = self._latents(samples, templates, order)[sample_P, flat_PK[:, ITEM]]
        latent_P = latent_P + flat_PK[:, AT]
        for number, m in enumerate(self.names):
            mine = np.flatnonzero(flat_PK[:, MODALITY] == number)
            if not len(mine):
                continue
            where[m], take[m] = torch.from_numpy(at_P[mine]), torch.from_numpy(latent_P[mine])
            some = np.flatnonzero(group_P[mine])
            of = mine[some]
            columns = (some, item_P[of], flat_PK[of, AT], group_P[of], flat_PK[of, WITHIN])
            noisy[m] = torch.from_numpy(np.stack(columns).astype(np.int64))
        group_RL = lay(group_P)
        groups, chances = self._groups(samples, flat_PK, item_P, group_P, sample_P)
        open_ = self.training and len(samples) == rows and set(lengths) == {width}
        return PackedBatch(
            coordinates=coordinates,
            pos_RLA=lay(flat_PK[:, COLUMNS:]),
            time_RL=torch.zeros(rows, width),
            where=where,
            take=take,
            noisy=noisy,
            groups=groups,
            chances=chances,
            group_RL=group_RL,
            step_RL=group_RL,
            open=open_ and all(t.open for t in templates),
            alone=_alone(where, rows * width),
        )

    def _groups(
        self,
        samples: Sequence[Sample],
        flat_PK: np.ndarray,
        item_P: np.ndarray,
        group_P: np.ndarray,
        sample_P: np.ndarray,
    ) -> tuple[Tensor, Tensor]:
        """`groups` and `chances` of a batch: of the first position of each group, since all of a
        group have the same."""
        begins = np.flatnonzero((group_P > 0) & (flat_PK[:, WITHIN] == 0))
        begins = begins[np.argsort(group_P[begins], kind="stable")]
        size_G = np.bincount(group_P, minlength=len(begins) + 1)[1:]
        first = flat_PK[begins]
        kinds = (first[:, MODALITY], first[:, BLOCKWISE])
        columns = (item_P[begins], first[:, NUMBER], size_G, *kinds)
        rules = [self._rules[samples[i].task] for i in sample_P[begins]]
        told = zip(rules, first[:, SEGMENT], strict=True)
        pairs = [(rate, weights[s]) for (rate, weights), s in told]
        chances = np.array(pairs, np.float32).reshape(len(begins), 2).T
        groups = torch.from_numpy(np.stack(columns).astype(np.int64))
        return groups, torch.from_numpy(np.ascontiguousarray(chances))

    def _rules_of(self, layout: Layout) -> tuple[float, list[float]]:
        """The rate of relabelling as U, and the weight of each segment's loss."""
        if len(layout.segments) > SEGMENTS:
            found = len(layout.segments)
            raise ValueError(f"a layout has at most {SEGMENTS} segments, found {found}")
        return layout.unconditional_rate, [s.weight for s in layout.segments]

    def _latents(
        self,
        samples: Sequence[Sample],
        templates: Sequence[_Template],
        order: Mapping[str, Sequence[tuple[int, str]]] | None,
    ) -> np.ndarray:
        """Where the latents of each sample's items begin within their modality [samples, items]."""
        begins = np.zeros((len(samples), max((len(t.items) for t in templates), default=0)), int)
        taken: dict[str, int] = {}
        if order is None:
            places = [(i, item) for i, t in enumerate(templates) for item in range(len(t.items))]
        else:
            index = [{kind: k for k, (kind, _, _) in enumerate(t.items)} for t in templates]
            places = [(i, index[i][kind]) for some in order.values() for i, kind in some]
        for i, item in places:
            _, m, size = templates[i].items[item]
            begins[i, item] = taken.get(m, 0)
            taken[m] = begins[i, item] + size
        return begins

    def _lay_out(self, shape: tuple[object, ...]) -> _Template:
        """The template of one shape of samples."""
        task, grids, clock, start = shape
        layout = self.layouts[task]  # type: ignore[index]
        kinds = {s.kind for s in layout.segments}
        given = {k: g for k, g in grids if k in kinds}  # type: ignore[attr-defined]
        placed = place(layout, given, self.axes, clock, start)  # type: ignore[arg-type]
        items = [(k, layout[k].modality, int(np.prod(g))) for k, g in given.items()]
        if not self.training:
            return self._template_of(layout, placed, items, False)
        kept, open_ = needed(placed, str(task), self.visibility)
        return self._template_of(layout, kept, items, open_ and not layout.unconditional_rate)

    def _template_of(
        self,
        layout: Layout,
        placed: Sequence[Placed],
        items: list[tuple[str, str, int]],
        open_: bool,
    ) -> _Template:
        index = {kind: number for number, (kind, _, _) in enumerate(items)}
        groups, parts = 0, []
        for p in placed:
            block = p.blocks.numpy()
            length = len(block)
            columns = np.zeros((length, COLUMNS + self.axes), np.int64)
            columns[:, MODALITY] = self.names.index(p.segment.modality)
            columns[:, KIND] = self.visibility.kind_index[p.segment.kind]
            columns[:, BLOCK] = block
            columns[:, ITEM] = index[p.segment.copies or p.segment.kind]
            columns[:, AT] = np.arange(length) if p.kept is None else p.kept.numpy()
            columns[:, SEGMENT] = layout.segments.index(p.segment)
            columns[:, COLUMNS:] = p.positions.numpy()
            if p.segment.noise != "clean" and length:
                number = block - block[0] if p.segment.noise == "block" else np.zeros_like(block)
                columns[:, NUMBER], columns[:, GROUP] = number, number + groups + 1
                columns[:, BLOCKWISE] = p.segment.noise == "block"
                columns[:, WITHIN] = np.arange(length) - np.searchsorted(number, number)
                groups += int(number[-1]) + 1
            parts.append(columns)
        return _Template(_joined(parts, COLUMNS + self.axes), items, groups, open_)


class _Template(NamedTuple):
    """One shape of samples: columns [P, K], (kind, modality, latents) of its items, how many noise
    groups it has, and whether all of it sees all of it."""

    columns: np.ndarray
    items: list[tuple[str, str, int]]
    groups: int
    open: bool


def pack(
    samples: Sequence[Sample],
    layouts: Mapping[str, Layout],
    visibility: Visibility,
    row_length: int | None,
    axes: int,
    training: bool = False,
) -> PackedBatch:
    """One batch, with a `Packer` of its own."""
    packed = Packer(layouts, visibility, axes, row_length, training)(samples)
    return packed.under(visibility)


def latents_of(
    samples: Sequence[Sample],
    layouts: Mapping[str, Layout],
    values: Sequence[Mapping[str, Tensor]],
) -> dict[str, Tensor]:
    """``values[sample][kind]`` [L, C] as the latents [*, C] of each modality, sample by sample: the
    order that `pack` expects."""
    parts: dict[str, list[Tensor]] = {}
    for sample, of in zip(samples, values, strict=True):
        layout = layouts[sample.task]
        kinds = [k for k in sample.grids if k in {s.kind for s in layout.segments}]
        for kind in kinds:
            parts.setdefault(layout[kind].modality, []).append(of[kind])
    return {m: torch.cat(some) for m, some in parts.items()}


def _joined(parts: Sequence[np.ndarray], width: int) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros((0, width), np.int64)


def _begins(sizes: Sequence[int]) -> np.ndarray:
    """Where each of some parts of these sizes begins."""
    return np.array([0, *accumulate(sizes)][:-1] if sizes else [], np.int64)


def _alone(where: Mapping[str, Tensor], positions: int) -> str | None:
    """The modality whose N are 0, 1, ... up to all positions."""
    if len(where) != 1:
        return None
    ((m, where_N),) = where.items()
    return m if torch.equal(where_N, torch.arange(positions)) else None


def _arrange(lengths: Sequence[int], row_length: int | None) -> tuple[list[int], int, int]:
    """(start of each sample in the flattened rows, number of rows, width of a row)."""
    if row_length is not None:
        return _best_fit(lengths, row_length)
    width = max(lengths, default=0)
    return [i * width for i in range(len(lengths))], len(lengths), width


def _best_fit(lengths: Sequence[int], row_length: int) -> tuple[list[int], int, int]:
    """The longest sample first, each into the fullest row that has room for it (of equally full
    ones, the first)."""
    free: list[tuple[int, int]] = []  # (room, row), sorted
    used: list[int] = []
    spot: dict[int, tuple[int, int]] = {}
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[i] > row_length:
            raise ValueError(
                f"a sample of {lengths[i]} latents does not fit a row of {row_length}:"
                " raise row_length, or shorten the text or the image"
            )
        found = bisect_left(free, (lengths[i], 0))
        if found == len(free):
            row = len(used)
            used.append(0)
        else:
            row = free.pop(found)[1]
        spot[i] = (row, used[row])
        used[row] += lengths[i]
        insort(free, (row_length - used[row], row))
    width = max(used, default=0)
    starts = [spot[i][0] * width + spot[i][1] for i in range(len(lengths))]
    return starts, len(used), width
