"""The memory model of `unified plan` against the memory that training takes, on the CPU in float32.

    python benchmarks/memory_model.py             # a table; --json for JSON (Linux)

Each size is a process of its own. It predicts on fake tensors, and then trains for real: two steps
of two accumulated microbatches with the objective, AdamW and the averages of a joint stage. What is
measured is the peak of resident memory, above what the process held before the model was built. The
autoencoders are frozen, or learn with `--learning`; `--recompute` checkpoints the prior's blocks.
Attention is fused throughout, as a plan has it: a CPU would write much of it out.

glibc keeps freed memory for later. MALLOC_MMAP_THRESHOLD_=65536 is set for the processes, so that
every larger tensor has pages of its own and gives them back when it ends.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from typing import Any

import torch
from machine import forget_peak, resident

from unified.config.plugins import resolve_plugins
from unified.config.schema import Config, EMAConfig
from unified.data.streams import Prepared
from unified.model import attention
from unified.model.prior import Prior
from unified.planning.draft import Draft
from unified.planning.figures import PlanRequest
from unified.planning.gpus import GPU
from unified.planning.imagined import recompute
from unified.planning.memory import imagined_step, optimizer_state, per_device
from unified.training.ema import EMA
from unified.training.objectives.joint import JointObjective
from unified.training.optim import build_optimizer, learning_groups

#: name -> (width, multi-stream blocks, single-stream blocks, examples of a microbatch)
SIZES = {"small": (256, 2, 4, 8), "medium": (512, 2, 6, 8), "large": (640, 4, 8, 8)}
MICROBATCHES = 2
SETTINGS = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def configuration(size: str, learning: bool) -> Config:
    """A joint stage over text of 96 tokens and images of 64 pixels."""
    width, multi, single, examples = SIZES[size]
    prior = {"width": width, "heads": width // 64, "multi_stream_depth": multi}
    text = {"type": "text", "vocab_size": 4096, "dim": 192, "ffn_dim": 512, "num_heads": 3}
    blocks = {"encoder_num_blocks": 2, "decoder_num_blocks": 2, "max_tokens": 96}
    network = {"block_out_channels": [64, 64], "layers_per_block": 1, "pixel_patch": 8}
    task = {"source": "s", "block": 16}
    stage = {
        "name": "joint",
        "objective": "joint",
        "steps": 1,
        "batch_size": examples * MICROBATCHES,
        "accumulate": MICROBATCHES,
        "row_length": 512,
        "optimizer": {"vae_lr_ratio": 1.0 if learning else 0.0},
    }
    return Config.model_validate(
        {
            "modalities": {
                "text": text | blocks,
                "image": {"type": "image", "max_size": 64, "network": network},
            },
            "prior": prior | {"single_stream_depth": single},
            "tasks": {name: task | {"type": name} for name in ("captioning", "text_to_image")},
            "data": {"sources": {"s": {"train": ["unused.tar"]}}},
            "stages": [stage],
        }
    )


def compare(size: str, learning: bool, recomputed: bool) -> dict[str, Any]:
    """Predicted and measured bytes of one size, in this process."""
    config = configuration(size, learning)
    stage = config.stages[0]
    cpu = PlanRequest(GPU("cpu", {"fp32": 1.0}, 1.0))
    draft = Draft(config, stage, cpu, "fp32", resolve_plugins(config))
    examples = [
        Prepared(e.stream, e.key, slot, e.observations)
        for name in draft.tasks
        for slot, e in enumerate(draft.microbatch(name)[::2])
    ]
    if recomputed:
        recompute(draft.prior)
    batch = draft.objective.collate(examples, 0)
    step = imagined_step(draft.objective, batch, "fp32", keeps_mask=True)
    predicted = per_device(draft.objective, step, True, optimizer_state(draft.objective))
    del draft, batch
    warm_up()
    gc.collect()
    measured = train(config, examples, recomputed)
    return {
        "size": size,
        "parameters": predicted.weights // 4,
        "persistent": predicted.total - step.peak,
        "activations": step.saved,
        "temporaries": step.peak - step.saved,
        "predicted": predicted.total,
        "measured": measured,
        "ratio": predicted.total / measured,
    }


def warm_up() -> None:
    """Load the libraries that PyTorch opens when they are first used."""
    x = torch.randn(64, 64, requires_grad=True)
    torch.nn.functional.linear(x, x).sum().backward()


def train(config: Config, examples: list[Prepared], recomputed: bool) -> int:
    """Peak of resident memory, in bytes, over two optimizer steps, above the beginning's."""
    attention.KEYS = 0
    before = forget_peak()
    plugins = resolve_plugins(config)
    modalities = {n: cls.build(o, None) for n, (cls, o) in plugins.modalities.items()}
    prior = Prior(config.prior, {n: m.channels for n, m in modalities.items()})
    layouts = {n: t.layout for n, t in plugins.tasks.items()}
    stage = config.stages[0]
    objective = JointObjective(prior, modalities, layouts, stage, config.flow, 0)
    if recomputed:
        recompute(prior)
    groups = learning_groups(objective.groups(), stage.optimizer)
    learners = [p for group in groups.values() for p in group]
    optimizer = build_optimizer(groups, stage.optimizer)
    learns = {id(p) for p in learners}
    named = {n: p for n, p in objective.named_parameters() if id(p) in learns}
    ema = EMA(named, EMAConfig())
    for step in range(2):
        for _ in range(MICROBATCHES):
            losses = objective(objective.collate(examples, step))
            torch.stack(list(losses.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(learners, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(step)
    return resident("VmHWM") - before


def in_processes(sizes: list[str], options: list[str]) -> list[dict[str, Any]]:
    rows = []
    for size in sizes:
        command = [sys.executable, __file__, "--only", size, *options]
        done = subprocess.run(
            command, env=os.environ | SETTINGS, check=True, stdout=subprocess.PIPE, text=True
        )
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--learning", action="store_true", help="the autoencoders learn as well")
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", choices=list(SIZES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(compare(args.only, args.learning, args.recompute)))
        return
    flags = {"--learning": args.learning, "--recompute": args.recompute}
    rows = in_processes(args.sizes, [flag for flag, given in flags.items() if given])
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    print(
        "| size | parameters | weights to averages | activations | temporaries | predicted |"
        " measured | ratio |\n|---|---|---|---|---|---|---|---|"
    )
    for row in rows:
        parts = ("persistent", "activations", "temporaries", "predicted", "measured")
        cells = " | ".join(f"{row[part] / 1e6:,.0f} MB" for part in parts)
        print(f"| {row['size']} | {row['parameters']:,} | {cells} | {row['ratio']:.3f} |")


if __name__ == "__main__":
    main()
