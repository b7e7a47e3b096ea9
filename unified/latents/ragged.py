"""Many things of different sizes in one tensor: observations, latents and their posteriors.

A batch holds its items one after the other, *sorted by shape*, so that items of one shape stand
together and a few numbers on the host (the *runs*) say where everything is::

    values   | a a a a | b b b b | c c c c c c |      runs ((2, (4,)), (1, (6,)))

Shape legend: B items, N latents of all items, C channels, T the longest first axis, ``...`` any
further axes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

#: (number of items, their shape), in the order of the items
Runs = tuple[tuple[int, tuple[int, ...]], ...]


def runs_of(shapes: Sequence[tuple[int, ...]]) -> Runs:
    """The runs of items of these shapes."""
    return tuple((len(list(same)), shape) for shape, same in groupby(shapes))


def numbers(runs: Runs) -> int:
    """How many numbers (or latents) all items have together."""
    return sum(count * math.prod(shape) for count, shape in runs)


@dataclass(frozen=True)
class Ragged:
    """Items sorted by shape: all their numbers, flat, and their runs. `length_B` is the length of
    each item's first axis, on the device of the values."""

    values: Tensor
    runs: Runs
    length_B: Tensor

    def __post_init__(self) -> None:
        if self.values.shape != (numbers(self.runs),):
            raise ValueError(
                f"{list(self.values.shape)} values are not those of items of the shapes {self.runs}"
            )

    @classmethod
    def of(cls, items: Sequence[Tensor]) -> Ragged:
        """`items`, which are sorted by shape already."""
        lengths = torch.tensor([x.shape[0] if x.ndim else 1 for x in items])
        runs = runs_of([tuple(x.shape) for x in items])
        return cls(torch.cat([x.flatten() for x in items]), runs, lengths.to(items[0].device))

    @classmethod
    def flat(cls, values: Tensor, runs: Runs) -> Ragged:
        """Numbers in the order of the items of `runs`."""
        lengths = [n for count, shape in runs for n in [shape[0]] * count]
        return cls(values.flatten(), runs, torch.tensor(lengths).to(values.device))

    def __len__(self) -> int:
        return sum(count for count, _ in self.runs)

    def to(self, device: torch.device | str) -> Ragged:
        values, length_B = self.values.to(device), self.length_B.to(device)
        return replace(self, values=values, length_B=length_B)

    def groups(self) -> Iterator[Tensor]:
        """The items of one shape, stacked [b, *shape], shape by shape."""
        sizes = [count * math.prod(shape) for count, shape in self.runs]
        for part, (count, shape) in zip(self.values.split(sizes), self.runs, strict=True):
            yield part.view(count, *shape)

    def items(self) -> list[Tensor]:
        """The items one by one."""
        return [item for group in self.groups() for item in group.unbind()]

    def parts(self, size: int) -> Iterator[Ragged]:
        """The same in parts of at most `size` items."""
        items = self.items()
        return (Ragged.of(items[i : i + size]) for i in range(0, len(items), size))

    @property
    def longest(self) -> int:
        """T."""
        return max(shape[0] for _, shape in self.runs)

    def padded(self, fill: float) -> Tensor:
        """The items as rows [B, T, ...], filled up on the right."""
        rest = self.runs[0][1][1:]
        return pad(self.values.view(-1, *rest), self.length_B, self.longest, fill)


def places(length_B: Tensor, longest: int, total: int) -> Tensor:
    """Where each of `total` positions lies in rows [B * T], `length_B` of them a row."""
    row_B = torch.arange(len(length_B), device=length_B.device)
    # told the total, the device need not be asked for it
    row_N = row_B.repeat_interleave(length_B, output_size=total)
    start_B = length_B.cumsum(0) - length_B
    return row_N * longest + torch.arange(total, device=length_B.device) - start_B[row_N]


def pad(values_N: Tensor, length_B: Tensor, longest: int, fill: float = 0.0) -> Tensor:
    """Items [N, ...], `length_B` of them a row, as rows [B, T, ...] filled up on the right."""
    rows, rest = len(length_B), values_N.shape[1:]
    if len(values_N) == rows * longest:
        return values_N.view(rows, longest, *rest)
    blank = values_N.new_full((rows * longest, *rest), fill)
    place_N = places(length_B, longest, len(values_N))
    return blank.index_copy(0, place_N, values_N).view(rows, longest, *rest)


def unpad(rows_BT: Tensor, length_B: Tensor, total: int) -> Tensor:
    """The first `length_B` of each row of [B, T, ...], `total` in all: [N, ...]."""
    flat, longest = rows_BT.flatten(0, 1), rows_BT.shape[1]
    return flat if len(flat) == total else flat.index_select(0, places(length_B, longest, total))


