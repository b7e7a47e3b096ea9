"""An example as tasks see it: a mapping from modality names to items."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from unified.data.members import items_of, join_item, split_item
from unified.data.shards import RawExample
from unified.latents.modality import Modality


class BadExampleError(ValueError):
    """An example that cannot be used; the message names its shard and key."""


class Example(Mapping[str, Any]):
    """``example["image"]`` is the item that the image modality reads from the example's members.

    There may be several items of a modality, by name: ``example["source.image"]`` is read from the
    member ``KEY.source.webp``. What follows the last dot is the modality, or the member's ending;
    what stands before it is the item's name.

    An item is read when it is asked for, from the first of the modality's `extensions` that the
    example has. BadExampleError (a ValueError) for a member that is missing or cannot be read; ask
    ``"image" in example`` first where an item is optional. Iteration gives the names of all items.
    """

    def __init__(self, raw: RawExample, modalities: Mapping[str, Modality]):
        self.raw = raw
        self._modalities = modalities

    @property
    def key(self) -> str:
        return self.raw.key

    @property
    def shard(self) -> str:
        return self.raw.shard

    @property
    def metadata(self) -> dict[str, Any]:
        """The ``.json`` member, or ``{}`` where there is none."""
        with self.naming():
            metadata = json.loads(self.raw.members.get("json", b"{}"))
            if not isinstance(metadata, dict):
                raise ValueError(f".json must hold an object, found {type(metadata).__name__}")
            return metadata

    def __getitem__(self, name: str) -> Any:
        modality = self._modalities[split_item(name)[1]]
        member = self._member(name)
        with self.naming():
            if member is None:
                raise ValueError(
                    f"no member for {name} (.{', .'.join(self._endings(name))}); found"
                    f" .{', .'.join(self.raw.members)}"
                )
            return modality.read(self.raw.members[member])

    def __contains__(self, name: object) -> bool:
        known = split_item(str(name))[1] in self._modalities
        return known and self._member(str(name)) is not None

    def __iter__(self) -> Iterator[str]:
        """In the order of the modalities; those without a name of their own first."""
        extensions = {name: m.extensions for name, m in self._modalities.items()}
        order = list(extensions)
        found = {pair for ending in self.raw.members for pair in items_of(ending, extensions)}
        ranked = sorted(found, key=lambda pair: (order.index(pair[1]), pair[0]))
        return (join_item(item, modality) for item, modality in ranked)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Within it, a ValueError becomes a BadExampleError that says where the example is."""
        try:
            yield
        except BadExampleError:
            raise
        except ValueError as error:
            raise BadExampleError(f"shard {self.shard}, example {self.key}: {error}") from error

    def _endings(self, name: str) -> list[str]:
        """The endings of the members that an item may be read from, best first."""
        item, modality = split_item(name)
        return [join_item(item, e) for e in self._modalities[modality].extensions]

    def _member(self, name: str) -> str | None:
        return next((e for e in self._endings(name) if e in self.raw.members), None)
