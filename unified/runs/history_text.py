"""A run's history as text: one run in full, or several side by side."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import datetime

from unified.runs.history import RECENT, RunHistory, StageHistory, Value
from unified.tables import duration, size, table

Row = Sequence[str]


def show_runs(runs: Sequence[RunHistory]) -> str:
    return show_run(runs[0]) if len(runs) == 1 else compare(runs)


# ---- one run -------------------------------------------------------------------------------------


def show_run(run: RunHistory) -> str:
    stages = ["\n".join(show_stage(stage)) for stage in run.stages]
    return "\n\n".join(["\n".join([run.path, *(f"  {line}" for line in about(run))]), *stages])


def about(run: RunHistory) -> list[str]:
    """The configuration in a line or two, and when the run last wrote something."""
    prior, count = run.prior, run.prior_parameters
    depth = f"{prior['multi_stream_depth']} + {prior['single_stream_depth']}"
    size = "" if count is None else f", {count:,} parameters"
    when = datetime.fromtimestamp(run.written).strftime("%Y-%m-%d %H:%M")
    return [
        f"{', '.join(run.modalities)}; {', '.join(run.tasks)}",
        f"prior of {depth} blocks (multi-stream + single-stream), {prior['width']} wide{size}",
        f"last written {when}, {duration(time.time() - run.written)} ago",
    ]


def show_stage(stage: StageHistory) -> list[str]:
    lines = [f"{stage.name}  {', '.join(state(stage))}"]
    rows = [("", "last", f"mean of {RECENT}", "lowest"), *map(value_row, *pairs(stage))]
    lines += [f"  {line}" for line in (table(rows).splitlines() if stage.values else [])]
    if stage.checkpoints:
        kept = (f"{c.step} ({size(c.bytes)}{', best' * c.best})" for c in stage.checkpoints)
        lines.append(f"  checkpoints: {', '.join(kept)}")
    if stage.samples:
        lines.append(f"  samples: {', '.join(stage.samples)}")
    return lines + [f"  warning: {text}" for text in stage.warnings]


def state(stage: StageHistory) -> list[str]:
    """How far it is, and how long that took."""
    seconds = stage.values.get("seconds")
    parts = [f"{stage.done} of {stage.planned} steps"]
    parts += ["finished"] if stage.finished else []
    return [*parts, *([] if seconds is None else [duration(seconds.last)])]


def pairs(stage: StageHistory) -> tuple[list[str], list[Value]]:
    """The keys and values to show. The time stands in the heading."""
    shown = {key: value for key, value in stage.values.items() if key != "seconds"}
    return list(shown), list(shown.values())


def value_row(key: str, value: Value) -> Row:
    mean = f"{value.mean:.4g}" if is_noisy(key) else ""
    lowest = f"{value.lowest:.4g} at {value.lowest_step}" if is_loss(key) else ""
    return key, f"{value.last:.4g}", mean, lowest


def is_loss(key: str) -> bool:
    return key.split("/")[0] in ("loss", "val")


def is_noisy(key: str) -> bool:
    """Whether a mean over lines says more than the last one."""
    return key.split("/")[0] not in ("val", "lr", "seconds")


# ---- several runs --------------------------------------------------------------------------------


def compare(runs: Sequence[RunHistory]) -> str:
    """A table for each stage, with a column for each run that has it."""
    labels = [f"[{number}] {run.path}" for number, run in enumerate(runs, 1)]
    about_lines = [
        line
        for label, run in zip(labels, runs, strict=True)
        for line in (label, *(f"    {text}" for text in about(run)))
    ]
    names = dict.fromkeys(stage.name for run in runs for stage in run.stages)
    tables = [compare_stage(name, runs) for name in names]
    note = f"Training values are means of the last {RECENT} lines; val, lr and time are the last."
    return "\n\n".join(["\n".join(about_lines), *tables, note])


def compare_stage(name: str, runs: Sequence[RunHistory]) -> str:
    stages = [next((s for s in run.stages if s.name == name), None) for run in runs]
    rows: list[Row] = [(name, *(f"[{i}]" for i in range(1, len(runs) + 1)))]
    rows.append(("  steps", *(f"{s.done} of {s.planned}" if s else "" for s in stages)))
    for key in dict.fromkeys(key for s in stages if s for key in s.values):
        cells = (s.values.get(key) if s else None for s in stages)
        rows.append((f"  {key}", *("" if v is None else compared(key, v) for v in cells)))
    told = [f"  warning: [{i}] {text}" for i, s in enumerate(stages, 1) if s for text in s.warnings]
    return "\n".join([table(rows), *told])


def compared(key: str, value: Value) -> str:
    if key == "seconds":
        return duration(value.last)
    return f"{value.mean if is_noisy(key) else value.last:.4g}"
