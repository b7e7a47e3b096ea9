"""What can be packed: a folder of files, or a table of rows. Each is a list of examples.

An example is read as its members, ending -> bytes, and the bytes are those of the input.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import date, time
from pathlib import Path
from typing import Any, Protocol

from unified.data.members import ENDINGS, IMAGES, open_image
from unified.errors import did_you_mean

MEMBERS = (*IMAGES, "txt", "json")


class Input(Protocol):
    """The examples of one input, in order."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What the example is called in the input: a path, a line."""

    def read(self, index: int) -> dict[str, bytes]:
        """Its members. ValueError or OSError says why it cannot be packed."""


def open_input(source: Path, image_column: str | None, text_column: str | None) -> Input:
    """`source` as what can be packed. ValueError for what is neither a folder nor a table, and for
    columns that are missing or make no sense."""
    named = [column for column in (image_column, text_column) if column is not None]
    if source.is_dir():
        if named:
            raise ValueError(
                f"{source} is a folder and has no column {named[0]!r}: drop the option"
            )
        return Folder(source)
    if not source.exists():
        raise FileNotFoundError(f"{source} was not found: name a folder, a .jsonl or a .parquet")
    if source.suffix not in TABLES:
        raise ValueError(f"{source} should be a folder, or a table in {' or '.join(TABLES)}")
    if not named:
        raise ValueError(f"say which column of {source} to pack: --image-column, --text-column")
    return Table(source, TABLES[source.suffix](source), image_column, text_column)


class Folder:
    """Images with ``.txt`` and ``.json`` of the same name beside them, at any depth.

    Where there is no image at all, every ``.txt`` is an example by itself. Hidden files are none.
    """

    def __init__(self, folder: Path):
        files: dict[str, list[Path]] = {}
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder)
            if path.is_file() and not any(part.startswith(".") for part in name.parts):
                files.setdefault(name.with_suffix("").as_posix(), []).append(path)
        self._files = sorted(files.items())
        self._pictures = any(_ending(p) in IMAGES for paths in files.values() for p in paths)

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        return self._files[index][0]

    def read(self, index: int) -> dict[str, bytes]:
        _, paths = self._files[index]
        images = [p.name for p in paths if _ending(p) in IMAGES]
        others = [p.name for p in paths if _ending(p) not in MEMBERS]
        known = {_ending(p): p for p in paths if _ending(p) in MEMBERS}
        if len(images) > 1:
            raise ValueError(f"it has {len(images)} images: {', '.join(images)}")
        if others and not images:
            raise ValueError(f"{others[0]} is none of .{', .'.join(MEMBERS)}")
        if self._pictures and not images:
            raise ValueError("it has no image")
        if not images and "txt" not in known:
            raise ValueError("it has no text")
        return {ending: path.read_bytes() for ending, path in known.items()}


class Table:
    """Rows whose `image` column is a path (within the table's folder) or bytes, and whose `text`
    column is a text; all other columns become the ``.json``."""

    def __init__(self, path: Path, rows: Rows, image: str | None, text: str | None):
        self._folder, self._rows = path.parent.resolve(), rows
        self._image, self._text = image, text

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        return self._rows.name(index)

    def read(self, index: int) -> dict[str, bytes]:
        row = dict(self._rows[index])
        members: dict[str, bytes] = {}
        for column in (self._image, self._text):
            if column is not None and column not in row:
                raise ValueError(f"it has no column {column!r}; {did_you_mean(column, row)}")
        if self._image is not None:
            members |= self._picture(row.pop(self._image))
        if self._text is not None:
            members["txt"] = _text(row.pop(self._text), self._text)
        if row:
            members["json"] = _record(row)
        return members

    def _picture(self, cell: Any) -> dict[str, bytes]:
        if isinstance(cell, Mapping):  # how the data sets of Hugging Face hold an image
            cell = cell.get("bytes") or cell.get("path")
        if isinstance(cell, bytes):
            return {ENDINGS[str(open_image(cell).format)]: cell}
        if not isinstance(cell, str) or not cell:
            raise ValueError(f"its column {self._image} should be a path or bytes, found {cell!r}")
        path = (self._folder / cell).resolve()
        if not path.is_relative_to(self._folder):
            raise ValueError(f"{cell} leaves the table's folder {self._folder}")
        if _ending(path) not in IMAGES:
            raise ValueError(f"{cell} is no image in .{', .'.join(IMAGES)}")
        return {_ending(path): path.read_bytes()}


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
