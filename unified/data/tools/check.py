"""Checking: every shard is read from end to end, and what is wrong with it is told.

Training refuses a damaged shard and stops; here it is one finding among others. Shards are read in
processes of their own, each example by example, on nothing but `tarfile`.
"""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import IO, Any

from PIL import Image

from unified.config.plugins import Plugins, resolve_plugins
from unified.config.schema import Config
from unified.data.members import check_pixels, read_member, upright_size
from unified.data.remote import Access
from unified.data.shards import END_OF_TAR, RawExample, split_name
from unified.data.source import access_of
from unified.errors import one_line

#: members of a tar file begin at multiples of this many bytes
BLOCK = 512

Judge = Callable[[RawExample], tuple[list[str], list[str]]]


@dataclass(frozen=True)
class Finding:
    """A finding: the shard, the key of the example (empty: the shard as a whole), the reason."""

    shard: str
    key: str
    reason: str


@dataclass
class ShardContents:
    """What was found in one shard, or in several together."""

    #: shard -> its examples
    examples: dict[str, int] = field(default_factory=dict)
    bytes: int = 0
    #: ending -> members
    members: Counter[str] = field(default_factory=Counter)
    #: length of a text in characters, in words -> texts
    characters: Counter[int] = field(default_factory=Counter)
    words: Counter[int] = field(default_factory=Counter)
    #: (width, height) -> images
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    #: task or stage -> examples that it can use
    usable: Counter[str] = field(default_factory=Counter)
    bad: list[Finding] = field(default_factory=list)
    #: key -> the first shard that has it
    keys: dict[str, str] = field(default_factory=dict)

    def add(self, other: ShardContents) -> None:
        """Count in what was found in another shard; keys that both have are a finding."""
        for shard, examples in other.examples.items():
            self.examples[shard] = self.examples.get(shard, 0) + examples
        for name in ("members", "characters", "words", "sizes", "usable"):
            getattr(self, name).update(getattr(other, name))
        self.bytes += other.bytes
        self.bad += other.bad
        again: Counter[tuple[str, str]] = Counter()
        for key, shard in other.keys.items():
            again[shard, self.keys.setdefault(key, shard)] += 1
        for (shard, first), count in again.items():
            if first != shard:
                self.bad.append(Finding(shard, "", f"{count:,} of its keys are also in {first}"))

    def note(self, item: Any) -> None:
        """Count a member that was read."""
        if isinstance(item, str):
            self.characters[len(item)] += 1
            self.words[len(item.split())] += 1
        elif isinstance(item, Image.Image):
            self.sizes[upright_size(item)] += 1


@dataclass(frozen=True)
class SourceReport:
    """What was found in one split of one source, and which uses were asked about."""

    source: str
    split: str
    found: ShardContents
    uses: tuple[str, ...] = ()


def check_config(
    config: Config, trust_remote_code: bool = False, workers: int | None = None
) -> list[SourceReport]:
    """A report on every split of every source, with what the tasks and stages need of it.

    ValueError for a configuration whose parts do not fit.
    """
    named = {
        (name, split): urls
        for name, source in config.data.sources.items()
        for split, urls in source.all_splits.items()
    }
    plugins = resolve_plugins(config, trust_remote_code)
    return _check(named, _Asked(config, plugins), workers)


def check_shards(urls: Sequence[str], workers: int | None = None) -> list[SourceReport]:
    """One report on these shards. Of images only the headers are read."""
    return _check({("shards", ""): urls}, _Asked(), workers)


def scan(url: str, judge: Judge | None = None, access: Access | None = None) -> ShardContents:
    """Everything that is to be said of one shard. Nothing in it is an error."""
    tally = ShardContents(examples={url: 0})
    try:
        path = (access or Access()).path(url)
        tally.bytes = path.stat().st_size
        for key, run in groupby(_members(path), key=itemgetter(0)):
            _examine(tally, url, key, [(ending, data) for _, ending, data in run], judge)
        if not tally.examples[url]:
            raise ValueError("it has no examples")
    except FileNotFoundError as error:
        tally.bad.append(Finding(url, "", f"there is no file {error.filename}"))
    except (tarfile.TarError, ValueError, OSError) as error:
        tally.bad.append(Finding(url, "", f"damaged, cut short or no plain tar: {one_line(error)}"))
    return tally


