"""Taking an item out of an example."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def take(example: Mapping[str, Any], modality: str, task: str) -> Any:
    """The example's item of `modality`. ValueError says what `task` needs and what is there."""
    if modality not in example:
        found = ", ".join(sorted(map(str, example))) or "nothing"
        raise ValueError(f"{task} needs an example with {modality!r}, found {found}")
    return example[modality]
