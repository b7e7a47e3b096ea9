"""A report as one tall picture, laid out from top to bottom.

A `Page` collects what is to be drawn, each thing at its distance in inches from the top left, and
draws it once the height is known.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from unified.demos.charts import SOFT, draw_chart
from unified.demos.report import Card, Report, Row, Section

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: inches
WIDTH, MARGIN, LINE = 12.0, 0.5, 0.165
PICTURE, GAP = 0.82, 0.14
#: cards in a row of the page
A_ROW = 6
#: where the table's columns begin, and how many letters a line of each holds
COLUMNS, LETTERS = (0.0, 3.0, 4.4, 7.0), (40, 18, 36, 62)
INK, ACCENT, RULE = "#1d2330", "#3b5bdb", "#e6e8ee"
DPI = 120


def png(report: Report, path: Path) -> None:
    """Draw the report into the file `path`."""
    page = Page()
    page.text(0, report.title, size=18, weight="bold")
    page.y += 0.36
    page.paragraph(report.about)
    for heading, rows in report.table.items():
        _rows(page, heading, rows)
    _charts(page, report)
    for section in report.sections:
        _section(page, section)
    page.save(path)


class Page:
    """Things to draw, and `y`, how far down the next one is."""

    def __init__(self) -> None:
        self.y = MARGIN
        self._things: list[Callable[[Figure, float], None]] = []

    def text(self, x: float, text: str, size: float = 8.5, color: str = INK, **style: Any) -> None:
        """`text` with its top left corner at (`x`, here); lines as they are."""
        y, plain = self.y, text.replace("$", r"\$")

        def put(figure: Figure, height: float) -> None:
            at = (MARGIN + x) / WIDTH, 1 - y / height
            figure.text(*at, plain, size=size, color=color, va="top", linespacing=1.3, **style)

        self._things.append(put)

    def paragraph(self, text: str, letters: int = 150) -> None:
        lines = textwrap.wrap(text, letters)
        self.text(0, "\n".join(lines), size=9, color=SOFT)
        self.y += LINE * len(lines) + 0.14

    def rule(self) -> None:
        y = self.y

        def put(figure: Figure, height: float) -> None:
            from matplotlib.lines import Line2D

            ends, at = [MARGIN / WIDTH, 1 - MARGIN / WIDTH], 1 - y / height
            figure.add_artist(Line2D(ends, [at, at], color=RULE, lw=0.8))

        self._things.append(put)

    def axes(self, x: float, width: float, tall: float, draw: Callable[[Any], None]) -> None:
        """Axes of `width` by `tall` with the top left corner at (`x`, here), given to `draw`."""
        y = self.y

        def put(figure: Figure, height: float) -> None:
            left, bottom = (MARGIN + x) / WIDTH, 1 - (y + tall) / height
            draw(figure.add_axes((left, bottom, width / WIDTH, tall / height)))

        self._things.append(put)

    def save(self, path: Path) -> None:
        from matplotlib.figure import Figure

        height = self.y + MARGIN
        figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white")
        for put in self._things:
            put(figure, height)
        figure.savefig(path, format="png")


def _rows(page: Page, heading: str, rows: list[Row]) -> None:
    page.y += 0.14
    page.text(0, heading, size=9.5, color=ACCENT, weight="bold")
    page.y += 0.24
    for row in rows:
        page.rule()
        page.y += 0.06
        cells = (row.name, row.value, row.beside, row.meaning)
        wrapped = [textwrap.wrap(c, n) for c, n in zip(cells, LETTERS, strict=True)]
        for place, (x, lines) in enumerate(zip(COLUMNS, wrapped, strict=True)):
            color = INK if place < 2 else SOFT
            weight = "bold" if place == 1 else "normal"
            page.text(x, "\n".join(lines), color=color, weight=weight)
        page.y += LINE * max(map(len, wrapped)) + 0.06


def _heading(page: Page, title: str, about: str) -> None:
    page.y += 0.3
    page.text(0, title, size=13, weight="bold")
    page.y += 0.28
    page.paragraph(about)


def _charts(page: Page, report: Report) -> None:
    if not report.charts:
        return
    _heading(page, "Training", "Losses by step; dots are held-out examples.")
    page.y += 0.2
    each = (WIDTH - 2 * MARGIN) / max(len(report.charts), 3)
    for place, chart in enumerate(report.charts):
        page.axes(place * each + 0.3, each - 0.5, 1.9, partial(draw_chart, chart=chart))
    page.y += 2.3


def _section(page: Page, section: Section) -> None:
    _heading(page, section.title, section.about)
    if not any(card.images for card in section.cards):
        for card in section.cards:
            _passage(page, card)
        return
    width = (WIDTH - 2 * MARGIN) / A_ROW
    for start in range(0, len(section.cards), A_ROW):
        row = section.cards[start : start + A_ROW]
        lines = [_card(page, card, place * width, width) for place, card in enumerate(row)]
        page.y += PICTURE + 0.08 + LINE * max(lines) + 0.12


def _card(page: Page, card: Card, x: float, width: float) -> int:
    """Draw one card at `x`; returns how many lines its caption has."""
    for place, image in enumerate(card.images):
        at = x + place * (PICTURE + 0.04)
        page.axes(at, PICTURE, PICTURE, partial(_show, image=image))
    letters = int((width - GAP) * 16)
    text, under = (textwrap.wrap(t, letters) for t in (card.text, card.under))
    top, page.y = page.y, page.y + PICTURE + 0.06
    page.text(x, "\n".join(text), size=7.5)
    page.y += LINE * len(text)
    page.text(x, "\n".join(under), size=7.5, color=SOFT)
    page.y = top
    return len(text) + len(under)


def _show(axes: Any, image: Image.Image) -> None:
    axes.imshow(image, interpolation="bilinear")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_color(RULE)


def _passage(page: Page, card: Card) -> None:
    for text, color in ((card.text, INK), (card.under, ACCENT)):
        lines = textwrap.wrap(text, 150)
        page.text(0, "\n".join(lines), size=9, color=color)
        page.y += LINE * len(lines)
    page.y += 0.12
