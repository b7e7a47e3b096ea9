"""A source: the examples of one split of one named data set."""

from __future__ import annotations

from collections.abc import Iterable

from unified.config import SourceConfig
from unified.data.shards import RawExample, read_shards


class Source:
    """All raw examples of one split, held in memory as the bytes that the shards hold.

    Memory is the size of the shards, in every process: right for what fits (a few GB: a hundred
    thousand small images, or a million captions), and what makes a permutation of a whole epoch,
    and so an exact resume, possible.
    """

    def __init__(self, name: str, urls: str | Iterable[str]):
        """Reads `urls` (see `read_shards`); `name` is what errors and reports call the source."""
        self.name = name
        self._examples = read_shards(urls)
        if not self._examples:
            raise ValueError(f"source {name} lists no shards; name at least one in data.sources")

    @classmethod
    def open(cls, name: str, config: SourceConfig, split: str = "train") -> Source:
        """The split ``train``, ``val``, or one of ``config.splits``."""
        splits = {"train": config.train, "val": config.val, **config.splits}
        found = [known for known, urls in splits.items() if urls]
        if split not in found:
            raise ValueError(f"source {name} has no split {split}; it has {', '.join(found)}")
        return cls(name, splits[split])

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> RawExample:
        return self._examples[index]
