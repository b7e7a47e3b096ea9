"""The examples that validation and evaluation look at: always the same ones."""

from __future__ import annotations

import logging

from unified.data.examples import Example
from unified.data.source import Source
from unified.data.streams import Prepared, Stream
from unified.randomness import generator

log = logging.getLogger(__name__)


def fixed_examples(source: Source, stream: Stream, count: int) -> list[Prepared]:
    """The first `count` good examples of `source`, in order (all of them where there are fewer).

    Bad ones are skipped with a warning; ValueError where none is good.
    """
    good: list[Prepared] = []
    reasons: list[str] = []
    for index, raw in enumerate(source):
        example = Example(raw, stream.modalities)
        try:
            drawn, cut = stream.prepare(example, generator("fixed", stream.name, index))
        except ValueError as error:
            reasons.append(str(error))
        else:
            good.append(Prepared(stream.name, example.key, len(good), drawn, cut))
        if len(good) == count:
            break
    if reasons and not good:
        raise ValueError(f"source {source.name} has no usable example: {reasons[0]}")
    if reasons:
        log.warning("%s: skipped %d bad examples: %s", source.name, len(reasons), reasons[0])
    return good
