"""Which examples each step trains on: a mixture of feeds, the same for any number of processes.

Each slot of the global batch picks a feed by ratio, and then takes the next example of that feed's
`Order`. Both draws are functions of what they are for::

    feed of a slot               (seed, stage, step)    one uniform number per slot
    order of a feed's examples   (seed, feed, epoch, window)

so the only state is how far each feed has come, and a resumed run continues exactly. Every process
draws the whole global batch, which costs nothing, and reads and prepares the slots that are its
own: ``slot % processes == process``. An example that turns out bad is replaced by a random other
one of its window, so what happens in one slot moves no other.

With `workers`, examples are prepared in that many processes of PyTorch's `DataLoader`, which
changes when things are done and not what is done.
"""

from __future__ import annotations

import logging
import math
import os
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from unified.data.batches import Collate, microbatches
from unified.data.examples import Example
from unified.data.order import Order, Window
from unified.data.shards import Entry
from unified.data.source import Source
from unified.data.streams import Prepared, Stream
from unified.randomness import generator

log = logging.getLogger(__name__)

#: reasons that a report or an error quotes
REASONS = 3
#: substitutes for a bad example that are tried
ATTEMPTS = 100


@dataclass(frozen=True)
class Feed:
    """A stream, the source its examples come from, and its relative frequency. `name` tells feeds
    of one stream apart."""

    stream: Stream
    source: Source
    ratio: float = 1.0
    name: str = ""

    @property
    def label(self) -> str:
        return self.name or self.stream.name


@dataclass(frozen=True)
class Slot:
    """One slot to fill: which feed's stream prepares which example."""

    feed: int
    step: int
    slot: int
    entry: Entry


@dataclass
class Bad:
    """What turned out bad in a feed's present epoch, as far as this process has met it."""

    feed: Feed
    max_share: float
    processes: int = 1
    epoch: int = 0
    count: int = 0
    reasons: list[str] = field(default_factory=list)

    def add(self, reason: str, epoch: int, total: int) -> None:
        """Count one; ValueError if that is too many of the `total` examples of the epoch so far."""
        if epoch != self.epoch:
            self.report()
            self.epoch, self.count, self.reasons = epoch, 0, []
        self.count += 1
        if self.count == 1:
            log.warning("replacing a bad example, the first of this epoch: %s", reason)
        self.reasons = [*self.reasons, reason][:REASONS]
        if self.count > self._most(total) or self.count == total:
            raise self.too_many(f"{self.count} of {total}")

    def _most(self, total: int) -> float:
        """How many this process may meet: of several, its share and three standard deviations."""
        share = self.max_share * total / self.processes
        return share if self.processes == 1 else share + 3 * math.sqrt(share) + 1

    def too_many(self, how_many: str) -> ValueError:
        return ValueError(
            f"source {self.feed.source.name} has too many bad examples for {self.feed.label}:"
            f" {how_many}, where max_bad_share {self.max_share:g} is allowed;"
            f" {'; '.join(self.reasons)}"
        )

    def report(self) -> None:
        """Log how many examples of an epoch were replaced, and why the first ones were."""
        if self.count:
            log.warning(
                "source %s, stream %s, epoch %d: replaced %d bad examples: %s",
                self.feed.source.name,
                self.feed.label,
                self.epoch,
                self.count,
                "; ".join(self.reasons) or "before the run was resumed",
            )


def as_list(examples: Sequence[Prepared], step: int) -> list[Prepared]:
    """The examples as they are."""
    del step
    return list(examples)


@dataclass(frozen=True)
class Made:
    """This process's part of a step as a worker leaves it: collated, or in `pieces` where an
    example turned out bad (a sentence in its place) and must be replaced first."""

    parts: list[Any]
    truncated: int
    pieces: list[Prepared | str]


class Preparer(Dataset[Any]):
    """What workers run: the requests of a step to its microbatches."""

    def __init__(
        self,
        feeds: Sequence[Feed],
        seed: int,
        stage: str,
        collate: Collate,
        share: tuple[int, int, int],
    ):
        self._feeds, self._seed, self._stage = feeds, seed, stage
        self._collate, self._share = collate, share

    def __getitem__(self, requests: list[Slot]) -> Made:
        pieces = [self.prepare(request) for request in requests]
        good = [piece for piece in pieces if isinstance(piece, Prepared)]
        if len(good) < len(pieces):
            return Made([], 0, pieces)
        return self.finish(good, requests[0].step if requests else 0)

    def prepare(self, request: Slot) -> Prepared | str:
        """The observations of one slot, or what is wrong with them."""
        feed = self._feeds[request.feed]
        draw = generator(self._seed, self._stage, request.step, request.slot, "prepare")
        try:
            example = Example(feed.source.read(request.entry), feed.stream.modalities)
            observations, truncated = feed.stream.prepare(example, draw)
        except ValueError as error:
            return str(error)
        return Prepared(feed.stream.name, example.key, request.slot, observations, truncated)

    def finish(self, examples: list[Prepared], step: int) -> Made:
        """The microbatches of good examples."""
        parts = microbatches(examples, self._collate, step, *self._share)
        return Made(parts, sum(example.truncated for example in examples), [])


@dataclass(frozen=True)
class Drawn:
    """A step before anything is read: this process's requests, the window each example is of, and
    the state after the step."""

    step: int
    requests: list[Slot]
    windows: list[Window]
    state: dict[str, Any]


