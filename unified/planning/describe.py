"""What ``unified show`` prints: a task's grid of who sees whom, a model's parameter counts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from unified.config.plugins import Plugins, resolve_model
from unified.config.registry import resolve
from unified.config.schema import Config
from unified.errors import did_you_mean, validated
from unified.latents.modality import Modality
from unified.model.prior import Prior
from unified.sequence.layout import Layout
from unified.sequence.task import Task
from unified.sequence.visibility import ALL, draw
from unified.tables import table


def find_task(name: str, config: Config | None = None, trust_remote_code: bool = False) -> Task:
    """The task `name` of a configuration, or the one of that short name (or path to code) with its
    own defaults."""
    if config is None:
        cls: Any = resolve("task", name, trust_remote_code)
        made: Task = cls(validated(cls.Config, {"source": "any"}))
        return made
    if name not in config.tasks:
        raise ValueError(f"no task {name!r} is configured; {did_you_mean(name, config.tasks)}")
    return resolve_model(config, trust_remote_code).tasks[name]


def task_layout(name: str, block: int, trust_remote_code: bool = False) -> Layout:
    """The layout of task `name` with its own defaults, its blocks shortened to `block` latents."""
    return shortened(find_task(name, None, trust_remote_code).layout, block)


def shortened(layout: Layout, block: int) -> Layout:
    """A layout to draw, with blocks of `block` latents."""
    segments = (replace(s, block=s.block and block) for s in layout.segments)
    return replace(layout, segments=tuple(segments))


def parse_lengths(text: str, layout: Layout) -> dict[str, int]:
    """``P=3,C=6`` as lengths by kind; a segment left out is as long as the one on whose positions
    it lies, or gets two blocks, or two latents."""
    told: dict[str, int] = {}
    for pair in filter(None, text.split(",")):
        word, _, number = (part.strip() for part in pair.partition("="))
        kinds = [s.kind for s in layout.filled if word in (s.kind, s.name)]
        if not kinds:
            near = did_you_mean(word, [s.kind for s in layout.filled])
            raise ValueError(f"no segment {word!r} to give a length; {near}")
        if not number.isdecimal():
            raise ValueError(f"the length of {word} should be a whole number, found {number!r}")
        told[kinds[0]] = int(number)
    lengths: dict[str, int] = {}
    for s in layout.filled:
        usual = lengths[s.positions_of] if s.positions_of else 2 * (s.block or 1)
        lengths[s.kind] = told.get(s.kind, usual)
    return lengths


def show_task(
    layout: Layout,
    lengths: dict[str, int],
    unconditional: bool = False,
    as_json: bool = False,
    task: Task | None = None,
) -> str:
    """The grid of one sample, queries down and keys across; with a `task`, its segments too."""
    kinds, blocks, visible = layout.grid(lengths, unconditional)
    if as_json:
        rows = [[int(seen) for seen in row] for row in visible]
        told = {"kinds": kinds, "blocks": blocks, "visible": rows}
        return json.dumps(told | (task_tree(task) if task is not None else {}))
    numbers = "  " + " ".join(str(b % 10) for b in blocks)
    drawing = f"{draw(kinds, visible)}\n\nblock of each position (last digit)\n{numbers}"
    return drawing if task is None else f"{drawing}\n\nsegments\n{_segments(task)}"


def task_tree(task: Task) -> dict[str, Any]:
    """A task as what JSON holds: its segments, which of them generation is given and makes, and the
    intervals of its table, in which null is no bound."""
    layout, given = task.layout, [s.kind for s in task.given]
    return {
        "generates": task.generates,
        "continues": task.continues,
        "given": given,
        "segments": [asdict(s) | {"name": s.title} for s in layout.segments],
        "sees": {
            q: {k: [_bound(i.lo), _bound(i.hi)] for k, i in row.items()}
            for q, row in layout.sees.items()
        },
        "unconditional_rate": layout.unconditional_rate,
    }


def _bound(block: int) -> int | None:
    return None if block in (ALL.lo, ALL.hi) else block


def _segments(task: Task) -> str:
    """One line a segment: letter, name, modality, and what becomes of it."""
    given = {s.kind for s in task.given}
    rows = []
    for s in task.layout.segments:
        roles = [f"the noisy twin of {s.copies}"] if s.copies else []
        roles += ["given"] if s.kind in given else []
        roles += ["generated"] if s.kind == task.generates else []
        roles += [f"in blocks of {s.block}"] if s.block else []
        roles += [f"on the positions of {s.positions_of}"] if s.positions_of else []
        rows.append((s.kind, s.title, s.modality, ", ".join(roles)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters of one module: of its parts, and how many are tables of symbols."""

    parts: dict[str, int]
    embedding: int = 0

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def parameter_counts(config: Config, trust_remote_code: bool = False) -> dict[str, Counts]:
    """Module -> its counts, without allocating any parameter."""
    return counts_of(*on_meta(config, resolve_model(config, trust_remote_code)))


def on_meta(config: Config, plugins: Plugins) -> tuple[dict[str, Modality], Prior]:
    """The model on the meta device, where parameters have a shape and take no memory."""
    with torch.device("meta"):
        modalities = {
            name: cls.build(options, None) for name, (cls, options) in plugins.modalities.items()
        }
        channels = {name: modality.channels for name, modality in modalities.items()}
        return modalities, Prior(config.prior, channels=channels)


def counts_of(modalities: Mapping[str, Modality], prior: Prior) -> dict[str, Counts]:
    """Module -> its counts."""
    counts = {n: Counts(_parts(m), m.embedding_parameters) for n, m in modalities.items()}
    return counts | {"prior": Counts(_parts(prior))}


def _parts(module: nn.Module) -> dict[str, int]:
    """Parameters of `module` by part, each parameter counted once.

    Parts are its children; where one child holds everything, they are that child's children.
    """
    children = dict(module.named_children())
    named = dict(module.named_parameters())
    outer = {name.partition(".")[0] for name in named}
    if len(outer) == 1 and outer <= set(children):
        return _parts(children[outer.pop()])
    parts: dict[str, int] = {}
    for name, parameter in named.items():
        part = name.partition(".")[0]
        parts[part] = parts.get(part, 0) + parameter.numel()
    return parts


def counts_tree(counts: Mapping[str, Counts]) -> dict[str, Any]:
    """The counts as ``{"modules": {...}, "total": n}``."""
    modules = {
        name: {"parameters": c.total, "embedding": c.embedding, "parts": c.parts}
        for name, c in counts.items()
    }
    return {"modules": modules, "total": sum(c.total for c in counts.values())}


def show_model(counts: dict[str, Counts], as_json: bool = False) -> str:
    """The counts as a table, or as JSON; see `counts_tree`."""
    if as_json:
        return json.dumps(counts_tree(counts), indent=2)
    rows = []
    for name, c in counts.items():
        rows.append((name, c.total))
        rows += [(f"  {part}", count) for part, count in c.parts.items()]
        rows += [("  of which embedding", c.embedding)] if c.embedding else []
    rows.append(("total", sum(c.total for c in counts.values())))
    return table((name, f"{count:,}") for name, count in rows)
