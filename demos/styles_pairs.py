"""Make shards for the task ``editing``: the same thing in two styles, and what turns one into the
other.

    python -m unified.demos.styles_pairs OUT SHARD... [seed=N] [split=NAME]

reads shards of pictures whose ``.json`` has a ``name`` and a ``style`` (those of ``embedded:emoji``
have), and writes ``OUT/SPLIT-00000.tar``, ... (``train`` unless a split is named) with

    KEY.source.webp   a name in one style         KEY.txt    "as a silhouette", the other style
    KEY.webp          the name in that style      KEY.json   name, from, to, and both sources

Every picture is the target once, if its name comes in another style; which of those is the source,
the seed and the picture decide, and nothing else.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from unified.data.members import IMAGES
from unified.data.shards import RawExample, read_shards
from unified.data.tools.pack import write_shard
from unified.errors import one_line
from unified.randomness import derive

USAGE = "usage: python -m unified.demos.styles_pairs OUT SHARD... [seed=N] [split=NAME]"
SHARD_SIZE = 1000
#: styles that are told by more than "as a STYLE emoji"
TOLD = {name: f"as a {name}" for name in ("silhouette", "cartoon", "blob")} | {
    "line art": "as line art"
}

Members = dict[str, bytes]


def instruction(style: str) -> str:
    """What is asked for: "as a silhouette", "as a shiny emoji"."""
    return TOLD.get(style, f"as a {style} emoji")


def by_name(examples: Sequence[RawExample]) -> dict[str, list[tuple[str, RawExample]]]:
    """Name -> (style, example) of each picture of it. ValueError for a record without either."""
    found: dict[str, list[tuple[str, RawExample]]] = {}
    for example in examples:
        record = _record(example)
        if not (record.get("name") and record.get("style")):
            raise ValueError(
                f"shard {example.shard}, example {example.key}: a .json with a name and a style is"
                f" needed, found {', '.join(record) or 'nothing'}"
            )
        found.setdefault(record["name"], []).append((record["style"], example))
    return found


def pairs(examples: Sequence[RawExample], seed: int = 0) -> Iterator[Members]:
    """The members of every pair, in the order of the targets."""
    named = by_name(examples)
    for example in examples:
        record = _record(example)
        others = [(s, e) for s, e in named[record["name"]] if s != record["style"]]
        if others:
            place = derive(seed, record["name"], record["style"], example.key) % len(others)
            yield _members(example, record, *others[place])


def _members(target: RawExample, record: dict[str, Any], style: str, source: RawExample) -> Members:
    told = {
        "name": record["name"],
        "from": style,
        "to": record["style"],
        "source": _record(source),
        "target": record,
    }
    source_ending, source_data = _picture(source)
    ending, data = _picture(target)
    return {
        f"source.{source_ending}": source_data,
        ending: data,
        "txt": instruction(record["style"]).encode(),
        "json": json.dumps(told, ensure_ascii=False).encode(),
    }


def _record(example: RawExample) -> dict[str, Any]:
    record = json.loads(example.members.get("json", b"{}"))
    return record if isinstance(record, dict) else {}


def _picture(example: RawExample) -> tuple[str, bytes]:
    """(ending, bytes) of the example's image."""
    for ending in IMAGES:
        if ending in example.members:
            return ending, example.members[ending]
    raise ValueError(f"shard {example.shard}, example {example.key}: it has no image")


def write(out: Path, shards: Sequence[str], seed: int = 0, split: str = "train") -> list[Path]:
    """Write the shards of pairs; returns them. ValueError if no name comes in two styles."""
    made = list(pairs(read_shards(shards), seed))
    if not made:
        raise ValueError(f"no name comes in two styles in {', '.join(shards)}")
    written = []
    for start in range(0, len(made), SHARD_SIZE):
        path = out / f"{split}-{start // SHARD_SIZE:05}.tar"
        keyed = enumerate(made[start : start + SHARD_SIZE], start)
        write_shard(path, ((f"{index:09}", members) for index, members in keyed))
        written.append(path)
    return written


def main(arguments: Sequence[str]) -> None:
    """Run the demo; a mistake ends in one line on stderr and exit code 2."""
    options = dict(a.split("=", 1) for a in arguments if a.startswith(("seed=", "split=")))
    out, *shards = [a for a in arguments if not a.startswith(("seed=", "split="))] or [""]
    if not shards or out.startswith("-"):
        print(USAGE)
        return
    try:
        seed = int(options.get("seed", 0))
        for path in write(Path(out), shards, seed, options.get("split", "train")):
            print(path)
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main(sys.argv[1:])
