"""How cost grows: the exponent of time in what is made larger, of a training step and generation.

    python benchmarks/scaling.py                          # a table; --json for JSON
    python benchmarks/scaling.py --only length --dtype bf16

* ``samples``: a training step over more samples, in rows of one length
* ``length``: a training step over longer samples; as many as keep the positions the same, so that
  1 is a cost of each position alone, and 2 one of each pair
* ``image``: a training step of text to image with larger images; x is the pixels of a side
* ``batch``: generation of more texts at once

Each point is the best of `--repeats` runs after one that is not timed. `exponent` is the slope of
log(seconds) over log(x) by least squares, and stands in the last row of each part; for ``length``
the seconds are those of one sample. `share` is of the machine's matmul FLOP/s (not for ``image``,
whose autoencoder is not counted).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from math import log
from statistics import linear_regression
from typing import Any

import generation
import machine
import reference
import torch
import train_step

from unified.config.schema import Config
from unified.pipeline import UnifiedPipeline

#: model size -> what is made larger -> its values, and for training the positions of a batch
POINTS: dict[str, dict[str, list[int]]] = {
    "reference": {
        "samples": [1, 2, 4, 8],
        "length": [64, 128, 256, 512],
        "image": [64, 128, 192, 256],
        "batch": [1, 2, 4, 8],
    },
    "tiny": {"samples": [1, 2], "length": [8, 16], "image": [32, 64], "batch": [1, 2]},
}
#: latents of a sample where it is the number of samples that grows, and of a caption
LENGTH, CAPTION = {"reference": 128, "tiny": 8}, {"reference": 32, "tiny": 8}


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """The slope of log y over log x."""
    return linear_regression([log(v) for v in x], [log(v) for v in y]).slope


def model(args: argparse.Namespace) -> UnifiedPipeline:
    return reference.build(args.size, device=args.device)


def samples(count: int, args: argparse.Namespace) -> tuple[float, int]:
    step, flops = train_step.text_step(model(args), count, LENGTH[args.size])
    return timed(step, args), flops


def length(latents: int, args: argparse.Namespace) -> tuple[float, int]:
    """Seconds and FLOPs of one sample."""
    count = max(POINTS[args.size]["length"]) // latents
    step, flops = train_step.text_step(model(args), count, latents)
    return timed(step, args) / count, flops // count


def image(side: int, args: argparse.Namespace) -> tuple[float, int | None]:
    pipeline = pictures(args.size, max(POINTS[args.size]["image"]), args.device)
    rng = torch.Generator().manual_seed(0)
    observation = {
        "C": reference.random_ids(pipeline.config, (CAPTION[args.size],)),
        "I": torch.randint(256, (3, side, side), dtype=torch.uint8, generator=rng),
    }
    row = 2 * CAPTION[args.size] + (side // 16) ** 2
    step = train_step.TrainStep(pipeline, [observation] * 2, row, task="text_to_image")
    return timed(step, args), None


def batch(count: int, args: argparse.Namespace) -> tuple[float, int]:
    prompt = LENGTH[args.size] // 2
    run = generation.Generation(model(args), count, prompt, prompt // 2)
    return timed(run, args), run.flops


PARTS: Mapping[str, Callable[[int, argparse.Namespace], tuple[float, int | None]]] = {
    "samples": samples,
    "length": length,
    "image": image,
    "batch": batch,
}


def pictures(size: str, side: int, device: str) -> UnifiedPipeline:
    """The reference model with images of up to `side` pixels, in cells of 16, beside its text."""
    tree = reference.configuration(size).model_dump()
    network = {"block_out_channels": [16, 16], "layers_per_block": 1, "norm_groups": 4}
    tree["modalities"]["image"] = {
        "type": "image", "max_size": side,
        "network": network | {"pixel_patch": 8, "attention": False},
    }  # fmt: skip
    block = reference.SIZES[size]["block"]
    tree["tasks"] = {"text_to_image": {"type": "text_to_image", "source": "s", "block": block}}
    pipeline = UnifiedPipeline.build(Config.model_validate(tree))
    reference.nudge(pipeline.prior)
    return pipeline.to(device)


def timed(run: Callable[[], object], args: argparse.Namespace) -> float:
    """The best of `--repeats` runs, after one that is not timed."""
    with machine.autocast(args.dtype, args.device):
        run()
        return machine.best_of(run, args.repeats)


def measure(part: str, args: argparse.Namespace, limit: machine.Limit) -> list[dict[str, Any]]:
    """The rows of one part; the machine is looked at anew for each."""
    limit.look()
    rows: list[dict[str, Any]] = []
    for x in POINTS[args.size][part]:
        took, flops = PARTS[part](x, args)
        share = None if flops is None else limit.share(flops, took)
        rows.append({"what": part, "x": x, "seconds": took, "share": share})
    found = exponent([row["x"] for row in rows], [row["seconds"] for row in rows])
    rows[-1]["exponent"] = found
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    options = machine.parser(__doc__)
    machine.add_model_options(options, list(POINTS))
    options.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    args = machine.parse(options, arguments)
    limit = machine.Limit(args.dtype, args.matmul_seconds, args.device)
    rows = [row for part in args.only for row in measure(part, args, limit)]
    machine.show(rows, args)


if __name__ == "__main__":
    main()
