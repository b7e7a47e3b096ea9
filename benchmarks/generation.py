"""Tokens per second of generation, end to end, as a share of what the machine can do.

    python benchmarks/generation.py                       # a table; --json for JSON
    python benchmarks/generation.py --dtype bf16 --batch 1 --threads 2
    python benchmarks/generation.py --compile             # the prior's blocks compiled
    python benchmarks/generation.py --device cuda --dtype bf16 --no-graphs
    python benchmarks/generation.py --check --new 32      # and compare tokens with the slow path

What is timed is the path of every user: prompt ids are encoded and prefilled, each block is
denoised under guidance, committed and decoded to token ids. The best of `--repeats` runs counts,
after one that is not timed (`first_run_s`; with `--compile` it holds the compilation).

* `tokens_per_s` counts new tokens of all prompts, and the prompt's own time is in it
* `first_block_s` is when streaming gives its first block
* `share` is model FLOP/s over matmul FLOP/s; `reference.py` says what is counted
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import machine
import plain
import reference
from torch import Tensor

from unified.config.schema import GenerationConfig
from unified.generation.items import Inference, Wish
from unified.pipeline import UnifiedPipeline


class Generation:
    """One setting of generation, ready to run."""

    def __init__(
        self, pipeline: UnifiedPipeline, batch: int, prompt: int, new: int, **settings: Any
    ):
        self.pipeline, self.new = pipeline, new
        self.settings = GenerationConfig(**(reference.GENERATION | settings))
        self.prompts_BP = reference.random_ids(pipeline.config, (batch, prompt))
        self.noise = self._noise(batch, prompt, new)
        guided = self.settings.guidance_scale != 1
        self.flops = reference.generation_flops(
            pipeline.config, batch, prompt, new, self.settings.num_steps, guided
        )

    def _noise(self, batch: int, prompt: int, new: int) -> Tensor:
        """Where each block starts, [blocks, B, b, C]."""
        block = int(self.pipeline.config.tasks["continuation"].options["block"])
        blocks = -(-(prompt + new) // block) - prompt // block
        return machine.randn((blocks, batch, block, self.pipeline.prior.channels["text"]), seed=1)

    def __call__(self) -> tuple[list[list[int]], float]:
        """The new ids of each prompt, and seconds to the first block."""
        model, made, first = self.pipeline, dict[int, Tensor](), 0.0
        wishes = [
            Wish({"C": ids}, self.new, noise)
            for ids, noise in zip(self.prompts_BP, self.noise.unbind(1), strict=True)
        ]
        start = time.perf_counter()
        runner = Inference(model.modalities, model.tasks, model.prior, "continuation")
        for items in runner.stream(wishes, self.settings, seed=0):
            first = first or time.perf_counter() - start
            made |= items
        return [made[i].tolist() for i in range(len(wishes))], first

    def plainly(self) -> list[list[int]]:
        """The same ids by the slow path."""
        noise = self.noise.to(next(self.pipeline.prior.parameters()))
        return plain.generate(self.pipeline, self.prompts_BP, self.new, noise, self.settings)


def check(generation: Generation) -> int:
    """How many tokens of the fast path were compared with the slow one's, in float64. ValueError
    if one differs."""
    for module in generation.pipeline.modules.values():
        module.double()
    fast, slow = generation()[0], generation.plainly()
    wrong = [i for i, (a, b) in enumerate(zip(fast, slow, strict=True)) if a != b]
    if wrong:
        raise ValueError(f"the fast path gives other tokens than the slow one for prompts {wrong}")
    return sum(map(len, fast))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One row of the table."""
    before = machine.forget_peak()
    limit = machine.Limit(args.dtype, args.matmul_seconds, args.device)
    limit.look()
    pipeline = reference.build(args.size, device=args.device)
    settings = {"num_steps": args.steps, "guidance_scale": args.guidance, "graphs": args.graphs}
    generation = Generation(pipeline, args.batch, args.prompt, args.new, **settings)
    if args.compile:
        pipeline.prior.compile(mode=args.compile)
    firsts = []
    with machine.autocast(args.dtype, args.device):
        first_run = machine.seconds(generation)
        best = machine.best_of(lambda: firsts.append(generation()[1]), args.repeats)
    limit.look()
    row = {
        "batch": args.batch,
        "tokens_per_s": args.batch * args.new / best,
        "share": limit.share(generation.flops, best),
        "first_block_s": min(firsts),
        "seconds": best,
        "first_run_s": first_run,
        "gflop": generation.flops / 1e9,
        **machine.memory_columns(before),
        **limit.columns,
    }
    return row | ({"tokens_checked": check(generation)} if args.check else {})


def options() -> argparse.ArgumentParser:
    made = machine.parser(__doc__)
    machine.add_model_options(made, list(reference.SIZES))
    made.add_argument("--batch", type=int, default=8)
    made.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    made.add_argument("--new", type=int, default=64, help="tokens to generate")
    made.add_argument("--steps", type=int, default=16, help="of the ODE, per block")
    made.add_argument("--guidance", type=float, default=7.0, help="1: no unconditional pass")
    machine.add_compile_option(made)
    machine.add_graphs_option(made)
    made.add_argument("--check", action="store_true", help="compare tokens with the slow path")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    args = machine.parse(options(), arguments)
    machine.show([measure(args)], args)


if __name__ == "__main__":
    main()
