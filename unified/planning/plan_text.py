"""A plan as text and as JSON. GB are 10^9 bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from unified.planning.describe import counts_tree, show_model
from unified.planning.figures import ExampleCost, Plan
from unified.planning.typical import CHARACTERS, Grids
from unified.tables import duration, table

GB, TERA, EXA = 1e9, 1e12, 1e18
#: (sharded, checkpointed) in the order of the columns, and their names
COLUMNS = {
    (False, False): "replicated",
    (True, False): "sharded",
    (False, True): "replicated, recomputed",
    (True, True): "sharded, recomputed",
}
FLOPS = ("prior_forward", "prior_backward", "autoencoder_forward", "autoencoder_backward")


def as_tree(plan: Plan) -> dict[str, Any]:
    """The plan as what JSON holds: FLOPs, bytes and seconds, unrounded."""
    request = plan.request
    gpu = {"name": request.gpu.name, "memory_gb": request.gpu.memory_gb}
    return {
        "stage": plan.stage.name,
        "gpus": request.gpus,
        "gpu": gpu | {"peak_tflops": request.gpu.tflops[plan.precision]},
        "precision": plan.precision,
        "batch_size": plan.stage.batch_size,
        "accumulate": plan.stage.accumulate,
        "microbatch": plan.microbatch,
        "parameters": counts_tree(plan.counts),
        "assumed": assumptions(plan),
        "examples": {name: _example(e) for name, e in plan.examples.items()},
        "step_flops": plan.step_flops,
        "memory_bytes": {
            name: asdict(plan.memory[key]) | {"total": plan.memory[key].total}
            for key, name in COLUMNS.items()
        },
        "mfu": request.mfu,
        "positions_per_s": plan.positions_per_second,
        "examples_per_s": plan.examples_per_second,
        "modalities": {m: asdict(t) for m, t in plan.throughput.items()},
        "steps": plan.steps,
        "eflops": plan.steps * plan.step_flops / EXA,
        "seconds_per_step": plan.seconds_per_step,
        "seconds": plan.steps * plan.seconds_per_step,
    }


def _example(example: ExampleCost) -> dict[str, Any]:
    told = asdict(example) | {"flops": example.flops}
    return told | {"grids": {kind: list(grid) for kind, grid in example.grids.items()}}


def as_text(plan: Plan) -> str:
    """The plan for a reader: parameters, FLOPs, memory, time, and what was assumed."""
    request, stage = plan.request, plan.stage
    devices = f"{request.gpus} device{'s' if request.gpus > 1 else ''}"
    head = (
        f"stage {stage.name} on {request.gpus} x {request.gpu.name}, {plan.precision}: batch"
        f" {stage.batch_size:,} = {devices} x {stage.accumulate} accumulated x"
        f" {plan.microbatch}"
    )
    parts = {
        "parameters": show_model(plan.counts),
        "TFLOPs of one example": _flops(plan),
        "memory per device, GB": _memory(plan),
        f"speed at an MFU of {request.mfu:g}": _speed(plan),
        "assumed": "\n".join(f"- {line}" for line in assumptions(plan)),
    }
    return "\n\n".join([head, *(f"{title}\n{body}" for title, body in parts.items())])


def _flops(plan: Plan) -> str:
    rows: list[Sequence[str]] = [
        ("task", "share", "positions", "prior", "its gradients", "autoencoders", "theirs", "all")
    ]
    for name, e in plan.examples.items():
        values = [getattr(e, part) / TERA for part in FLOPS] + [e.flops / TERA]
        rows.append((name, f"{e.share:.0%}", f"{e.positions:,}", *map(_number, values)))
    step = f"a step of {plan.stage.batch_size:,} examples: {plan.step_flops / EXA:.4g} EFLOPs"
    return f"{table(rows)}\n{step}"


def _memory(plan: Plan) -> str:
    memories = [plan.memory[key] for key in COLUMNS]
    rows: list[Sequence[str]] = [("", *COLUMNS.values())]
    for part in asdict(memories[0]):
        rows.append((part, *(f"{getattr(m, part) / GB:.2f}" for m in memories)))
    rows.append(("total", *(f"{m.total / GB:.2f}" for m in memories)))
    room = plan.request.gpu.memory_gb
    fits = ("fits" if m.total / GB <= room else "does not fit" for m in memories)
    rows.append((f"of {room:g}", *fits))
    return table(rows)


def _speed(plan: Plan) -> str:
    seconds = plan.steps * plan.seconds_per_step
    wall = duration(seconds) if seconds >= 60 else f"{seconds:.3g} s"
    hours = seconds * plan.request.gpus / 3600
    rows = [
        ("step", f"{plan.seconds_per_step:.3g} s"),
        ("positions", f"{plan.positions_per_second:,.0f} /s"),
    ]
    for name, t in plan.throughput.items():
        tokens = "" if t.tokens is None else f", {t.tokens:,.0f} tokens/s"
        rows.append((name, f"{t.items:,.0f} items/s{tokens}"))
    rows += [
        (f"{plan.steps:,} steps", f"{plan.steps * plan.step_flops / EXA:,.4g} EFLOPs"),
        ("wall time", f"{wall} ({_number(hours)} GPU hours)"),
    ]
    return table(rows, "l")


def assumptions(plan: Plan) -> list[str]:
    """What the numbers rest on, a sentence each."""
    lengths = "; ".join(f"{name} {_lengths(e.grids)}" for name, e in plan.examples.items())
    return [
        f"latents of an example: {lengths}. A text has its task's limit, else --text-tokens (any"
        f" modality: --size), else the most that a row of {plan.stage.row_length} holds; an"
        f" instruction has a token for every {CHARACTERS} characters",
        "FLOPs are the model's: no padding, no recomputation, attention over visible pairs only;"
        " gradients cost twice the forward pass",
        f"memory is that of a microbatch of {plan.microbatch} x {plan.heaviest}, the heaviest task;"
        " gradients are there throughout, as from the second accumulated microbatch on",
        "sharded: weights that learn, gradients, optimizer and EMA are divided by the devices, and"
        " gathered in float32; recomputed: activation checkpointing of every block of the prior",
        "attention is fused and keeps no scores; the allocator's own losses, and what communication"
        " needs beyond the copies above, come on top",
    ]


def _lengths(grids: Grids) -> str:
    return ", ".join(f"{kind} {'x'.join(map(str, grid))}" for kind, grid in grids.items())


def _number(value: float) -> str:
    """Three places, but for what is too large to need them or too small to have them."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3f}" if value >= 0.1 else f"{value:.3g}"
