"""Shards: tar files in the img2dataset layout, read as raw bytes.

A shard holds examples one after the other, and the members of an example share a key::

    000000.webp  000000.txt  000000.json  000001.webp  000001.txt  000001.json  ...

Nothing is decoded here. WebDataset's decoders would unpickle a ``.pyd`` or ``.pth`` member, and its
``pipe:`` URLs would run a command, so neither is used: data cannot run code.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

EMBEDDED = "embedded:"
#: a tar file ends with this many zero bytes (two empty blocks)
END_OF_TAR = 1024


@dataclass(frozen=True)
class RawExample:
    """One example: its key, its shard, and its members by ending (``"webp"``, ``"txt"``)."""

    key: str
    shard: str
    members: dict[str, bytes]


def read_shards(urls: str | Iterable[str]) -> list[RawExample]:
    """All examples of `urls`, in order; every process reads every shard.

    A URL is a path (relative to the working directory; ``~`` is the home folder) or
    ``embedded:NAME``, and may hold braces: ``train-{00000..00003}.tar``. ValueError or
    FileNotFoundError for a shard that is missing, empty, cut short or not a local file.
    """
    from webdataset.shardlists import expand_urls

    patterns = [urls] if isinstance(urls, str) else list(urls)
    for pattern in patterns:
        _refuse_remote(pattern)
    return [e for p in patterns for url in expand_urls(p) for e in _read_shard(url)]


def resolve(url: str) -> Path:
    """The file that `url` names."""
    if url.startswith(EMBEDDED):
        return Path(str(files("unified.demos") / "data" / url.removeprefix(EMBEDDED)))
    return Path(url).expanduser().absolute()


def _refuse_remote(url: str) -> None:
    scheme = re.match(r"([A-Za-z][\w+.-]+):", url)
    if url.startswith("pipe:"):
        raise ValueError(f"{url!r} would run a command; give the path of a shard file instead")
    if scheme and not url.startswith(EMBEDDED):
        raise ValueError(
            f"{url!r} is not a local file ({scheme[1]}:); download the shard and give its path"
        )


def _read_shard(url: str) -> list[RawExample]:
    path = resolve(url)
    if not path.is_file():
        raise FileNotFoundError(
            f"shard {url} was not found at {path}; correct the path in data.sources"
        )
    if not path.stat().st_size:
        raise ValueError(f"shard {url} is empty (0 bytes); write or fetch it again")
    try:
        _check_complete(path)
        examples = [RawExample(s["__key__"], url, _members(s)) for s in _samples(path)]
    except (tarfile.TarError, ValueError) as error:
        raise ValueError(
            f"shard {url} is damaged, cut short or not a plain tar file ({error.args[0]});"
            " write or fetch it again"
        ) from error
    if not examples:
        raise ValueError(f"shard {url} has no examples; write it again or remove it from the list")
    return examples


def _samples(path: Path) -> Iterator[dict[str, Any]]:
    import webdataset as wds

    # Every process draws the same global batch and keeps its part, so no shard is left to another
    # node: the splitter passes all of them on. (The default one raises when WORLD_SIZE is above 1.)
    return iter(
        wds.WebDataset(
            str(path),
            shardshuffle=False,
            nodesplitter=lambda shards: shards,
            workersplitter=lambda shards: shards,
            empty_check=False,
        )
    )


def _members(sample: dict[str, Any]) -> dict[str, bytes]:
    return {name: data for name, data in sample.items() if not name.startswith("__")}


def _check_complete(path: Path) -> None:
    """ValueError unless only zeros, and enough of them, follow the last member.

    Readers of tar files take a cut between two members, or a damaged header, for the end.
    """
    with tarfile.open(path, "r:") as tar:
        members = tar.getmembers()
    end = members[-1].offset_data + -(-members[-1].size // 512) * 512 if members else 0
    with path.open("rb") as file:
        file.seek(end)
        rest = file.read()
    if len(rest) < END_OF_TAR or any(rest):
        raise ValueError(f"no end mark at byte {end}, after {len(members)} members")
