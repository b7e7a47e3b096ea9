"""Chance as a function of what it is for, never of who draws it.

Every number is a word of the counter-based generator Philox4x32 with ten rounds (Salmon et al.
2011, "Parallel random numbers: as easy as 1, 2, 3"), and its counter says which number it is:

    key        a hash of (seed, stage, purpose)              which stream
    counter    (place, part, item, step)                     which number of the stream

So there is no state to keep, all numbers of one purpose are drawn by one call on the device that
needs them, and a result does not depend on batches, rows, workers or processes. Words are equal on
all devices; normal numbers differ by the rounding of a logarithm and a cosine.

Shape legend: ``...`` any axes of the counters, N positions, C channels.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
#: added to the key between rounds
WEYL = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF
#: numbers of one call of the generator
WORDS = 4
#: counters worked through at once on a CPU, so that they stay in its cache
AT_ONCE = 1 << 15


def derive(*purpose: int | str) -> int:
    """A 63-bit seed for `purpose`, e.g. ``derive(seed, step, slot, "noise")``."""
    digest = hashlib.blake2b(repr(purpose).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*purpose: int | str) -> torch.Generator:
    """A CPU generator seeded for `purpose`, for what torch draws itself (permutations)."""
    return torch.Generator().manual_seed(derive(*purpose))


def philox(key: int, counter: Sequence[Tensor | int], rounds: int = ROUNDS) -> Tensor:
    """Four random words [4, ...] in int64, of four counters [...] of 32 bits (int64, or plain
    numbers; one tensor at least) under a key of 64 bits."""
    tensors = [c for c in counter if isinstance(c, Tensor)]
    shape, device = torch.broadcast_shapes(*(c.shape for c in tensors)), tensors[0].device
    flat = [
        c.expand(shape).flatten()
        if isinstance(c, Tensor)
        else torch.full((shape.numel(),), c, device=device)
        for c in counter
    ]
    size = AT_ONCE if device.type == "cpu" else max(1, shape.numel())
    parts = [
        _rounds(key, rounds, *part) for part in zip(*(c.split(size) for c in flat), strict=True)
    ]
    return torch.cat(parts, 1).unflatten(1, shape) if shape else parts[0][:, 0]


def _rounds(key: int, rounds: int, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """The rounds over flat counters, in place. A product of two words fills 64 bits; what its upper
    half carries above 32 bits (a sign) goes when the word that it is mixed into is masked."""
    low, high = key & WORD, key >> 32 & WORD
    for _ in range(rounds):
        p, q = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        a = (q >> 32).bitwise_xor_(b).bitwise_xor_(low).bitwise_and_(WORD)
        c = (p >> 32).bitwise_xor_(d).bitwise_xor_(high).bitwise_and_(WORD)
        b, d = q, p
        low, high = low + WEYL[0] & WORD, high + WEYL[1] & WORD
    return torch.stack([a, b & WORD, c, d & WORD])


def unit(words: Tensor) -> Tensor:
    """Words as uniform numbers in [0, 1), float32 and exact: multiples of 2^-24."""
    return (words >> 8).to(torch.float32) * 2.0**-24


def gaussian(words: Tensor) -> Tensor:
    """Words [4, ...] as standard normal numbers [4, ...] in float32 (Box and Muller 1958)."""
    first, second = words.to(torch.float32).mul_(2.0**-32).unflatten(0, (2, 2)).unbind(1)
    radius = (first + 2.0**-33).log_().mul_(-2).clamp_(min=0).sqrt_()
    angle = second.mul_(2 * math.pi)
    return torch.cat([radius * angle.cos(), radius * angle.sin()])


@dataclass(frozen=True)
class Chance:
    """The chance of one step of one stage (or of anything else that has a name).

    ``item`` numbers tell apart what may draw at the same place: ``256 * slot + segment`` of an item
    in training. Both `item` and `place` are integer tensors below 2^32, and decide the device.
    """

    seed: int
    stage: str = ""
    step: Tensor | int = 0

    def words(
        self, purpose: str, item: Tensor, place: Tensor | int, part: Tensor | int = 0
    ) -> Tensor:
        """Four words [4, ...] for each item and place."""
        return philox(derive(self.seed, self.stage, purpose), (place, part, item, self.step))

    def uniform(self, purpose: str, item: Tensor, place: Tensor | int = 0) -> Tensor:
        """One uniform number in [0, 1) for each item and place [...]."""
        return unit(self.words(purpose, item, place)[0])

    def gaussian(self, purpose: str, item: Tensor, place: Tensor | int = 0) -> Tensor:
        """One standard normal number for each item and place [...]."""
        return gaussian(self.words(purpose, item, place))[0]

    def normal(self, purpose: str, item_N: Tensor, place_N: Tensor, channels: int) -> Tensor:
        """Standard normal numbers [N, C] for each item and place."""
        calls = torch.arange(-(-channels // WORDS), device=place_N.device)
        words = self.words(purpose, item_N[:, None], place_N[:, None], calls)
        return gaussian(words).permute(1, 2, 0).flatten(1)[:, :channels]


@dataclass(frozen=True)
class ItemChance:
    """The chance of the B items of a batch and of their N latents: who each item is, and of which
    item each latent is, and where in it."""

    chance: Chance
    item_B: Tensor
    item_N: Tensor
    place_N: Tensor

    def normal(self, purpose: str, channels: int) -> Tensor:
        """Standard normal numbers [N, C], for each latent."""
        return self.chance.normal(purpose, self.item_N, self.place_N, channels)

    def order(self, purpose: str, count: int) -> Tensor:
        """Numbers [B, T] whose order is random, `count` for each item and no two of them equal."""
        place_T = torch.arange(count, device=self.item_B.device)
        words_BT = self.chance.words(purpose, self.item_B[:, None], place_T)[0]
        return words_BT * count + place_T


def noise(shape: Sequence[int], *purpose: int | str) -> Tensor:
    """Standard normal numbers [N, C] for one thing alone, on the CPU."""
    count, channels = shape
    place_N = torch.arange(count)
    return Chance(derive(*purpose)).normal("noise", torch.zeros_like(place_N), place_N, channels)
