"""Layouts: the typed segments of a task, who sees whom, and where each latent stands.

Two rules fix the integers of every position:

* *Blocks* are one clock per sample: a segment starts at the block after the last one so far, a
  segment without a block length is one block, and a twin has the blocks of what it copies.
* *Positions* are integers per axis. A segment starts at s, the first integer above all positions
  so far; text sits on the diagonal (s+i, s+i, s+i), an image at (s, s+y, s+x): a grid fills the
  last axes and is constant on the others. A twin has the positions of what it copies.

Shape legend: L positions of a segment, A axes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from unified.errors import did_you_mean
from unified.sequence.visibility import Coordinates, Sees, Visibility, visible


@dataclass(frozen=True)
class Segment:
    """One typed run of latents.

    ``noise``: whether it is clean, or noisy with one timestep per block or one per segment.
    ``copies``: the clean kind whose noisy twin this is (same latents, positions and blocks).
    ``block``: latents per block; None makes the segment one block.
    ``weight``: its share of the flow loss.
    ``name``: what a person calls it (``prompt``), beside its letter; by default the letter itself.
    ``positions_of``: the earlier kind on whose positions it lies, on a grid of the same size; an
    edited picture lies on those of its source. Its blocks follow the clock as ever.
    """

    kind: str
    modality: str
    noise: Literal["clean", "block", "segment"] = "clean"
    copies: str | None = None
    block: int | None = None
    weight: float = 1.0
    name: str | None = None
    positions_of: str | None = None

    @property
    def title(self) -> str:
        """Its readable name, or its letter where it has none."""
        return self.name or self.kind


@dataclass(frozen=True)
class Layout:
    """Segments in packed order, and ``sees[query kind][key kind]``.

    ValueError for segments that do not match each other or the table.
    """

    segments: tuple[Segment, ...]
    sees: Sees
    #: share of noisy segments (or blocks, where noise is per block) relabelled U in training
    unconditional_rate: float = 0.0

    def __post_init__(self) -> None:
        kinds = [s.kind for s in self.segments]
        for place, s in enumerate(self.segments):
            if s.copies is not None and (s.copies not in kinds or self[s.copies].copies):
                raise ValueError(f"segment {s.kind} copies {s.copies}, which is not a segment")
            if s.copies is not None and self[s.copies].block != s.block:
                raise ValueError(f"segment {s.kind} must have the block length of {s.copies}")
            if s.positions_of is not None and (s.copies or s.positions_of not in kinds[:place]):
                twin = " (and a twin has those of what it copies)" if s.copies else ""
                raise ValueError(
                    f"segment {s.kind} lies on the positions of {s.positions_of}, which should be a"
                    f" segment before it{twin}"
                )
        unknown = {k for q in self.sees for k in (q, *self.sees[q])} - set(kinds)
        if unknown or len(set(kinds)) < len(kinds):
            raise ValueError(f"segments {kinds} do not match the table's kinds {sorted(self.sees)}")
        words = kinds + [s.name for s in self.segments if s.name not in (None, s.kind)]
        twice = sorted({str(word) for word in words if words.count(word) > 1})
        if twice:
            raise ValueError(f"segments {kinds} share the name {', '.join(twice)}")

    def __getitem__(self, kind: str) -> Segment:
        for segment in self.segments:
            if segment.kind == kind:
                return segment
        raise KeyError(f"this layout has no segment {kind}")

    def find(self, word: str) -> Segment:
        """The segment that an item may be given for, by its readable name or its letter.
        ValueError for a word that is neither."""
        for segment in self.filled:
            if word in (segment.kind, segment.name):
                return segment
        known = [s.title for s in self.filled]
        raise ValueError(f"no segment {word!r} to give an item for; {did_you_mean(word, known)}")

    @property
    def filled(self) -> tuple[Segment, ...]:
        """The segments that need an item: all but twins."""
        return tuple(s for s in self.segments if s.copies is None)

    def only(self, kinds: Set[str]) -> Layout:
        """The segments of these kinds and their part of the table, without guidance. A segment
        that lies on the positions of another needs it."""
        sees = {
            q: {k: interval for k, interval in row.items() if k in kinds}
            for q, row in self.sees.items()
            if q in kinds
        }
        return Layout(tuple(s for s in self.segments if s.kind in kinds), sees)

    def is_target(self, segment: Segment) -> bool:
        """True for a segment that generation can produce: it is noisy, or has a noisy twin."""
        return segment.noise != "clean" or any(s.copies == segment.kind for s in self.segments)

    def grid(
        self, lengths: Mapping[str, int], unconditional: bool = False
    ) -> tuple[list[str], list[int], list[list[bool]]]:
        """(kinds, blocks, visible) of one sample whose segments have these lengths.

        With `unconditional`, each noisy segment's copy of kind U is appended.
        """
        placed = place(self, {s.kind: (lengths[s.kind],) for s in self.filled}, axes=1)
        kinds, blocks = [], []
        for p in placed:
            kinds += [p.segment.kind] * len(p.blocks)
            blocks += p.blocks.tolist()
        if unconditional:
            noisy = [p for p in placed if p.segment.noise != "clean"]
            kinds += ["U"] * sum(len(p.blocks) for p in noisy)
            blocks += [b for p in noisy for b in p.blocks.tolist()]
        table = Visibility({"": self.sees}).tables[""]
        return kinds, blocks, visible(table, kinds, blocks)


def modality_names(layouts: Mapping[str, Layout]) -> tuple[str, ...]:
    """The modalities of some layouts, in the order in which they first appear: their numbers."""
    found = (s.modality for layout in layouts.values() for s in layout.segments)
    return tuple(dict.fromkeys(found))


@dataclass(frozen=True)
class Placed:
    """One segment of one sample: its blocks [L] and positions [L, A]."""

    segment: Segment
    blocks: Tensor
    positions: Tensor
    #: which of the segment's latents these are; None is all
    kept: Tensor | None = None

    def only(self, keep: Sequence[bool]) -> Placed:
        """The positions that are marked."""
        if all(keep):
            return self
        kept = torch.tensor(keep, dtype=torch.bool).nonzero()[:, 0]
        return replace(self, blocks=self.blocks[kept], positions=self.positions[kept], kept=kept)


def grid_positions(grid: tuple[int, ...], start: int, axes: int) -> Tensor:
    """Positions [L, A] of a grid that starts at `start`.

    One dimension runs along the diagonal of all axes; more fill the last axes in order.
    """
    if len(grid) == 1:
        return (start + torch.arange(grid[0]))[:, None].expand(-1, axes)
    if len(grid) > axes:
        raise ValueError(f"a grid of {len(grid)} dimensions needs as many axes, found {axes}")
    mesh = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    position = torch.full((math.prod(grid), axes), start)
    position[:, axes - len(grid) :] += torch.stack([m.flatten() for m in mesh], dim=-1)
    return position


def place(
    layout: Layout,
    grids: Mapping[str, tuple[int, ...]],
    axes: int,
    clock: int = 0,
    start: int = 0,
) -> list[Placed]:
    """Blocks and positions of every segment of one sample; `grids` is by kind, twins left out.

    A source S of 2 x 2, an instruction P of 2 and a target I with ``positions_of="S"``, on two
    axes: I has the positions of S, and a block of its own::

                  S                   P            I
        position  0,0 0,1 1,0 1,1     2,2 3,3      0,0 0,1 1,0 1,1
        block     0   0   0   0       1   1        2   2   2   2

    ValueError for a segment whose grid is not that of the one it lies on.
    """
    placed: dict[str, Placed] = {}
    for segment in layout.segments:
        if (segment.copies or segment.kind) not in grids:
            continue
        if segment.copies is not None:
            original = placed[segment.copies]
            placed[segment.kind] = replace(original, segment=segment)
            continue
        grid = grids[segment.kind]
        length = math.prod(grid)
        blocks = clock + torch.arange(length) // (segment.block or max(length, 1))
        if segment.positions_of is None:
            positions = grid_positions(grid, start, axes)
        else:
            positions = _shared(segment, grid, grids, placed)
        placed[segment.kind] = Placed(segment, blocks, positions)
        if length:
            clock, start = int(blocks.max()) + 1, max(start, int(positions.max()) + 1)
    return list(placed.values())


def _shared(
    segment: Segment,
    grid: tuple[int, ...],
    grids: Mapping[str, tuple[int, ...]],
    placed: Mapping[str, Placed],
) -> Tensor:
    """The positions of the segment that `segment` lies on."""
    under = str(segment.positions_of)
    if grids.get(under) != grid:
        found = f"of {_by(grids[under])}" if under in grids else "absent"
        raise ValueError(
            f"segment {segment.kind} lies on the positions of {under}, so both need grids of one"
            f" size, but {segment.kind} is of {_by(grid)} and {under} {found}"
        )
    return placed[under].positions


def _by(grid: tuple[int, ...]) -> str:
    return " x ".join(map(str, grid))


def noisy_kind(layout: Layout, target: str) -> str:
    """The kind under which `target` is denoised: itself if it is noisy, else its noisy twin."""
    candidates = [s.kind for s in layout.segments if target in (s.kind, s.copies)]
    for kind in candidates:
        if layout[kind].noise != "clean":
            return kind
    raise ValueError(
        f"this task cannot generate {target}: it is neither noisy nor has a noisy twin"
    )


def needed(
    placed: Sequence[Placed], table: str, visibility: Visibility
) -> tuple[list[Placed], bool]:
    """`placed` without the clean blocks that no noisy position sees, through any number of layers:
    no loss depends on them. (The last block of a clean text is one, where only its own twin and
    what comes after it would see it.) All of it, where nothing is noisy. And whether what is left
    sees all of itself."""
    keys = [(i, int(b)) for i, p in enumerate(placed) for b in p.blocks.unique()]
    noisy = torch.tensor([placed[i].segment.noise != "clean" for i, _ in keys])
    one = torch.zeros(1, len(keys), dtype=torch.int64)
    kinds = [visibility.kind_index[placed[i].segment.kind] for i, _ in keys]
    group = Coordinates(
        sample=one,
        table=one + visibility.table_index[table],
        kind=torch.tensor([kinds]),
        block=torch.tensor([[b for _, b in keys]]),
    )
    seen, reached = visibility.dense(group)[0], noisy
    if not noisy.any():
        return list(placed), bool(seen.all())
    while not torch.equal(more := reached | seen[reached].any(0), reached):
        reached = more
    kept = {key for key, r in zip(keys, reached.tolist(), strict=True) if r}
    left = [p.only([(i, int(b)) in kept for b in p.blocks]) for i, p in enumerate(placed)]
    return left, bool(seen[reached][:, reached].all())