class Mixture:
    """The batches of one stage; call `batch` once per step, in order.

    `stage` names the stage; `batch_size` counts examples over all processes and accumulation
    steps, of which this one is number `process` of `processes`. Its share of a step comes as
    `parts` microbatches, made by `collate`. ValueError for ratios that are
    negative or all zero, and for two feeds of one name.
    """

    def __init__(
        self,
        feeds: Sequence[Feed],
        *,
        batch_size: int,
        seed: int,
        stage: str,
        max_bad_share: float = 0.01,
        shuffle_buffer: int = 50_000,
        process: int = 0,
        processes: int = 1,
        workers: int = 0,
        collate: Collate = as_list,
        parts: int = 1,
    ):
        names = [feed.label for feed in feeds]
        if len(set(names)) < len(names):
            raise ValueError(f"the streams of a mixture need different names, found {names}")
        self._shares = _cumulative_shares({f.label: f.ratio for f in feeds})
        self._names = names
        self._orders = [Order(f.source, f.label, seed, shuffle_buffer) for f in feeds]
        self._bad = [Bad(feed, max_bad_share, processes) for feed in feeds]
        self._prepare = Preparer(feeds, seed, stage, collate, (process, processes, parts))
        self._batch_size, self._seed, self._stage = batch_size, seed, stage
        self._process, self._processes, self._workers = process, processes, workers
        self._batches: Generator[Made] | None = None
        self._state: dict[str, Any] | None = None
        #: bad and truncated examples that this process has met since it started
        self.bad = self.truncated = 0

    def batch(self, step: int) -> list[Any]:
        """This process's microbatches of `step`.

        Bad examples are replaced. ValueError, naming the source and the first reasons, once
        more than `max_bad_share` of an epoch is bad.
        """
        if self._batches is None:
            self._batches = self._ahead(step)
        made = next(self._batches)
        self.truncated += made.truncated
        return made.parts

    def state_dict(self) -> dict[str, Any]:
        """By feed: its place after the last batch, and the bad examples of its epoch."""
        state = self._state or self._places()
        return {
            name: {**state[name], "bad": bad.count if bad.epoch == state[name]["epoch"] else 0}
            for name, bad in zip(self._names, self._bad, strict=True)
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken. ValueError if streams or sources are not the same."""
        if set(state) != set(self._names):
            raise ValueError(f"the saved run had the streams {sorted(state)}, found {self._names}")
        for name, order, bad in zip(self._names, self._orders, self._bad, strict=True):
            order.load_state_dict(state[name])
            bad.epoch, bad.count, bad.reasons = state[name]["epoch"], state[name]["bad"], []
        self.close()
        self._state = None

    def close(self) -> None:
        """End the workers, if there are any."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def _places(self) -> dict[str, Any]:
        return {n: o.state_dict() for n, o in zip(self._names, self._orders, strict=True)}

    def _ahead(self, first: int) -> Generator[Made]:
        """The batches from step `first` on; workers read ahead, and the state does not."""
        waiting: deque[Drawn] = deque()

        def requests() -> Iterator[list[Slot]]:
            for step in count(first):
                waiting.append(self._draw(step))
                yield waiting[-1].requests

        for made in self._made(requests()):
            drawn = waiting.popleft()
            if made.pieces:
                found = zip(drawn.requests, made.pieces, drawn.windows, strict=True)
                settled = [self._settle(*slot) for slot in found]
                made = self._prepare.finish(settled, drawn.step)
            self._state = drawn.state
            yield made

    def _draw(self, step: int) -> Drawn:
        """Assign all slots of the global batch, which moves every feed on; keep our own."""
        draw = generator(self._seed, self._stage, step, "streams")
        uniform = torch.rand(self._batch_size, dtype=torch.float64, generator=draw)
        # right=True: a share of zero is an empty interval, and never drawn
        feeds = torch.searchsorted(self._shares, uniform, right=True).tolist()
        drawn = Drawn(step, [], [], {})
        for slot, feed in enumerate(feeds):
            entry = self._orders[feed].next()
            if slot % self._processes == self._process:
                drawn.requests.append(Slot(feed, step, slot, entry))
                drawn.windows.append(self._orders[feed].window)
        drawn.state.update(self._places())
        return drawn

    def _made(self, steps: Iterator[list[Slot]]) -> Iterator[Made]:
        if not self._workers:
            return (self._prepare[requests] for requests in steps)
        return iter(
            DataLoader(
                self._prepare,
                batch_size=None,  # a worker makes whole steps
                sampler=steps,
                num_workers=self._workers,
                worker_init_fn=_start_worker,
            )
        )

    def _settle(self, request: Slot, found: Prepared | str, window: Window) -> Prepared:
        """What was prepared; where that is bad, a random other example of the window."""
        if isinstance(found, Prepared):
            return found
        bad = self._bad[request.feed]
        self.bad += 1
        bad.add(found, window.epoch, window.seen)
        purpose = (self._seed, self._stage, request.step, request.slot, "substitute")
        for attempt in range(ATTEMPTS):
            draw = generator(*purpose, attempt)
            index = int(torch.randint(len(window.entries), (), generator=draw))
            other = self._prepare.prepare(replace(request, entry=window.entries[index]))
            if isinstance(other, Prepared):
                return other
        raise bad.too_many(f"{ATTEMPTS} of {ATTEMPTS} drawn at random in one window")


def _start_worker(worker: int) -> None:
    """A signal to stop is for the run, which ends its workers itself once it has saved."""
    del worker
    if hasattr(os, "setpgrp"):
        os.setpgrp()


def _cumulative_shares(ratios: Mapping[str, float]) -> torch.Tensor:
    for name, ratio in ratios.items():
        if not (math.isfinite(ratio) and ratio >= 0):
            raise ValueError(f"the ratio of {name} must be 0 or more, found {ratio}")
    if not sum(ratios.values()) > 0:
        raise ValueError(f"one ratio at least must be above 0, found {dict(ratios)}")
    total = torch.tensor(list(ratios.values()), dtype=torch.float64).cumsum(0)
    return total / total[-1]