@dataclass(frozen=True)
class Latent:
    """One encoded item: values [L, C], and the grid of L cells: ``(L,)`` for text, ``(h, w)``
    for an image."""

    values: Tensor
    grid: tuple[int, ...]

    def __post_init__(self) -> None:
        if math.prod(self.grid) != len(self.values):
            raise ValueError(f"grid {self.grid} does not hold {len(self.values)} latents")


@dataclass(frozen=True)
class Latents:
    """The latents [N, C] of items whose grids have these runs."""

    values: Tensor
    runs: Runs

    def __post_init__(self) -> None:
        if numbers(self.runs) != len(self.values):
            raise ValueError(f"grids {self.runs} do not hold {len(self.values)} latents")

    @classmethod
    def of(cls, latents: Sequence[Latent]) -> Latents:
        """`latents`, which are sorted by grid already."""
        return cls(torch.cat([z.values for z in latents]), runs_of([z.grid for z in latents]))

    def to(self, device: torch.device | str) -> Latents:
        return replace(self, values=self.values.to(device))

    def groups(self) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
        """The latents [b, L, C] of each grid."""
        sizes = [count * math.prod(grid) for count, grid in self.runs]
        for part, (count, grid) in zip(self.values.split(sizes), self.runs, strict=True):
            yield part.unflatten(0, (count, math.prod(grid))), grid


@dataclass(frozen=True)
class Posteriors:
    """Diagonal Gaussians q(z | x) over the latents of many items, in normalised space.

    `mean_NC` and `logvar_NC` are [N, C]; `runs` are those of the items' grids. What is reduced
    below is summed over N and C, in nats.
    """

    mean_NC: Tensor
    logvar_NC: Tensor
    runs: Runs

    def __post_init__(self) -> None:
        if not numbers(self.runs) == len(self.mean_NC) == len(self.logvar_NC):
            raise ValueError(f"grids {self.runs} do not hold {len(self.mean_NC)} latents")

    @classmethod
    def cat(cls, parts: Sequence[Posteriors]) -> Posteriors:
        """All items, in this order."""
        return cls(
            torch.cat([p.mean_NC for p in parts]),
            torch.cat([p.logvar_NC for p in parts]),
            tuple(run for p in parts for run in p.runs),
        )

    def __len__(self) -> int:
        return sum(count for count, _ in self.runs)

    @property
    def grid(self) -> tuple[int, ...]:
        """The grid of the only item there is."""
        ((_, grid),) = self.runs
        return grid

    @property
    def mode(self) -> Latents:
        return Latents(self.mean_NC, self.runs)

    def to(self, device: torch.device) -> Posteriors:
        return replace(self, mean_NC=self.mean_NC.to(device), logvar_NC=self.logvar_NC.to(device))

    def items(self) -> list[Posteriors]:
        """One by one."""
        grids = [grid for count, grid in self.runs for _ in range(count)]
        sizes = [math.prod(grid) for grid in grids]
        parts = zip(self.mean_NC.split(sizes), self.logvar_NC.split(sizes), grids, strict=True)
        return [Posteriors(mean, logvar, ((1, grid),)) for mean, logvar, grid in parts]

    def sample(self, noise_NC: Tensor) -> Latents:
        """Reparameterised samples ``mean + std * noise``; the caller owns the noise."""
        std_NC = torch.exp(0.5 * self.logvar_NC)
        return Latents(self.mean_NC + std_NC * noise_NC.to(self.mean_NC), self.runs)

    def log_prob(self, values_NC: Tensor) -> Tensor:
        """log q(z | x) of `values_NC`, in nats."""
        return self.log_density(values_NC).sum()

    def log_density(self, values_NC: Tensor) -> Tensor:
        """log q(z | x) of each latent, in nats: [N], or [K, N] of values [K, N, C]."""
        squared = (values_NC - self.mean_NC) ** 2 * torch.exp(-self.logvar_NC)
        return -0.5 * (squared + self.logvar_NC + math.log(2 * math.pi)).sum(-1)

    def entropy(self) -> Tensor:
        """-E_q[log q], the term that stage 2 weighs by beta (paper eq. 3.18)."""
        return 0.5 * (self.logvar_NC + math.log(2 * math.pi * math.e)).sum()

    def kl(self, other: Posteriors | None = None) -> Tensor:
        """KL(q || other); against the base prior N(0, I) when `other` is None (eq. 3.16)."""
        if other is None:
            squared, logvar = self.mean_NC**2, self.logvar_NC
        else:
            squared = (self.mean_NC - other.mean_NC) ** 2 * torch.exp(-other.logvar_NC)
            logvar = self.logvar_NC - other.logvar_NC
        return 0.5 * (squared + torch.exp(logvar) - 1 - logvar).sum()
