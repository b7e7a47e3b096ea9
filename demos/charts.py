"""Loss curves: one small chart a stage."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from unified.demos.report import Chart

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#3b5bdb", "#e8590c", "#2b8a3e", "#9c36b5")
SOFT = "#667085"


def draw_chart(axes: Axes, chart: Chart) -> None:
    """Lines for training, dots in the same colour for held-out examples."""
    names = list(dict.fromkeys(curve.name.split(",")[0] for curve in chart.curves))
    for curve in chart.curves:
        name, _, held_out = curve.name.partition(",")
        colour = COLOURS[names.index(name) % len(COLOURS)]
        style = {"marker": "o", "ls": "", "ms": 4} if held_out else {"lw": 1.4}
        axes.plot(curve.steps, curve.values, color=colour, label=curve.name, **style)
    axes.set_title(chart.title, loc="left", fontsize=10, fontweight="bold")
    axes.set_xlabel("step", fontsize=8, color=SOFT)
    axes.tick_params(labelsize=8, colors=SOFT, length=0)
    axes.grid(axis="y", color="#e6e8ee", lw=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#e6e8ee")
    if chart.curves:
        axes.legend(fontsize=8, frameon=False)


def chart_png(charts: Sequence[Chart]) -> bytes:
    """All charts in a row, as the bytes of a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.7 * max(len(charts), 3), 2.8), layout="constrained", dpi=160)
    for place, chart in enumerate(charts, start=1):
        draw_chart(figure.add_subplot(1, max(len(charts), 3), place), chart)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
