"""What `unified data check` says, as text and as JSON."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from unified.data.tools.check import ShardContents, SourceReport
from unified.tables import size, table

#: the shapes, width to height, that images are counted by; each goes to the nearest
SHAPES = ((1, 3), (1, 2), (9, 16), (2, 3), (3, 4), (1, 1), (4, 3), (3, 2), (16, 9), (2, 1), (3, 1))
RANKS = {"min": 0.0, "median": 0.5, "p95": 0.95, "max": 1.0}
#: splits that have epochs; shards that were named by themselves have no split
TRAINED = ("train", "")
#: findings that the text shows of each split
SHOWN = 20
#: what a spread of shard sizes does not change
EVEN = (
    "Every rank trains on the same number of examples, however shards differ in size: each step\n"
    "draws its batch from all of them."
)


def spread(counts: Counter[int]) -> dict[str, int]:
    """The values that stand at some ranks of all that a Counter counted; {} if it is empty."""
    values = sorted(counts)
    seen = list(accumulate(counts[value] for value in values))
    ranks = {name: max(math.ceil(share * counts.total()), 1) for name, share in RANKS.items()}
    return {name: values[bisect_left(seen, rank)] for name, rank in ranks.items() if values}


def sides(sizes: Counter[tuple[int, int]]) -> dict[str, int]:
    """Images by the side of a square of their area in pixels, between powers of two."""
    found: Counter[int] = Counter()
    for (width, height), count in sizes.items():
        found[1 << (math.isqrt(width * height).bit_length() - 1)] += count
    return {f"{low}-{2 * low - 1}": found[low] for low in sorted(found)}


def shapes(sizes: Counter[tuple[int, int]]) -> dict[str, int]:
    """Images by the nearest of `SHAPES`."""
    found: Counter[tuple[int, int]] = Counter()
    for (width, height), count in sizes.items():
        found[min(SHAPES, key=lambda s: abs(math.log(s[0] * height / (s[1] * width))))] += count
    return {f"{w}:{h}": found[w, h] for w, h in SHAPES if found[w, h]}


def epoch(examples: int, batch_size: int | None, ranks: int) -> dict[str, int] | None:
    """Whole steps of an epoch, examples of a rank in each, and the examples that are left.

    ValueError if the batch does not divide over the ranks.
    """
    if batch_size is None:
        return None
    if batch_size % ranks:
        raise ValueError(f"a batch of {batch_size} does not divide over {ranks} ranks")
    steps, rest = divmod(examples, batch_size)
    return {"steps": steps, "examples_per_rank": batch_size // ranks, "remainder": rest}


def total(reports: Sequence[SourceReport]) -> int:
    """How many findings there are."""
    return sum(len(report.found.bad) for report in reports)


def as_json(report: SourceReport, batch_size: int | None = None, ranks: int = 1) -> dict[str, Any]:
    """The report as plain data."""
    found, examples = report.found, sum(report.found.examples.values())
    return {
        "source": report.source,
        "split": report.split,
        "shards": len(found.examples),
        "examples": examples,
        "bytes": found.bytes,
        "members": dict(sorted(found.members.items())),
        "text_characters": spread(found.characters),
        "text_words": spread(found.words),
        "image_sides": sides(found.sizes),
        "image_shapes": shapes(found.sizes),
        "examples_per_shard": spread(Counter(found.examples.values())),
        "epoch": epoch(examples, batch_size, ranks) if report.split in TRAINED else None,
        "usable": {use: found.usable[use] for use in report.uses},
        "bad": [vars(bad) for bad in found.bad],
    }


def as_text(report: SourceReport, batch_size: int | None = None, ranks: int = 1) -> str:
    """The report as lines to read."""
    told = as_json(report, batch_size, ranks)
    name = f"{report.source} {report.split}".strip()
    shards = f"{told['shards']:,} shard{'s' * (told['shards'] != 1)}"
    rows = [row for row in _rows(told, batch_size, ranks) if row[1]]
    return "\n".join(
        [
            f"{name}: {shards}, {told['examples']:,} examples, {size(told['bytes'])}",
            *(f"  {line}" for line in table(rows, "l").splitlines()),
            *_findings(report.found),
        ]
    )


def _rows(told: Mapping[str, Any], batch_size: int | None, ranks: int) -> Iterator[tuple[str, str]]:
    yield "members", _counts({f".{ending}": n for ending, n in told["members"].items()})
    yield "characters", _counts(told["text_characters"])
    yield "words", _counts(told["text_words"])
    yield "image sides", _counts(told["image_sides"])
    yield "image shapes", _counts(told["image_shapes"])
    yield "in a shard", f"{_counts(told['examples_per_shard'])} examples"
    if told["epoch"]:
        steps, share, rest = told["epoch"].values()
        each = f", {share} on each of {ranks} ranks" if ranks > 1 else ""
        left = f"and {rest} that share a step with the next epoch"
        yield "an epoch", f"{steps:,} steps of {batch_size} examples{each}, {left}"
    for use, count in told["usable"].items():
        yield use, f"{count:,} of {told['examples']:,} examples have what it needs"


def _findings(found: ShardContents) -> list[str]:
    shown = [f"    {b.shard}{b.key and f', {b.key}'}: {b.reason}" for b in found.bad[:SHOWN]]
    more = len(found.bad) - len(shown)
    return [
        *([f"  bad: {len(found.bad):,}"] if found.bad else []),
        *shown,
        *([f"    and {more:,} more; --json has all"] if more else []),
    ]


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())