def _examine(
    tally: ShardContents,
    url: str,
    key: str,
    found: Sequence[tuple[str, bytes]],
    judge: Judge | None,
) -> None:
    """Count one example in, with what is wrong with it."""
    members = dict(found)
    reasons = [f"it has {n} .{e} members" for e, n in Counter(e for e, _ in found).items() if n > 1]
    reasons += ["the key comes again, apart from its other members"] * (key in tally.keys)
    for ending, data in members.items():
        try:
            tally.note(item := read_member(ending, data))
            if isinstance(item, Image.Image) and judge is None:  # else its modality has a limit
                check_pixels(item)
        except ValueError as error:
            reasons.append(str(error))
    if judge is not None:
        wrong, usable = judge(RawExample(key, url, members))
        reasons = reasons or wrong
        tally.usable.update(usable)
    tally.keys.setdefault(key, url)
    tally.members.update(ending for ending, _ in found)
    tally.examples[url] += 1
    tally.bad += [Finding(url, key, reason) for reason in reasons]


def _members(path: Path) -> Iterator[tuple[str, str, bytes]]:
    """(key, ending, data) of every member. TarError or ValueError where the file is damaged."""
    with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        end = 0
        for info in tar:
            end = info.offset_data + -(-info.size // BLOCK) * BLOCK
            name = split_name(info.name)
            member = tar.extractfile(info) if info.isreg() else None
            if name and member:
                yield *name, member.read()
            tar.members.clear()  # type: ignore[attr-defined]
        _check_end(file, end)


def _check_end(file: IO[bytes], end: int) -> None:
    """ValueError unless zeros, and enough of them, are all that follows byte `end`.

    `tarfile` takes a cut between two members, or a damaged header, for the end.
    """
    file.seek(end)
    found = 0
    while part := file.read(1 << 20):
        found += len(part)
        if any(part):
            raise ValueError(f"no end mark at byte {end}, but more data")
    if found < END_OF_TAR:
        raise ValueError(f"no end mark at byte {end}, where the file ends")


# ---- in several processes ----------------------------------------------------------------------


@dataclass(frozen=True)
class _Asked:
    """The configuration whose sources are checked, if shards are not named by themselves; every
    process is handed it, and builds the modalities once."""

    config: Config | None = None
    plugins: Plugins | None = None

    @cached_property
    def needs(self) -> Mapping[str, Any]:
        """Source -> `Needs`."""
        from unified.data.tools.needs import needs

        return needs(self.config, self.plugins) if self.config and self.plugins else {}

    def scan(self, job: tuple[str, str]) -> ShardContents:
        """The shard of a (source, shard)."""
        source, url = job
        if self.config is None:
            return scan(url)
        return scan(url, self.needs[source].judge, access_of(self.config.data))


def _check(
    named: Mapping[tuple[str, str], Iterable[str]], asked: _Asked, workers: int | None
) -> list[SourceReport]:
    """A report for each (source, split)."""
    from webdataset.shardlists import expand_urls

    places = [(at, url) for at, urls in named.items() for u in urls for url in expand_urls(u)]
    jobs = [(source, url) for (source, _), url in places]
    uses = {source: tuple(need.uses) for source, need in asked.needs.items()}
    reports = {at: SourceReport(*at, ShardContents(), uses.get(at[0], ())) for at in named}
    found = _tallies(asked, jobs, workers or os.cpu_count() or 1)
    for (at, _), tally in zip(places, found, strict=True):
        reports[at].found.add(tally)
    return list(reports.values())


def _tallies(
    asked: _Asked, jobs: Sequence[tuple[str, str]], workers: int
) -> Iterator[ShardContents]:
    """One per shard, in order."""
    from tqdm import tqdm

    with tqdm(total=len(jobs), unit="shard", disable=None) as bar:
        if workers == 1 or len(jobs) == 1:
            for job in jobs:
                yield asked.scan(job)
                bar.update()
            return
        handed = _Asked(asked.config, asked.plugins)
        with ProcessPoolExecutor(min(workers, len(jobs)), None, _hand, (handed,)) as processes:
            for tally in processes.map(_scan, jobs):
                yield tally
                bar.update()


#: in a process of the pool: what it was handed
_handed: list[_Asked] = []


def _hand(asked: _Asked) -> None:
    _handed[:] = [asked]


def _scan(job: tuple[str, str]) -> ShardContents:
    return _handed[0].scan(job)
