"""Shards: tar files in the img2dataset layout, indexed once and then read at any place.

A shard holds examples one after the other, and the members of an example share a key::

    000000.webp  000000.txt  000000.json  000001.webp  000001.txt  000001.json  ...

An ending may have parts: ``000000.source.webp`` is the member ``source.webp``, a further image.

Reading the headers gives each example's `Entry`: where its bytes lie. That, and not a stream, is
what makes an order of examples that any process can continue at any place.

Nothing is decoded here. WebDataset's decoders would unpickle a ``.pyd`` or ``.pth`` member, so they
are not used: data cannot run code.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from unified.data.remote import Access

#: a tar file ends with this many zero bytes (two empty blocks)
END_OF_TAR = 1024


@dataclass(frozen=True)
class RawExample:
    """One example: its key, its shard, and its members by ending (``"webp"``, ``"txt"``)."""

    key: str
    shard: str
    members: dict[str, bytes]


@dataclass(frozen=True)
class Entry:
    """Where an example lies: its shard's URL and file, and (offset, size) of each member there."""

    key: str
    shard: str
    path: Path
    members: dict[str, tuple[int, int]]

    def read(self) -> RawExample:
        """The bytes of all members, in one read: they stand next to each other."""
        start = min(offset for offset, _ in self.members.values())
        stop = max(offset + size for offset, size in self.members.values())
        with self.path.open("rb", buffering=0) as file:
            file.seek(start)
            data = file.read(stop - start)
        cut = {m: data[o - start : o - start + n] for m, (o, n) in self.members.items()}
        return RawExample(self.key, self.shard, cut)


def expand(urls: str | Iterable[str]) -> list[str]:
    """The shards that `urls` name, in order; braces count: ``train-{00000..00003}.tar``."""
    from webdataset.shardlists import expand_urls

    patterns = [urls] if isinstance(urls, str) else list(urls)
    return [url for pattern in patterns for url in expand_urls(pattern)]


def read_shards(urls: str | Iterable[str], access: Access | None = None) -> list[RawExample]:
    """All examples of `urls`, in order.

    A URL is a path (relative to the working directory; ``~`` is the home folder),
    ``embedded:NAME``, or whatever `access` can fetch. ValueError or FileNotFoundError for a shard
    that is missing, empty, cut short or may not be fetched.
    """
    access = access or Access()
    return [entry.read() for url in expand(urls) for entry in index_shard(url, access.path(url))]


def check_shard(url: str, path: Path) -> None:
    """What a glance tells: ValueError or FileNotFoundError unless the file has a beginning and an
    end. (`index_shard` looks at all of it.)"""
    if not path.is_file():
        raise FileNotFoundError(
            f"shard {url} was not found at {path}; correct the path in data.sources"
        )
    size = path.stat().st_size
    if not size:
        raise ValueError(f"shard {url} is empty (0 bytes); write or fetch it again")
    with path.open("rb") as file:
        file.seek(max(0, size - END_OF_TAR))
        if len(last := file.read()) < END_OF_TAR or any(last):
            raise _damaged(url, f"its last {END_OF_TAR} bytes are no end mark")


def _damaged(url: str, reason: object) -> ValueError:
    return ValueError(
        f"shard {url} is damaged, cut short or not a plain tar file ({reason}); write or fetch it"
        " again"
    )


def index_shard(url: str, path: Path) -> list[Entry]:
    """The examples of one shard. ValueError if it is damaged, cut short or without examples."""
    check_shard(url, path)
    try:
        with tarfile.open(path, "r:") as tar:
            members = tar.getmembers()
        _check_end(path, members)
        entries = list(_grouped(members, url, path))
    except (tarfile.TarError, ValueError) as error:
        raise _damaged(url, error.args[0]) from error
    if not entries:
        raise ValueError(f"shard {url} has no examples; write it again or remove it from the list")
    return entries


def split_name(name: str) -> tuple[str, str] | None:
    """(key, ending) of a member: the ending is what follows the first dot of the file's name."""
    from webdataset.tariterators import base_plus_ext

    key, ending = base_plus_ext(name)
    return (key, ending.lower()) if key else None


def _grouped(members: Iterable[tarfile.TarInfo], url: str, path: Path) -> Iterator[Entry]:
    """One entry for each run of members that share a key."""
    key, found = None, dict[str, tuple[int, int]]()
    for member in members:
        name = split_name(member.name) if member.isreg() else None
        if name is None:
            continue
        if name[0] != key and key is not None:
            yield Entry(key, url, path, found)
        if name[0] != key:
            key, found = name[0], {}
        if name[1] in found:
            raise ValueError(f"duplicate member {member.name}")
        found[name[1]] = (member.offset_data, member.size)
    if key is not None:
        yield Entry(key, url, path, found)


def _check_end(path: Path, members: list[tarfile.TarInfo]) -> None:
    """ValueError unless only zeros, and enough of them, follow the last member.

    Readers of tar files take a cut between two members, or a damaged header, for the end.
    """
    end = members[-1].offset_data + -(-members[-1].size // 512) * 512 if members else 0
    with path.open("rb") as file:
        file.seek(end)
        rest = file.read()
    if len(rest) < END_OF_TAR or any(rest):
        raise ValueError(f"no end mark at byte {end}, after {len(members)} members")
