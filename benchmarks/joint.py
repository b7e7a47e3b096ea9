"""The joint model of text and images: a training step, and the latency of what it generates.

    python benchmarks/joint.py                            # all rows, a table; --json for JSON
    python benchmarks/joint.py --dtype bf16 --threads 2
    python benchmarks/joint.py --only captioning --batches 1 4 --new 16

The model, the batch, the loss and the settings of generation are those of ``emoji.yaml``, and the
examples are the first batch of its joint stage, from the embedded emoji and prose. Weights are
random, with open gates (`reference.nudge`).

    frozen         a step that trains the prior alone
    trained        a step that trains both autoencoders with it (``vae_lr_ratio`` 1)
    text_to_image  images of 64 x 64 pixels from captions, at each of `--batches`
    captioning     captions of `--new` tokens of images: no end mark ends one

A step is that of `train_step.py`. Generation is the path of every user, from items to items. The
best of `--repeats` runs counts, after one that is not timed (`first_s`).

* `per_item_s` is the time of a step per example, or of a run per image or caption
* `share` is model FLOP/s over matmul FLOP/s. FLOPs of a forward pass are counted by PyTorch, and
  attention over pairs that see each other; what learns costs three forward passes
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import machine
import reference
import torch
from train_step import Step

from unified.config.loading import load_config
from unified.config.plugins import resolve_plugins
from unified.config.schema import Config
from unified.data.examples import Example
from unified.latents.modality import posteriors_of
from unified.pipeline import UnifiedPipeline
from unified.planning.flops import TRAINING
from unified.planning.imagined import forward_flops
from unified.training.objectives.joint import JointObjective
from unified.training.stages import Materials, Sources

#: size -> what it changes of the configuration
SIZES: dict[str, list[str]] = {
    "emoji": [],
    "tiny": [
        "modalities.text.vocab_size=300", "modalities.text.dim=16", "modalities.text.ffn_dim=16",
        "modalities.text.num_heads=2", "modalities.image.network.block_out_channels=[16]",
        "prior.width=16", "prior.heads=2", "prior.head_dim=8", "prior.rope_dim=6",
        "prior.multi_stream_depth=1", "prior.single_stream_depth=1", "stages.2.batch_size=4",
        "generation.num_steps=2",
    ],
}  # fmt: skip
ROWS = ("frozen", "trained", "text_to_image", "captioning")

#: what is timed, how many items it makes, and its FLOPs
Timed = tuple[Callable[[], object], int, int]


class Joint:
    """The model, and the examples it is run on."""

    def __init__(self, size: str, device: str, graphs: bool):
        self.config = configuration(size)
        self.sources = Sources(self.config)
        torch.manual_seed(0)
        self.plugins = resolve_plugins(self.config)
        corpora = {n: self.sources.corpus(n, self.plugins) for n in self.config.modalities}
        self.pipeline = UnifiedPipeline.build_from(self.plugins, self.config, corpora)
        for module in self.pipeline.modules.values():
            reference.nudge(module)
        self.device, self.graphs = device, graphs

    def flops(self, count: Callable[[], int]) -> int:
        """FLOPs as the CPU counts them; then the model is where it runs."""
        self.pipeline.to("cpu")
        found = count()
        self.pipeline.to(self.device)
        return found

    def step(self, vae_lr_ratio: float) -> Timed:
        """A step of the joint stage, on its first batch."""
        stage = self.config.stages[-1]
        optimizer = stage.optimizer.model_copy(update={"vae_lr_ratio": vae_lr_ratio})
        stage = stage.model_copy(update={"optimizer": optimizer})
        materials = Materials(self.config, stage, self.pipeline, self.sources, self.plugins)
        objective = materials.objective()
        assert isinstance(objective, JointObjective)
        examples = materials.mixture(stage.batch_size, stage.name, workers=0).batch(0)
        step = Step(objective, stage, [examples])
        return step, stage.batch_size, self.flops(partial(step_flops, step))

    def text_to_image(self, batch: int) -> Timed:
        captions = [example["text"] for example in self._examples(batch)]

        def run() -> object:
            return self.pipeline.text_to_image(captions, seed=0, graphs=self.graphs)

        return run, batch, self.flops(partial(forward_flops, run))

    def captioning(self, batch: int, new: int) -> Timed:
        images = [example["image"] for example in self._examples(batch)]
        self.pipeline.modalities["text"].has_ended = lambda observation: False  # type: ignore[method-assign]

        def run() -> object:
            return self.pipeline.caption(images, max_new_tokens=new, seed=0, graphs=self.graphs)

        return run, batch, self.flops(partial(forward_flops, run))

    def _examples(self, count: int) -> list[Example]:
        source = self.sources("emoji", "val")
        entries = [entry for url in source.urls for entry in source.shard(url)][:count]
        return [Example(source.read(entry), self.pipeline.modalities) for entry in entries]


def configuration(size: str) -> Config:
    """The model of one size."""
    return load_config("emoji.yaml", SIZES[size])


@torch.no_grad()
def step_flops(step: Step) -> int:
    """FLOPs of a step: three forward passes of all that learns, and one of what is frozen."""
    objective, (examples,) = step.objective, step.microbatches
    plan = objective.plan(examples, 0)

    def encode() -> None:
        for m in set(objective.modalities) - objective.learning:
            posteriors_of(objective.modality(m), [o for _, _, o in objective.observed(examples, m)])

    frozen = forward_flops(encode)
    return TRAINING * (forward_flops(lambda: objective(plan)) - frozen) + frozen


def timed(joint: Joint, args: argparse.Namespace) -> dict[tuple[str, int], Callable[[], Timed]]:
    """(what, batch) -> how it is set up, of all rows that are wanted."""
    size = joint.config.stages[-1].batch_size
    rows: dict[tuple[str, int], Callable[[], Timed]] = {
        ("frozen", size): lambda: joint.step(0.0),
        ("trained", size): lambda: joint.step(1.0),
    }
    for batch in args.batches:
        rows["text_to_image", batch] = lambda batch=batch: joint.text_to_image(batch)  # type: ignore[misc]
        rows["captioning", batch] = lambda batch=batch: joint.captioning(batch, args.new)  # type: ignore[misc]
    return {row: make for row, make in rows.items() if row[0] in args.only}


def measure(what: str, make: Callable[[], Timed], args: argparse.Namespace) -> dict[str, Any]:
    """One row of the table."""
    before = machine.forget_peak()
    limit = machine.Limit(args.dtype, args.matmul_seconds, args.device)
    limit.look()
    with machine.autocast(args.dtype, args.device):
        run, items, flops = make()
        first = machine.seconds(run)
        best = machine.best_of(run, args.repeats)
    limit.look()
    return {
        "what": what,
        "batch": items,
        "seconds": best,
        "per_item_s": best / items,
        "share": limit.share(flops, best),
        "first_s": first,
        "gflop": flops / 1e9,
        **machine.memory_columns(before),
        **limit.columns,
    }


def options() -> argparse.ArgumentParser:
    made = machine.parser(__doc__)
    machine.add_model_options(made, list(SIZES))
    made.add_argument("--only", nargs="+", choices=ROWS, default=ROWS)
    made.add_argument("--batches", nargs="+", type=int, default=[1, 16], help="of generation")
    made.add_argument("--new", type=int, default=32, help="tokens of a caption")
    machine.add_graphs_option(made)
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    args = machine.parse(options(), arguments)
    rows = timed(Joint(args.size, args.device, args.graphs), args)
    machine.show([measure(what, make, args) for (what, _), make in rows.items()], args)


if __name__ == "__main__":
    main()
