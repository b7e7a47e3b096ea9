"""Packing: a folder or a table becomes shards.

Example i of the input has the key ``f"{i:09}"``, whatever else is packed, left out or shuffled. It
goes to ``val`` by a hash of its name in the input (a path, a line), so examples that come later
move none of those that were there. The same input gives the same bytes.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from unified.data.members import IMAGES, READERS, decode_image, read_member, split_item
from unified.data.tools.inputs import Input
from unified.errors import one_line

SHARD = re.compile(r"(train|val)-\d{5,}\.tar")
Members = dict[str, bytes]
Reader = Callable[[bytes], Any]


@dataclass(frozen=True)
class LeftOut:
    """An example that was not packed, by its name in the input, and why."""

    name: str
    reason: str


@dataclass
class Packed:
    """What was written (split -> shards, split -> examples; bytes of all members), and what not."""

    shards: dict[str, list[str]] = field(default_factory=dict)
    examples: dict[str, int] = field(default_factory=dict)
    bytes: int = 0
    left_out: list[LeftOut] = field(default_factory=list)


def pack(
    source: Input,
    out: Path,
    *,
    shard_size: int = 1000,
    shuffle: int | None = None,
    val_share: float = 0.01,
    overwrite: bool = False,
    workers: int | None = None,
    readers: Mapping[str, Reader] | None = None,
) -> Packed:
    """Write the examples of `source` to ``out/train-00000.tar``, ...; a share of them to ``val``.

    Each shard holds `shard_size` examples, the last one of a split fewer; one appears under its
    name when it is complete. `shuffle` is the seed of another order. Examples that cannot be used
    are left out; `readers` (by ending) look at members beside images, texts and records, and raise
    ValueError for bytes that are none. ValueError if nothing is left, or if `out` holds shards and
    `overwrite` is false; else shards that were there before are replaced or removed.
    """
    before = sorted(p.name for p in out.glob("*.tar") if SHARD.fullmatch(p.name))
    if before and not overwrite:
        raise ValueError(f"{out} holds shards already ({before[0]}); --overwrite replaces them")
    packed = Packed()
    train, val = (_Split(out, name, shard_size, packed) for name in ("train", "val"))

    def verify(members: Members) -> Members:
        return _verified(members, readers or {})

    for index, members in _read_all(source, _order(source, shuffle), verify, workers, packed):
        split = val if _share(source.name(index)) < val_share else train
        split.add(f"{index:09}", members)
    if not train.count + val.count:
        first = next((f": {b.name}: {b.reason}" for b in packed.left_out), "")
        raise ValueError(f"nothing can be packed, of {len(source)} examples{first}")
    for split in (train, val):
        split.flush()
    for name in set(before).difference(*packed.shards.values()):
        (out / name).unlink()
    return packed


class _Split:
    """The shards of one split; examples are held until there are enough for a shard."""

    def __init__(self, out: Path, name: str, size: int, packed: Packed):
        self._out, self._name, self._size, self._packed = out, name, size, packed
        self._held: list[tuple[str, Members]] = []
        self.count = 0

    def add(self, key: str, members: Members) -> None:
        self._held.append((key, members))
        self.count += 1
        if len(self._held) == self._size:
            self.flush()

    def flush(self) -> None:
        """Write what is held, if anything, as the next shard."""
        shards = self._packed.shards.setdefault(self._name, [])
        self._packed.examples[self._name] = self.count
        if self._held:
            shards.append(f"{self._name}-{len(shards):05}.tar")
            write_shard(self._out / shards[-1], self._held)
            self._packed.bytes += sum(len(b) for _, m in self._held for b in m.values())
            self._held = []


def write_shard(path: Path, examples: Iterable[tuple[str, Members]]) -> int:
    """A shard of (key, members), whose bytes are a function of these alone; how many there are."""
    from webdataset.writer import TarWriter

    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"user": "", "group": "", "mtime": 0, "encoder": False}
    count = 0
    with _whole(path) as file, TarWriter(file, **options) as tar:
        for key, members in examples:
            tar.write({"__key__": key, **members})
            count += 1
    return count


@contextmanager
def _whole(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which takes the place of `path` when the body succeeds."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            yield file
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _order(source: Input, shuffle: int | None) -> list[int]:
    indices = range(len(source))
    return sorted(indices, key=lambda i: 0.0 if shuffle is None else _share(f"{shuffle} {i}"))


def _share(name: str) -> float:
    """A number in [0, 1) that depends on the name and on nothing else."""
    data = name.encode("utf-8", "surrogateescape")  # a file's name may be other bytes
    return int.from_bytes(hashlib.blake2b(data, digest_size=6).digest()) / 2**48


def _read_all(
    source: Input,
    order: list[int],
    verify: Callable[[Members], Members],
    workers: int | None,
    packed: Packed,
) -> Iterator[tuple[int, Members]]:
    """(index, members) of the good examples in order; `packed` is told of the others."""
    from tqdm import tqdm

    def read(index: int) -> Members | str:
        try:
            return verify(source.read(index))
        except (ValueError, OSError) as error:
            return one_line(error)

    some = 32 * (workers or os.cpu_count() or 1)  # held at once, while the next ones are read
    with ThreadPoolExecutor(workers) as threads, tqdm(total=len(order), disable=None) as bar:
        for start in range(0, len(order), some):
            indices = order[start : start + some]
            for index, found in zip(indices, threads.map(read, indices), strict=True):
                bar.update()
                if isinstance(found, str):
                    packed.left_out.append(LeftOut(source.name(index), found))
                else:
                    yield index, found


def _verified(members: Members, readers: Mapping[str, Reader]) -> Members:
    """`members`, all of which can be read. ValueError names the one that cannot."""
    for ending, data in members.items():
        own = split_item(ending)[1]
        read_member(ending, data)
        if own in IMAGES:
            decode_image(data)
        elif own not in READERS and own in readers:
            readers[own](data)
    return members
