"""Which examples each step trains on: a mixture of streams, the same on every process.

Each slot of the global batch picks a stream by ratio, and then takes the next index of that
stream's own epoch, a permutation of its source. Both draws are functions of what they are for::

    stream of a slot          (seed, stage, step)    one uniform number per slot
    permutation of an epoch   (seed, stream, epoch)

so the only state is how far each stream has come, and a resumed run continues exactly. Every
process prepares the whole global batch and keeps its own part: whether an example is bad, which
moves all that follow, is then known everywhere without a word between processes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from unified.data.examples import Example
from unified.data.source import Source
from unified.data.streams import Prepared, Stream
from unified.randomness import generator

log = logging.getLogger(__name__)

#: reasons that a report or an error quotes
REASONS = 3


@dataclass(frozen=True)
class Feed:
    """A stream, the source its examples come from, and its relative frequency."""

    stream: Stream
    source: Source
    ratio: float = 1.0


class Epochs:
    """The endless sequence of one source's indices: a fresh permutation every epoch.

    `position` counts the indices given since the start of the stage, bad ones included, and `bad`
    those of the present epoch that turned out bad.
    """

    def __init__(self, feed: Feed, seed: int, max_bad_share: float):
        self._feed = feed
        self._seed = seed
        self._max_bad_share = max_bad_share
        self._permutation: tuple[int, list[int]] = (-1, [])
        self._reasons: list[str] = []
        self.position = 0
        self.bad = 0

    def next(self) -> int:
        """The next index; the first of a new epoch reports what was bad in the one before."""
        epoch, offset = divmod(self.position, len(self._feed.source))
        if offset == 0 and epoch > 0:
            self.report(epoch - 1)
            self.bad, self._reasons = 0, []
        if self._permutation[0] != epoch:
            draw = generator(self._seed, self._feed.stream.name, "epoch", epoch)
            order = torch.randperm(len(self._feed.source), generator=draw)
            self._permutation = (epoch, order.tolist())
        self.position += 1
        return self._permutation[1][offset]

    def reject(self, reason: str) -> None:
        """Count the index just given as bad; ValueError if that is too many for an epoch."""
        self.bad += 1
        if self.bad == 1:
            log.warning("skipping a bad example, the first of this epoch: %s", reason)
        self._reasons = [*self._reasons, reason][:REASONS]
        total = len(self._feed.source)
        if self.bad > self._max_bad_share * total or self.bad == total:
            raise ValueError(
                f"source {self._feed.source.name} has too many bad examples for"
                f" {self._feed.stream.name}: {self.bad} of {total}, where max_bad_share"
                f" {self._max_bad_share:g} is allowed; {'; '.join(self._reasons)}"
            )

    def report(self, epoch: int) -> None:
        """Log how many examples of a finished epoch were skipped, and why the first ones were."""
        if self.bad:
            log.warning(
                "source %s, stream %s, epoch %d: skipped %d of %d examples: %s",
                self._feed.source.name,
                self._feed.stream.name,
                epoch,
                self.bad,
                len(self._feed.source),
                "; ".join(self._reasons) or "before the run was resumed",
            )

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position, "bad": self.bad, "size": len(self._feed.source)}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        if state["size"] != len(self._feed.source):
            raise ValueError(
                f"source {self._feed.source.name} has {len(self._feed.source)} examples and had"
                f" {state['size']} when the run was saved; resume with the same shards"
            )
        self.position, self.bad = state["position"], state["bad"]
        self._reasons = []


class Mixture:
    """The global batches of one stage; call `batch` once per step, in order.

    `stage` names the stage, `batch_size` counts examples over all processes and accumulation
    steps. ValueError for ratios that are negative or all zero, and for two streams of one name.
    """

    def __init__(
        self,
        feeds: Sequence[Feed],
        *,
        batch_size: int,
        seed: int,
        stage: str,
        max_bad_share: float = 0.01,
    ):
        names = [feed.stream.name for feed in feeds]
        if len(set(names)) < len(names):
            raise ValueError(f"the streams of a mixture need different names, found {names}")
        self._shares = _cumulative_shares({f.stream.name: f.ratio for f in feeds})
        self._feeds = list(feeds)
        self._epochs = [Epochs(feed, seed, max_bad_share) for feed in feeds]
        self._batch_size, self._seed, self._stage = batch_size, seed, stage

    def batch(self, step: int) -> list[Prepared]:
        """The global batch of `step`, in the order of its slots.

        Bad examples are skipped: the next one of the same stream takes the slot. ValueError,
        naming the source and the first reasons, once an epoch has more than `max_bad_share`.
        """
        draw = generator(self._seed, self._stage, step, "streams")
        uniform = torch.rand(self._batch_size, dtype=torch.float64, generator=draw)
        # right=True: a share of zero is an empty interval, and never drawn
        streams = torch.searchsorted(self._shares, uniform, right=True).tolist()
        return [self._prepare(stream, step, slot) for slot, stream in enumerate(streams)]

    def _prepare(self, index: int, step: int, slot: int) -> Prepared:
        feed, epochs = self._feeds[index], self._epochs[index]
        while True:
            example = Example(feed.source[epochs.next()], feed.stream.modalities)
            draw = generator(self._seed, self._stage, step, slot, "prepare")
            try:
                observations = feed.stream.prepare(example, draw)
            except ValueError as error:
                epochs.reject(str(error))
                continue
            return Prepared(feed.stream.name, example.key, slot, observations)

    def state_dict(self) -> dict[str, Any]:
        """By stream: position, bad examples of this epoch, and size of the source. Plain ints."""
        return {
            f.stream.name: e.state_dict() for f, e in zip(self._feeds, self._epochs, strict=True)
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken. ValueError if streams or sources are not the same."""
        names = [f.stream.name for f in self._feeds]
        if set(state) != set(names):
            raise ValueError(f"the saved run had the streams {sorted(state)}, found {names}")
        for name, epochs in zip(names, self._epochs, strict=True):
            epochs.load_state_dict(state[name])


def _cumulative_shares(ratios: Mapping[str, float]) -> torch.Tensor:
    for name, ratio in ratios.items():
        if not (math.isfinite(ratio) and ratio >= 0):
            raise ValueError(f"the ratio of {name} must be 0 or more, found {ratio}")
    if not sum(ratios.values()) > 0:
        raise ValueError(f"one ratio at least must be above 0, found {dict(ratios)}")
    total = torch.tensor(list(ratios.values()), dtype=torch.float64).cumsum(0)
    return total / total[-1]
