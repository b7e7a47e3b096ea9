"""What can be packed: a folder of files, or a table of rows. Each is a list of examples.

An example is read as its members, ending -> bytes, and the bytes are those of the input. Which
files are items, the modalities say; an example may have several of one modality, by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import date, time
from operator import itemgetter
from pathlib import Path
from typing import Any, Protocol

from unified.data.members import ENDINGS, IMAGES, items_of, join_item, open_image, split_item
from unified.errors import did_you_mean
from unified.latents.modality import Modality

#: a member that is no item of any modality
RECORD = "json"
NAME = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")

#: name of a modality -> its class
Kinds = Mapping[str, type[Modality]]


class Input(Protocol):
    """The examples of one input, in order."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What the example is called in the input: a path, a line."""

    def read(self, index: int) -> dict[str, bytes]:
        """Its members. ValueError or OSError says why it cannot be packed."""


def open_input(
    source: Path, kinds: Kinds, columns: Mapping[str, str], items: Sequence[str] = ()
) -> Input:
    """`source` as what can be packed: a folder, in which an example may have further `items` by
    name, or a table, whose `columns` hold items (``image``, ``source.image``).

    ValueError for what is neither a folder nor a table, and for names and columns that are missing
    or make no sense.
    """
    for name in (*items, *(item for item in map(itemgetter(0), map(split_item, columns)) if item)):
        if not NAME.fullmatch(name):
            raise ValueError(f"an item's name has small letters, digits, _ and -, found {name!r}")
    if source.is_dir():
        if columns:
            first = next(iter(columns.values()))
            raise ValueError(f"{source} is a folder and has no column {first!r}: drop the option")
        return Folder(source, kinds, items)
    if not source.exists():
        raise FileNotFoundError(f"{source} was not found: name a folder, a .jsonl or a .parquet")
    if source.suffix not in TABLES:
        raise ValueError(f"{source} should be a folder, or a table in {' or '.join(TABLES)}")
    if not columns or items:
        raise ValueError(
            f"say which column of {source} to pack: --image-column, --text-column, or"
            " --item NAME.MODALITY=COLUMN"
        )
    for item in columns:
        if split_item(item)[1] not in kinds:
            raise ValueError(f"no modality holds {item!r}; {did_you_mean(item, kinds)}")
    return Table(source, TABLES[source.suffix](source), kinds, columns)


class Folder:
    """Images (or the items of any modality that are no texts) with ``.txt`` and ``.json`` of the
    same name beside them, at any depth.

    Where there is no image at all, every ``.txt`` is an example by itself. Hidden files are none.
    With `items` (``source``), ``cat.source.png`` belongs to the example ``cat``.
    """

    def __init__(self, folder: Path, kinds: Kinds, items: Sequence[str] = ()):
        self._items = sorted(["", *(f".{item}" for item in items)], key=len)
        self._extensions = {name: cls.extensions for name, cls in kinds.items()}
        self._texts = {name for name, cls in kinds.items() if cls.is_text}
        files: dict[str, list[tuple[str, Path]]] = {}
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder)
            if path.is_file() and not any(part.startswith(".") for part in name.parts):
                stem, item = self._split(name.with_suffix("").as_posix())
                files.setdefault(stem, []).append((join_item(item, _ending(path)), path))
        self._files = sorted(files.items())
        found = {m for _, members in self._files for e, _ in members for m in self._plain(e)}
        self._shown = [name for name in kinds if name in found - self._texts]

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        return self._files[index][0]

    def read(self, index: int) -> dict[str, bytes]:
        _, paths = self._files[index]
        self._check_unique(paths)
        shown = [e for e, _ in paths if self._plain(e) - self._texts]
        others = [p.name for e, p in paths if not self._known(e)]
        if others and not shown:
            raise ValueError(f"{others[0]} is none of .{', .'.join(self._endings())}")
        if self._shown and not shown:
            raise ValueError(f"it has no {' and no '.join(self._shown)}")
        if not shown and not any(self._plain(e) for e, _ in paths):
            raise ValueError("it has no text")
        return {e: path.read_bytes() for e, path in paths if self._known(e)}

    def _split(self, stem: str) -> tuple[str, str]:
        """("cat", "source") of ``cat.source``."""
        item = next(i for i in reversed(self._items) if stem.lower().endswith(i))
        return stem[: len(stem) - len(item)], item.removeprefix(".")

    def _plain(self, ending: str) -> set[str]:
        """The modalities whose item without a name is in members of this ending."""
        return {m for m, own in self._extensions.items() if ending in own}

    def _known(self, ending: str) -> bool:
        return ending == RECORD or bool(items_of(ending, self._extensions))

    def _endings(self) -> list[str]:
        """All that an example may have, texts last."""
        ordered = sorted(self._extensions.items(), key=lambda pair: pair[0] in self._texts)
        return [e for _, own in ordered for e in own] + [RECORD]

    def _check_unique(self, paths: Sequence[tuple[str, Path]]) -> None:
        """ValueError for two members that are the same item."""
        places: dict[tuple[str, str], list[str]] = {}
        for ending, path in paths:
            for place in items_of(ending, self._extensions):
                places.setdefault(place, []).append(path.name)
        for (item, modality), names in places.items():
            if len(names) > 1:
                what = join_item(item, modality)
                raise ValueError(f"it has {len(names)} {what}s: {', '.join(names)}")


