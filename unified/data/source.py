"""A source: the examples of one split of one named data set."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator

from unified.config.schema import DataConfig, SourceConfig
from unified.data.remote import ATTEMPTS, Access, local_path
from unified.data.shards import Entry, RawExample, check_shard, expand, index_shard

#: shards whose index is kept for the next one who asks
INDEXED = 64


class Source:
    """Examples in shards that are indexed when they are needed, and read one by one."""

    def __init__(self, name: str, urls: str | Iterable[str], access: Access | None = None):
        """`name` is what errors and reports call the source. ValueError or FileNotFoundError for
        shards that are not there, or may not be fetched."""
        self.name = name
        self.access = access or Access()
        self.urls = expand(urls)
        self._indexed: OrderedDict[str, list[Entry]] = OrderedDict()
        if not self.urls:
            raise ValueError(f"source {name} lists no shards; name at least one in data.sources")
        for url in self.urls:
            path = local_path(url)
            if path is None:
                self.access.check(url)
            else:
                check_shard(url, path)

    @classmethod
    def open(
        cls, name: str, config: SourceConfig, split: str = "train", access: Access | None = None
    ) -> Source:
        """The split ``train``, ``val``, or one of ``config.splits``."""
        splits = config.all_splits
        if split not in splits:
            raise ValueError(f"source {name} has no split {split}; it has {', '.join(splits)}")
        return cls(name, splits[split], access)

    def shard(self, url: str) -> list[Entry]:
        """The examples of one shard, in its order."""
        if url not in self._indexed:
            self._indexed[url] = index_shard(url, self.access.path(url))
            while len(self._indexed) > INDEXED:
                self._indexed.popitem(last=False)
        self._indexed.move_to_end(url)
        return self._indexed[url]

    def read(self, entry: Entry) -> RawExample:
        """The bytes of an example; a copy that was dropped meanwhile is fetched again."""
        if self.access.cache_gb is not None and local_path(entry.shard) is None:
            self.access.touch(entry.path)
        for _ in range(ATTEMPTS):
            try:
                return entry.read()
            except FileNotFoundError:
                self.access.path(entry.shard)
        return entry.read()

    @property
    def first(self) -> Entry:
        """The first example."""
        return self.shard(self.urls[0])[0]

    def __iter__(self) -> Iterator[RawExample]:
        """All examples, in the order of the shards."""
        return (self.read(entry) for url in self.urls for entry in self.shard(url))

    def __len__(self) -> int:
        """The number of examples, for which every shard must be indexed."""
        return sum(len(self.shard(url)) for url in self.urls)


def access_of(config: DataConfig) -> Access:
    """How shards may be fetched."""
    return Access(config.cache_dir, config.cache_gb, config.allow_pipes)
