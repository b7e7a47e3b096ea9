"""Prepared examples, kept in memory for the epochs to come.

Reading a member, decoding it and bringing it to size gives the same observation every time, so one
that is kept is one that need not be made again. What an example draws (a phase, a crop) is part of
its name here, or happens to what was kept.

What comes first stays. An epoch asks for every example once; if the latest were kept instead, each
would be dropped just before it is needed again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping

from torch import Tensor

#: bytes of an entry and of a tensor beside the numbers in it
OVERHEAD = 1024

#: what a stream makes of an example: observations by kind, and whether one was truncated
Made = tuple[Mapping[str, Tensor], bool]


class Memory:
    """Observations by name, up to `limit` bytes of them. They are shared: nobody may change one."""

    def __init__(self, limit: float = 0):
        self.limit, self.used = limit, 0
        self._kept: dict[Hashable, Made] = {}

    def recall(self, name: Hashable, make: Callable[[], Made]) -> Made:
        """What is kept under `name`, or what `make` gives, which is kept if there is room."""
        if name in self._kept:
            return self._kept[name]
        made = make()
        size = OVERHEAD + sum(o.nbytes + OVERHEAD for o in made[0].values())
        if self.used + size <= self.limit:
            self._kept[name] = made
            self.used += size
        return made