class Table:
    """Rows whose `columns` hold items: a text is itself, anything else a path (within the table's
    folder) or bytes. All other columns become the ``.json``."""

    def __init__(self, path: Path, rows: Rows, kinds: Kinds, columns: Mapping[str, str]):
        self._folder, self._rows = path.parent.resolve(), rows
        self._kinds, self._columns = kinds, columns

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        return self._rows.name(index)

    def read(self, index: int) -> dict[str, bytes]:
        row = dict(self._rows[index])
        members: dict[str, bytes] = {}
        for column in self._columns.values():
            if column not in row:
                raise ValueError(f"it has no column {column!r}; {did_you_mean(column, row)}")
        for name, column in self._columns.items():
            item, modality = split_item(name)
            ending, data = self._item(row.pop(column), modality, column)
            members[join_item(item, ending)] = data
        if row:
            members[RECORD] = _record(row)
        return members

    def _item(self, cell: Any, modality: str, column: str) -> tuple[str, bytes]:
        """(ending, bytes) of one item."""
        cls = self._kinds[modality]
        if cls.is_text:
            return cls.extensions[0], _text(cell, column)
        if isinstance(cell, Mapping):  # how the data sets of Hugging Face hold an image
            cell = cell.get("bytes") or cell.get("path")
        if isinstance(cell, bytes):
            pictures = set(cls.extensions) <= set(IMAGES)
            return ENDINGS[str(open_image(cell).format)] if pictures else cls.extensions[0], cell
        if not isinstance(cell, str) or not cell:
            raise ValueError(f"its column {column} should be a path or bytes, found {cell!r}")
        path = (self._folder / cell).resolve()
        if not path.is_relative_to(self._folder):
            raise ValueError(f"{cell} leaves the table's folder {self._folder}")
        if _ending(path) not in cls.extensions:
            raise ValueError(f"{cell} is no {modality} in .{', .'.join(cls.extensions)}")
        return _ending(path), path.read_bytes()


class Rows(Protocol):
    """The rows of a table."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


class JsonLines:
    """A table with one JSON object a line; where each line begins is held, the lines are not."""

    def __init__(self, path: Path):
        self._path = path
        self._lines: list[tuple[int, int]] = []  # (number, first byte)
        start = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                self._lines += [(number, start)] if line.strip() else []
                start += len(line)

    def __len__(self) -> int:
        return len(self._lines)

    def name(self, index: int) -> str:
        return f"line {self._lines[index][0]}"

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        with self._path.open("rb") as file:
            file.seek(self._lines[index][1])
            line = file.readline()
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"it is no JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"it should be an object, found {type(row).__name__}")
        return row


class Parquet:
    """A parquet table, held in memory; reading it needs pyarrow."""

    def __init__(self, path: Path):
        try:
            from pyarrow import parquet
        except ImportError:
            raise ValueError(f"{path}: parquet needs pyarrow; pip install pyarrow") from None
        self._table = parquet.read_table(path)

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def name(self, index: int) -> str:
        return f"row {index + 1}"

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        (row,) = self._table.slice(index, 1).to_pylist()
        return dict(row)


TABLES: Mapping[str, Callable[[Path], Rows]] = {".jsonl": JsonLines, ".parquet": Parquet}


def _ending(path: Path) -> str:
    return path.suffix.removeprefix(".").lower()


def _text(cell: Any, column: str) -> bytes:
    if not isinstance(cell, str):
        raise ValueError(f"its column {column} should be a text, found {cell!r:.60}")
    return cell.encode("utf-8")


def _record(row: Mapping[str, Any]) -> bytes:
    try:
        text = json.dumps(row, ensure_ascii=False, allow_nan=False, default=_plain)
    except (TypeError, ValueError) as error:
        raise ValueError(f"its other columns make no .json: {error}") from None
    return text.encode("utf-8")


def _plain(value: Any) -> str:
    """Dates and times as text; TypeError for what JSON has no word for."""
    if isinstance(value, date | time):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
