"""In which order a stream sees the examples of its source.

An epoch visits the shards in a random order and cuts that order into *windows*: as many shards as
hold `shuffle_buffer` examples. Within a window, the order of examples is a random permutation::

    epoch 0    s4 s1 s2 | s0 s5 s3 | s6        three windows of about shuffle_buffer examples
               permuted   permuted   permuted

A source that fits one window is permuted as a whole. Both draws are functions of (seed, stream,
epoch, window), so a place in the order is four integers, and only the shards of one window have to
be at hand (and of the next, which is indexed meanwhile).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property

import torch

from unified.data.shards import Entry
from unified.data.source import Source
from unified.randomness import generator


@dataclass
class Place:
    """How far a stream has come: in `epoch`, in the window that begins at the epoch's shard number
    `first`, at its example number `offset`. `before` examples of the epoch lie before the window.
    """

    epoch: int = 0
    first: int = 0
    offset: int = 0
    before: int = 0


@dataclass(frozen=True)
class Window:
    """The shards number `first` to `stop` (excluded) of an epoch, and their examples, permuted;
    `before` examples of the epoch lie in earlier windows."""

    epoch: int
    first: int
    stop: int
    before: int
    entries: Sequence[Entry]

    @property
    def seen(self) -> int:
        """Examples of the epoch up to here: all of them, if it has one window."""
        return self.before + len(self.entries)

    def begins_at(self, place: Place) -> bool:
        return (self.epoch, self.first) == (place.epoch, place.first)


class Order:
    """The endless sequence of one stream's examples; `next` gives them one by one."""

    def __init__(self, source: Source, stream: str, seed: int, shuffle_buffer: int):
        self.source, self.stream, self.seed = source, stream, seed
        self.shuffle_buffer = shuffle_buffer
        self.place = Place()
        self._window: Window | None = None
        self._coming: Future[Window] | None = None

    @cached_property
    def _thread(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, thread_name_prefix="shards")

    def next(self) -> Entry:
        """The next example; moves on to the next window, or epoch, where one is used up."""
        window = self.window
        if self.place.offset == len(window.entries):
            ends = window.stop == len(self.source.urls)
            self.place.epoch += ends
            self.place.first = 0 if ends else window.stop
            self.place.before = 0 if ends else window.seen
            self.place.offset = 0
            window = self.window
        self.place.offset += 1
        return window.entries[self.place.offset - 1]

    @property
    def window(self) -> Window:
        """The window of the present place."""
        place, window = self.place, self._window
        if window is None or not window.begins_at(place):
            window = self._arrived() or self._open(place.epoch, place.first, place.before)
            self._window = window
            if window.stop < len(self.source.urls):
                args = (place.epoch, window.stop, window.seen)
                self._coming = self._thread.submit(self._open, *args)
        return window

    def _arrived(self) -> Window | None:
        """The window that was opened ahead, if it is the one that is needed."""
        coming, self._coming = self._coming, None
        window = coming.result() if coming is not None else None
        return window if window is not None and window.begins_at(self.place) else None

    def _open(self, epoch: int, first: int, before: int) -> Window:
        chosen: dict[int, list[Entry]] = {}
        for index in self._shards(epoch)[first:]:
            if sum(map(len, chosen.values())) >= self.shuffle_buffer:
                break
            chosen[index] = self.source.shard(self.source.urls[index])
        entries = [entry for index in sorted(chosen) for entry in chosen[index]]
        # the first window's key is the epoch's own
        key = (epoch, first) if first else (epoch,)
        draw = generator(self.seed, self.stream, "epoch", *key)
        order = torch.randperm(len(entries), generator=draw).tolist()
        stop = first + len(chosen)
        return Window(epoch, first, stop, before, [entries[i] for i in order])

    def _shards(self, epoch: int) -> list[int]:
        draw = generator(self.seed, self.stream, "shards", epoch)
        return torch.randperm(len(self.source.urls), generator=draw).tolist()

    def state_dict(self) -> dict[str, int]:
        """The place, and what tells another source apart: its shards and this window's size."""
        sizes = {"shards": len(self.source.urls), "examples": len(self.window.entries)}
        return {**asdict(self.place), **sizes}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at a place. ValueError if the source is not the one it was."""
        self.place = Place(*(state[k] for k in ("epoch", "first", "offset", "before")))
        for what, now in (
            ("shards", len(self.source.urls)),
            ("examples", len(self.window.entries)),
        ):
            if state[what] != now:
                raise ValueError(
                    f"source {self.source.name} has {now} {what} and had {state[what]} when the run"
                    " was saved; resume with the same shards and shuffle_buffer"
                )
