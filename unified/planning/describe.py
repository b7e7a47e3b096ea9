"""What ``unified show`` prints: a task's grid of who sees whom, a model's parameter counts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
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
from unified.sequence.visibility import draw
from unified.tables import table


def task_layout(name: str, block: int, trust_remote_code: bool = False) -> Layout:
    """The layout of task `name` with its own defaults, its blocks shortened to `block` latents."""
    cls: Any = resolve("task", name, trust_remote_code)
    layout: Layout = cls(validated(cls.Config, {"source": "any"})).layout
    shortened = (replace(s, block=s.block and block) for s in layout.segments)
    return replace(layout, segments=tuple(shortened))


def parse_lengths(text: str, layout: Layout) -> dict[str, int]:
    """``P=3,C=6`` as lengths by kind; a segment left out gets two blocks, or two latents."""
    lengths = {s.kind: 2 * (s.block or 1) for s in layout.filled}
    for pair in filter(None, text.split(",")):
        kind, _, number = (part.strip() for part in pair.partition("="))
        if kind not in lengths:
            raise ValueError(f"no segment {kind!r} to give a length; {did_you_mean(kind, lengths)}")
        if not number.isdecimal():
            raise ValueError(f"the length of {kind} should be a whole number, found {number!r}")
        lengths[kind] = int(number)
    return lengths


def show_task(
    layout: Layout, lengths: dict[str, int], unconditional: bool = False, as_json: bool = False
) -> str:
    """The grid of one sample: queries down, keys across."""
    kinds, blocks, visible = layout.grid(lengths, unconditional)
    if as_json:
        rows = [[int(seen) for seen in row] for row in visible]
        return json.dumps({"kinds": kinds, "blocks": blocks, "visible": rows})
    numbers = "  " + " ".join(str(b % 10) for b in blocks)
    return f"{draw(kinds, visible)}\n\nblock of each position (last digit)\n{numbers}"


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
