"""Visibility: which segment may see which, as data.

Every published layout is a table ``sees[query kind][key kind] -> Interval``, an interval on
``key block - query block``; an absent entry is invisible. One expression serves every task:

    same sample  and  lo[t,q,k] <= block_k - block_q <= hi[t,q,k]

The same table compiles to a dense boolean mask (`Visibility.dense`), to a FlexAttention
``mask_mod`` (`Visibility.mask_mod`), and to the drawing that ``unified show task`` prints
(`draw`). Captioning (instruction P, image I, answer C, noisy answer N; blocks of 2) draws as

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

Shape legend: R rows, L positions of a row, Q query positions, S key positions,
T tables (one per task), K kinds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import NamedTuple

import torch
from torch import Tensor

#: farther than any two blocks are apart, and the distance between the numbers of two kinds
_FAR, _APART = 1 << 30, 1 << 32
#: a sample of which there is no key, not even padding
_NOWHERE = -2


class Interval(NamedTuple):
    """A closed interval on ``key block - query block``."""

    lo: int
    hi: int

    def __contains__(self, difference: object) -> bool:
        return isinstance(difference, int) and self.lo <= difference <= self.hi


ALL = Interval(-_FAR, _FAR)  #: every block
UP_TO = Interval(-_FAR, 0)  #: the same block and earlier ones
BEFORE = Interval(-_FAR, -1)  #: earlier blocks only
SAME = Interval(0, 0)  #: the same block only
NEVER = Interval(1, 0)  #: the empty interval: an absent entry of a table

Sees = Mapping[str, Mapping[str, Interval]]

#: The unconditional copy of a noisy segment. It sees its own block and nothing else, so it cannot
#: leak a condition through clean history, and it shares the row, the forward pass and the cache
#: with the conditional copy.
UNCONDITIONAL = "U"


def with_unconditional(sees: Sees) -> dict[str, dict[str, Interval]]:
    """The table with the row of kind U, ``sees[U] = {U: SAME}``, that guidance needs."""
    return {q: dict(row) for q, row in sees.items()} | {UNCONDITIONAL: {UNCONDITIONAL: SAME}}


@dataclass(frozen=True)
class Coordinates:
    """Where each position of a row stands: four integer tensors of one shape [R, L].

    ``sample`` is -1 on padding, which sees nothing and is seen by nothing.
    """

    sample: Tensor
    table: Tensor
    kind: Tensor
    block: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> Coordinates:
        return Coordinates(*(change(t) for t in (self.sample, self.table, self.kind, self.block)))

    def to(self, device: torch.device | str) -> Coordinates:
        return self.map(lambda t: t.to(device))

    @staticmethod
    def cat(parts: Sequence[Coordinates]) -> Coordinates:
        fields = ("sample", "table", "kind", "block")
        return Coordinates(*(torch.cat([getattr(p, f) for p in parts], dim=1) for f in fields))


class Visibility:
    """Tables compiled to two integer arrays ``lo[T, K, K]`` and ``hi[T, K, K]``.

    `tables` maps a task's name to its ``sees``. Kinds are numbered over all tables, tables in the
    order given: ``kind_index["C"]`` and ``table_index["captioning"]``.
    """

    def __init__(self, tables: Mapping[str, Sees]):
        self.tables = {name: with_unconditional(sees) for name, sees in tables.items()}
        kinds = {UNCONDITIONAL: None}
        for sees in self.tables.values():
            kinds |= dict.fromkeys(k for q in sees for k in (q, *sees[q]))
        self.kind_index = {kind: i for i, kind in enumerate(kinds)}
        self.table_index = {name: i for i, name in enumerate(self.tables)}
        bounds = torch.tensor(
            [
                [[sees.get(q, {}).get(k, NEVER) for k in kinds] for q in kinds]
                for sees in self.tables.values()
            ],
            dtype=torch.int64,
        )
        # contiguous, since a compiled mask_mod cannot read a strided view
        self.lo_TKK, self.hi_TKK = (b.contiguous() for b in bounds.unbind(-1))
        self._moved: dict[torch.device, Visibility] = {}

    def to(self, device: torch.device | str) -> Visibility:
        """The same on `device`; the tables are moved there once."""
        device = torch.device(device)
        if self.lo_TKK.device == device:
            return self
        if device not in self._moved:
            moved = copy(self)
            moved.lo_TKK, moved.hi_TKK = self.lo_TKK.to(device), self.hi_TKK.to(device)
            self._moved[device] = moved
        return self._moved[device]

    def dense(self, query: Coordinates, key: Coordinates | None = None) -> Tensor:
        """Boolean mask [R, Q, S]: True where a query position sees a key position."""
        key = key or query
        block_RQS, kind_RQS = (
            t[:, None].expand(-1, query.kind.shape[1], -1) for t in (key.block, key.kind)
        )

        def end(bounds_TKK: Tensor) -> Tensor:
            """The block at which what a query sees of a key's kind ends on one side."""
            bounds_RQK = bounds_TKK[query.table, query.kind] + query.block[..., None]
            return bounds_RQK.gather(2, kind_RQS)

        inside = (end(self.lo_TKK) <= block_RQS) & (block_RQS <= end(self.hi_TKK))
        mine = query.sample[..., None]
        return (mine == key.sample[:, None]) & (mine >= 0) & inside

    def mask_mod(
        self, query: Coordinates, key: Coordinates | None = None
    ) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """The same rule as FlexAttention's ``mask_mod(row, head, query, key)``.

        A table that is looked up for each pair would not fit into the fast memory of a GPU's
        kernel. So each key has one number, of its sample, kind and block, and each query sees one
        interval of these numbers per kind.
        """
        key = key or query
        kinds = len(self.kind_index)
        number_RS = (key.sample * kinds + key.kind) * _APART + key.block

        def ends(bounds_TKK: Tensor) -> list[Tensor]:
            """Where the intervals [R, Q] of a query end on one side; one for each kind."""
            bounds_RQK = bounds_TKK[query.table, query.kind] + query.block[..., None]
            base_RQ = torch.where(query.sample >= 0, query.sample, _NOWHERE) * kinds
            return [(base_RQ + k) * _APART + bounds_RQK[..., k] for k in range(kinds)]

        lows, highs = ends(self.lo_TKK), ends(self.hi_TKK)

        def visible(r: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            del h
            number = number_RS[r, j]
            inside = [
                (lo_RQ[r, i] <= number) & (number <= hi_RQ[r, i])
                for lo_RQ, hi_RQ in zip(lows, highs, strict=True)
            ]
            return reduce(or_, inside)

        return visible


def visible(sees: Sees, kinds: Sequence[str], blocks: Sequence[int]) -> list[list[bool]]:
    """The grid of one sample, from the table alone: ``grid[query][key]``."""
    positions = list(zip(kinds, blocks, strict=True))
    return [
        [(bk - bq) in sees.get(q, {}).get(k, NEVER) for k, bk in positions] for q, bq in positions
    ]


def closure(sees: Sees, kind: str) -> set[str]:
    """All kinds whose content can reach `kind` through any number of layers."""
    reached, frontier = {kind}, [kind]
    while frontier:
        new = {k for k, interval in sees.get(frontier.pop(), {}).items() if interval != NEVER}
        frontier += sorted(new - reached)
        reached |= new
    return reached


def draw(kinds: Sequence[str], grid: Iterable[Sequence[bool]]) -> str:
    """A grid as text: queries down, keys across, ``#`` where visible and ``.`` where not."""
    lines = ["  " + " ".join(kinds)]
    lines += [
        f"{kind} " + " ".join("#" if seen else "." for seen in row)
        for kind, row in zip(kinds, grid, strict=True)
    ]
    return "\n".join(lines)
