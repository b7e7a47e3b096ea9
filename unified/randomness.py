"""Random draws as functions of what they are for, never of who draws them.

``generator(seed, step, example, "noise")`` is the same stream on every worker, row and rank, so a
result does not depend on batching, packing or the number of processes.
"""

from __future__ import annotations

import hashlib

import torch


def derive(*purpose: int | str) -> int:
    """A 63-bit seed for `purpose`, e.g. ``derive(seed, step, slot, "noise")``."""
    digest = hashlib.blake2b(repr(purpose).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*purpose: int | str) -> torch.Generator:
    """A CPU generator seeded for `purpose`."""
    return torch.Generator().manual_seed(derive(*purpose))
