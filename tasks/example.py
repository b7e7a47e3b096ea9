"""Taking an item out of an example."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def take(example: Mapping[str, Any], modality: str, task: str, field: str | None = None) -> Any:
    """The example's item of `modality`; with a `field`, the text at that place of its ``.json``.

    A field is a path with dots, in which a number counts the entries of a list: ``answers.0``. An
    example that is a plain mapping holds its fields itself. ValueError says what `task` needs and
    what is there.
    """
    if field is not None:
        return _text(getattr(example, "metadata", example), field, task)
    if modality not in example:
        raise ValueError(f"{task} needs an example with {modality!r}, found {_names(example)}")
    return example[modality]


def _text(record: Mapping[str, Any], field: str, task: str) -> str:
    value: Any = record
    for key in field.split("."):
        try:
            value = value[int(key) if isinstance(value, list) else key]
        except (LookupError, TypeError, ValueError):
            raise ValueError(
                f"{task} needs a .json with the field {field!r}, found {_names(value)}"
            ) from None
    if isinstance(value, str):
        return value
    hint = f"; {field}.0 is its first entry" if isinstance(value, list) else ""
    raise ValueError(
        f"{task} needs a text in the field {field!r} of the .json, found a"
        f" {type(value).__name__}{hint}"
    )


def _names(value: Any) -> str:
    """What there is to choose from in a mapping; of anything else, what it is."""
    if isinstance(value, Mapping):
        return ", ".join(sorted(map(str, value))) or "nothing"
    many = f" of {len(value)}" if isinstance(value, list) else ""
    return f"a {type(value).__name__}{many}"
