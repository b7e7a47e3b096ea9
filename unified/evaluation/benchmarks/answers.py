"""Files of answers: one JSON object a line, scored under both rules.

The fields are those of the official release's outputs: ``id``, ``prompt`` (without its few-shot
part), ``generate``, ``ground_truth``, and ``choices`` for multiple choice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unified.errors import as_text
from unified.evaluation.benchmarks.scoring import KINDS, Verdict, cut, official, paper
from unified.tables import table

RULES: dict[str, Callable[..., Verdict]] = {"official": official, "paper": paper}


@dataclass(frozen=True)
class Accuracy:
    """Percent of right answers of one file, by rule."""

    task: str
    rows: int
    official: float
    paper: float


#: a field that a row must have, or several of which it must have one
Field = str | tuple[str, ...]


def read_rows(path: Path | str, required: Sequence[Field]) -> list[dict[str, Any]]:
    """The objects of a file. ValueError names file and line for one that is broken, lacks a
    `required` field or repeats an id."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    rows, seen = [], set()
    for place, row in read_objects(path):
        choices = [(field,) if isinstance(field, str) else field for field in required]
        missing = [" or ".join(names) for names in choices if not set(names) & set(row)]
        if missing:
            raise ValueError(f"{place} lacks {', '.join(missing)}; it has {', '.join(row)}")
        if not isinstance(row["id"], str | int):
            raise ValueError(f"{place} has the id {row['id']!r}, but it should be a number or text")
        if row["id"] in seen:
            raise ValueError(f"{place} repeats the id {row['id']!r}")
        seen.add(row["id"])
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def read_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line's object, and where it stands, for error messages."""
    # a text may hold other line separators, which JSON does not escape
    for number, line in enumerate(as_text(path.read_bytes(), path).split("\n"), 1):
        place = f"{path}, line {number},"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{place} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{place} should hold an object, found {type(row).__name__}")
        yield place, row


def task_of(path: Path | str, task: str | None = None) -> str:
    """The task: as told, else by the file's name. ValueError for one that is unknown."""
    name = task or Path(path).stem
    if name not in KINDS:
        where = "--task" if task else f"the name of {path}"
        raise ValueError(f"{where} should be one of {', '.join(KINDS)}, found {name!r}")
    return name


def score_rows(task: str, rows: Sequence[dict[str, Any]]) -> Accuracy:
    """Both accuracies of `rows`, rounded as they are published."""
    shares = {
        rule: sum(_verdict(judge, task, row).correct for row in rows) / len(rows)
        for rule, judge in RULES.items()
    }
    return Accuracy(task, len(rows), **{rule: round(100 * s, 2) for rule, s in shares.items()})


def _verdict(judge: Callable[..., Verdict], task: str, row: dict[str, Any]) -> Verdict:
    choices = row.get("choices") or []
    return judge(task, cut(str(row["generate"])), str(row["ground_truth"]), choices)


def score_file(path: Path | str, task: str | None = None) -> Accuracy:
    """Both accuracies of a file of answers."""
    name = task_of(path, task)
    return score_rows(name, read_rows(path, ("id", "generate", "ground_truth")))


def as_table(found: Sequence[Accuracy]) -> str:
    """Both accuracies of each, in percent."""
    rows = [(a.task, str(a.rows), f"{a.official:.2f}", f"{a.paper:.2f}") for a in found]
    return table([("task", "rows", "official", "paper"), *rows])
