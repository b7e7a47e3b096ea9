"""Prepare the next steps in a background thread while this one computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def prefetch(
    make: Callable[[int], T], start: int, stop: int, depth: int = 2
) -> Generator[T, None, None]:
    """``make(start) .. make(stop - 1)`` in order, up to `depth` of them ahead of the consumer.

    One thread makes all of them, one after the other, so `make` may keep state; what it yields is
    what it yields inline (depth 0). Since the state then runs ahead of the consumer, let `make`
    return the state along with its result::

        steps = prefetch(lambda step: (mixture.batch(step), mixture.state_dict()), 0, 1000)

    An exception in `make` reaches the consumer at its turn. A consumer that stops early closes the
    iterator (``contextlib.closing``): that waits for the call in flight and drops the others.
    """
    if depth < 0:
        raise ValueError(f"the depth of prefetching is 0 (none) or more, found {depth}")
    if depth == 0:
        yield from map(make, range(start, stop))
        return
    pending: deque[Future[T]] = deque()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch") as thread:
        try:
            for step in range(start, stop):
                pending.append(thread.submit(make, step))
                if len(pending) > depth:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
