"""The curves of one run, or of several over each other: a block of panels for each stage.

A panel holds what belongs together: a training term and the same one over held-out examples, or the
learning rates of all groups. With one run the colours are of the keys; with several, of the runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unified.runs.history import Curve, RunHistory

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#3b5bdb", "#e8590c", "#2b8a3e", "#9c36b5", "#0b7285", "#c2255c", "#5c940d", "#868e96")
SOFT, RULE = "#667085", "#e6e8ee"
#: panels in a row, and inches of one
A_ROW, WIDE, TALL = 4, 3.6, 2.4
#: a training curve of more points than this is drawn smoothed, over itself
MANY = 40

#: key -> curve, of one run
Keys = Mapping[str, Curve]


def draw(runs: Sequence[RunHistory], path: Path) -> None:
    """Draw the curves into the file `path`; its ending says how. ValueError without any curves."""
    from matplotlib.figure import Figure

    stages = {name: [r.curves.get(name, {}) for r in runs] for name in stage_names(runs)}
    if not stages:
        raise ValueError(f"{', '.join(r.path for r in runs)}: there are no metrics to draw yet")
    blocks = {name: panels(found) for name, found in stages.items()}
    rows = [-(-len(block) // A_ROW) for block in blocks.values()]
    labels = short_names([r.path for r in runs])
    figure = Figure(
        figsize=(A_ROW * WIDE, TALL * sum(rows) + 0.4 * len(rows)), layout="constrained"
    )
    below = figure.subfigures(len(rows), 1, height_ratios=rows, squeeze=False)[:, 0]
    for part, (name, block), count in zip(below, blocks.items(), rows, strict=True):
        part.suptitle(name, x=0.01, ha="left", fontsize=12, fontweight="bold")
        for place, (title, keys) in enumerate(block.items(), 1):
            axes = part.add_subplot(count, A_ROW, place)
            draw_panel(axes, title, keys, stages[name], labels)
    figure.savefig(path, dpi=130)


def short_names(paths: Sequence[str]) -> list[str]:
    """The last parts of the paths, where these differ."""
    last = [Path(path).name for path in paths]
    return last if len(set(last)) == len(last) else list(paths)


def stage_names(runs: Iterable[RunHistory]) -> list[str]:
    """The stages that have metrics, in the order of the first run that has them."""
    return list(dict.fromkeys(name for run in runs for name, keys in run.curves.items() if keys))


# ---- what belongs together -----------------------------------------------------------------------


def panels(runs: Sequence[Keys]) -> dict[str, list[str]]:
    """Title -> keys, over all runs. The time is the same information as speed."""
    keys = dict.fromkeys(key for run in runs for key in run if key != "seconds")
    terms = {key.removeprefix("loss/") for key in keys if key.startswith("loss/")}
    grouped: dict[str, list[str]] = {}
    for key in keys:
        grouped.setdefault(panel(key, terms), []).append(key)
    return dict(sorted(grouped.items(), key=lambda item: rank(item[0], terms)))


def panel(key: str, terms: Iterable[str]) -> str:
    """``loss/TERM``, ``val/TERM`` and ``val/STREAM/TERM`` meet at TERM; ``lr/GROUP`` at lr."""
    kind, _, rest = key.partition("/")
    if kind in ("loss", "val"):
        same = [term for term in terms if rest == term or rest.endswith(f"/{term}")]
        return max(same, key=len, default=rest or kind)
    return kind


def rank(title: str, terms: Iterable[str]) -> int:
    """The total first, then its terms, then all else."""
    return 0 if title == "loss" else 1 if title in terms else 2


# ---- one panel -----------------------------------------------------------------------------------


def draw_panel(
    axes: Axes, title: str, keys: Sequence[str], runs: Sequence[Keys], labels: Sequence[str]
) -> None:
    """Lines for training, dots in a line for held-out examples; of several runs, no streams."""
    shown = [key for key in keys if len(runs) == 1 or not is_stream(key, title)]
    for number, (run, label) in enumerate(zip(runs, labels, strict=True)):
        for place, key in enumerate(key for key in shown if key in run):
            colour = COLOURS[(place if len(runs) == 1 else number) % len(COLOURS)]
            name = key if len(runs) == 1 else f"{label} {beside(key, title)}"
            thin = 0.5 if is_stream(key, title) else 1.0
            draw_curve(axes, run[key], key.startswith("val/"), thin, color=colour, label=name)
    finish(axes, title)
    if len(shown) > 1 or len(runs) > 1:
        axes.legend(fontsize=6, frameon=False)


def finish(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=9)
    axes.set_xlim(left=0)
    axes.tick_params(labelsize=7, colors=SOFT, length=0)
    axes.grid(axis="y", color=RULE, lw=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(RULE)


def beside(key: str, title: str) -> str:
    """What tells a key from the training curve of its panel."""
    if key in (title, f"loss/{title}"):
        return ""
    return "val" if key.startswith("val/") else key


def is_stream(key: str, term: str) -> bool:
    """``val/STREAM/TERM``."""
    return key.startswith("val/") and key not in ("val/loss", f"val/{term}")


def draw_curve(axes: Axes, curve: Curve, held_out: bool, thin: float, **style: Any) -> None:
    steps, values = [step for step, _ in curve], [value for _, value in curve]
    if held_out:
        axes.plot(steps, values, marker="o", ms=4 * thin, lw=1.2 * thin, ls="--", **style)
    elif len(values) > MANY:
        axes.plot(steps, values, lw=0.8, alpha=0.25, **{**style, "label": None})
        axes.plot(steps, smooth(values), lw=1.4, **style)
    else:
        axes.plot(steps, values, marker="o" if len(values) == 1 else "", ms=3, lw=1.4, **style)


def smooth(values: Sequence[float]) -> list[float]:
    """Means over the neighbours on both sides, fewer at the ends."""
    reach = max(1, len(values) // MANY)
    near = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [sum(part) / len(part) for part in near]
