"""Seconds of a joint training step, as a share of what the machine can do.

    python benchmarks/train_step.py                       # a table; --json for JSON
    python benchmarks/train_step.py --dtype bf16 --threads 2
    python benchmarks/train_step.py --batch 8 --accumulate 2 --recompute --compile
    python benchmarks/train_step.py --device cuda --dtype bf16 --size 2b --attention flex --compile

A step is that of the training loop: the examples are collated (on the CPU, without the network;
training does it ahead of time), the objective runs forward and backward, gradients are clipped, and
fused AdamW moves the prior. The text VAE is frozen. A row holds one sample of `--seqlen` clean
latents and their noisy twins. The best of `--repeats` steps counts, after one that is not timed
(`first_step_s`; with `--compile` it holds the compilation).

* `positions_per_s` counts clean and noisy ones, `tokens_per_s` what the samples have
* `share` is model FLOP/s over matmul FLOP/s: three forward passes of the prior, over the pairs that
  see each other, and one of the frozen encoder
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import machine
import reference
import torch
from torch import Tensor

from unified.config.schema import StageConfig
from unified.data.streams import Prepared
from unified.latents.tensors import moved
from unified.modalities.text.modality import TextConfig
from unified.model.attention import BACKENDS
from unified.pipeline import UnifiedPipeline
from unified.planning.flops import TRAINING, batch_flops
from unified.sequence.packing import PackedBatch
from unified.training.objectives.joint import JointObjective
from unified.training.optim import build_optimizer, learning_groups
from unified.training.work import add


class Step:
    """One stage over the same microbatches again and again; a call is one optimizer step."""

    def __init__(
        self,
        objective: JointObjective,
        stage: StageConfig,
        microbatches: Sequence[Sequence[Prepared]],
    ):
        self.objective, self.stage, self.microbatches = objective, stage, microbatches
        self.steps = 0
        groups = learning_groups(objective.groups(), stage.optimizer)
        self.learners = [p for group in groups.values() for p in group]
        self.optimizer = build_optimizer(groups, stage.optimizer)
        self.device = self.learners[0].device

    def __call__(self) -> None:
        batches = [self.objective.collate(examples, self.steps) for examples in self.microbatches]
        weights = self.objective.weights(self.steps)
        counts = add((batch.counts for batch in batches), weights)
        for batch in batches:
            losses = self.objective(moved(batch, self.device))
            parts = [weights[k] / max(counts[k], 1) * loss for k, loss in losses.items()]
            torch.stack(parts).sum().backward()
        torch.nn.utils.clip_grad_norm_(self.learners, self.stage.optimizer.clip_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1


class TrainStep(Step):
    """A joint stage over these observations, all of one task."""

    def __init__(
        self,
        pipeline: UnifiedPipeline,
        observations: Sequence[Mapping[str, Tensor]],
        row_length: int,
        accumulate: int = 1,
        task: str = "continuation",
    ):
        self.pipeline = pipeline
        stage = StageConfig(
            name="joint", objective="joint", steps=1000, batch_size=len(observations),
            accumulate=accumulate, row_length=row_length,
        )  # fmt: skip
        examples = [Prepared(task, str(i), i, o) for i, o in enumerate(observations)]
        layouts = {name: t.layout for name, t in pipeline.tasks.items()}
        objective = JointObjective(
            pipeline.prior, pipeline.modalities, layouts, stage, pipeline.config.flow, 0
        )
        super().__init__(objective, stage, [examples[a::accumulate] for a in range(accumulate)])

    @torch.no_grad()
    def prior_flops(self) -> int:
        """FLOPs of the prior in one step: forward, and backward into all that learns."""
        seen: list[PackedBatch] = []
        prior = self.pipeline.prior
        hook = prior.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        for examples in self.microbatches:
            self.objective(moved(self.objective.collate(examples, 0), self.device))
        hook.remove()
        return TRAINING * sum(batch_flops(prior.config, prior.channels, b) for b in seen)


def text_step(
    pipeline: UnifiedPipeline, batch: int, length: int, accumulate: int = 1
) -> tuple[TrainStep, int]:
    """A step over random texts, one to a row, and its FLOPs."""
    ids_BT = reference.random_ids(pipeline.config, (batch, length))
    step = TrainStep(pipeline, [{"C": ids} for ids in ids_BT], 2 * length, accumulate)
    text = TextConfig(**pipeline.config.modalities["text"].options)
    encoder = reference.encoder_flops(text, length, reference.causal_pairs(length, text.block_size))
    return step, step.prior_flops() + batch * encoder


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One row of the table."""
    before = machine.forget_peak()
    limit = machine.Limit(args.dtype, args.matmul_seconds, args.device)
    limit.look()
    pipeline = reference.build(args.size, device=args.device)
    pipeline.prior.recompute, pipeline.prior.attention = args.recompute, args.attention
    if args.compile:
        pipeline.prior.compile(mode=args.compile)
    with machine.autocast(args.dtype, args.device):
        step, flops = text_step(pipeline, args.batch, args.seqlen, args.accumulate)
        first = machine.seconds(step)
        best = machine.best_of(step, args.repeats)
    limit.look()
    return {
        "batch": args.batch,
        "seqlen": args.seqlen,
        "s_per_step": best,
        "positions_per_s": args.batch * 2 * args.seqlen / best,
        "tokens_per_s": args.batch * args.seqlen / best,
        "share": limit.share(flops, best),
        "first_step_s": first,
        "gflop": flops / 1e9,
        **machine.memory_columns(before),
        **limit.columns,
    }


def options() -> argparse.ArgumentParser:
    made = machine.parser(__doc__)
    machine.add_model_options(made, list(reference.SIZES))
    made.add_argument("--batch", type=int, default=4, help="samples of an optimizer step")
    made.add_argument("--seqlen", type=int, default=512, help="clean latents of a sample")
    made.add_argument("--accumulate", type=int, default=1, help="microbatches of a step")
    made.add_argument("--recompute", action="store_true", help="activation checkpointing")
    made.add_argument("--attention", choices=BACKENDS, default="sdpa")
    machine.add_compile_option(made)
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    args = machine.parse(options(), arguments)
    machine.show([measure(args)], args)


if __name__ == "__main__":
    main()
