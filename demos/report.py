"""The report of a run: what was measured, in a table, and what the model makes, in pictures.

`Report` says what is shown; `report_html` and `report_png` show it. All three know nothing about
the data: rows, curves and cards are plain text, numbers and images.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from unified.tables import table


@dataclass(frozen=True)
class Row:
    """One line of the table: a name, the model's figure, what it is set beside, what it means."""

    name: str
    value: str
    beside: str
    meaning: str


@dataclass(frozen=True)
class Curve:
    """Values of one series by step."""

    name: str
    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Chart:
    """The curves of one stage; the first of a name is of training, "held out" ones are dots."""

    title: str
    curves: list[Curve]


@dataclass(frozen=True)
class Card:
    """Pictures side by side, with a caption under them; or a text alone."""

    images: Sequence[Image.Image]
    text: str
    under: str = ""


@dataclass(frozen=True)
class Section:
    """A heading, a sentence on what there is to see, and cards."""

    title: str
    about: str
    cards: Sequence[Card]


@dataclass(frozen=True)
class Report:
    title: str
    about: str
    #: heading -> its rows
    table: dict[str, list[Row]]
    charts: list[Chart]
    sections: list[Section]

    def text(self) -> str:
        """The table for a terminal."""
        rows = [(r.name, r.value, r.beside) for found in self.table.values() for r in found]
        lines = iter(table(rows, "lrl").splitlines())
        parts = [
            "\n".join([heading, *(f"  {next(lines)}" for _ in found)])
            for heading, found in self.table.items()
        ]
        return "\n\n".join(parts)


def charts(metrics: Path) -> list[Chart]:
    """Training and validation losses of every stage, from ``metrics.jsonl``.

    One curve for each ``flow/...`` term where a stage has any, else one for the weighted total.
    """
    stages: dict[str, dict[str, Curve]] = {}
    lines = metrics.read_text("utf-8").splitlines() if metrics.is_file() else []
    for line in map(json.loads, lines):
        curves = stages.setdefault(line["stage"], {})
        for key, value in line.items():
            name = _curve_name(key)
            if name is not None:
                curve = curves.setdefault(name, Curve(name))
                curve.steps.append(line["step"])
                curve.values.append(value)
    return [Chart(stage, _chosen(list(curves.values()))) for stage, curves in stages.items()]


def _curve_name(key: str) -> str | None:
    if key.startswith("val/"):
        term = key.removeprefix("val/")
        return f"{term}, held out"
    if key == "loss" or key.startswith("loss/"):
        return key.removeprefix("loss/")
    return None


def _chosen(curves: list[Curve]) -> list[Curve]:
    """The flow terms, or where there are none the total."""
    flow = [c for c in curves if c.name.startswith("flow/")]
    return flow or [c for c in curves if c.name.split(",")[0] == "loss"]
