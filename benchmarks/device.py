"""Steps of the three stages of training as a device runs them, within four minutes.

    python benchmarks/device.py                       # a table; on the accelerator if there is one
    python benchmarks/device.py --compile --json
    python benchmarks/device.py --size tiny           # what a CPU runs by default

A step is the whole of it: data from the shards, made ahead by workers, moved, forward, backward,
clipping, optimizer and averages. The models are those of a text-image model of about 20 M
parameters: a text VAE 256 wide with 2 + 2 blocks and a vocabulary of 4,096 (batch 128), an image
VAE at 128 pixels (batch 128), and a prior 320 wide with 2 + 6 blocks (batch 256, rows of 288,
autoencoders frozen). Data are the embedded emoji and prose, images brought to size.

    ms         median of the steps, from one to the next
    kernels    share of the time in which the device computes, of a few profiled steps (on a CPU
               there is no such difference)
    gb         the most memory that was allocated
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from itertools import pairwise
from typing import Any

import machine
import torch
from accelerate import Accelerator

from unified.config.loading import load_config
from unified.config.plugins import resolve_plugins
from unified.config.schema import Config
from unified.latents.tensors import tensors_of
from unified.model.precision import current_device, resolve
from unified.pipeline import UnifiedPipeline
from unified.training.folder import RunFolder
from unified.training.loop import Loop, Stage
from unified.training.stages import Materials, Sources

SIZES: dict[str, list[str]] = {
    "full": [
        "modalities.text.vocab_size=4096", "modalities.text.dim=256",
        "modalities.text.ffn_dim=1024", "modalities.text.num_heads=4",
        "modalities.text.encoder_num_blocks=2", "modalities.text.decoder_num_blocks=2",
        "modalities.image.max_size=128",
        "modalities.image.buckets=[128]",
        "modalities.image.network={block_out_channels: [128, 192, 256], pixel_patch: 4,"
        " layers_per_block: 1, norm_groups: 16, attention: false}",
        "prior.width=320", "prior.heads=5", "prior.multi_stream_depth=2",
        "prior.single_stream_depth=6", "stages.text_vae.batch_size=128",
        "stages.image_vae.batch_size=128", "stages.joint.batch_size=256",
        "stages.joint.row_length=288", "stages.joint.pad_rows=8",
    ],
    "tiny": [
        "modalities.text.vocab_size=300", "modalities.text.dim=32", "modalities.text.ffn_dim=64",
        "modalities.text.num_heads=2", "prior.width=32", "prior.heads=2", "prior.head_dim=16",
        "prior.rope_dim=12", "stages.text_vae.batch_size=8", "stages.image_vae.batch_size=8",
        "stages.joint.batch_size=8",
    ],
}  # fmt: skip
#: steps that are not counted, and steps that are profiled
WARMUP, PROFILED = 8, 5


def configuration(size: str, workers: int, compiled: bool) -> Config:
    """The stages of the quickstart at this size."""
    options = [f"data.workers={workers}", f"training.compile={str(compiled).lower()}"]
    return load_config("quickstart.yaml", [*SIZES[size], *options])


class Steps:
    """One stage, stepped through from its data on."""

    def __init__(self, materials: Materials, accelerator: Accelerator, folder: str):
        config, stage = materials.config, materials.stage
        objective = materials.objective().to(accelerator.device)
        self.data = materials.mixture(stage.batch_size, stage.name, collate=objective.collate)
        self.device = accelerator.device
        run = Stage(stage, config.training, objective, self.data, RunFolder(folder))
        self.loop, self.number, self.tensors = Loop(run, accelerator), 0, 0

    def take(self, count: int) -> list[float]:
        """Seconds of each of `count` steps, from one to the next; the host runs ahead as in
        training, and waits at the end."""
        ends = []
        for _ in range(count):
            work = self.loop._prepare(self.number)
            self.tensors = sum(len(tensors_of(part)) for part in work.parts)
            self.loop.coming.append(self.loop.step(self.number, work))
            self.loop._settle(1)
            self.number += 1
            ends.append(time.perf_counter())
        machine.wait()
        ends[-1] = time.perf_counter()
        return [b - a for a, b in pairwise(ends)]

    def kernels(self) -> float | None:
        """The share of the time in which an accelerator computes."""
        if self.device.type == "cpu":
            return None
        with torch.profiler.profile() as profile:
            start = time.perf_counter()
            self.take(PROFILED)
            spent = time.perf_counter() - start
        busy = sum(event.self_device_time_total for event in profile.key_averages())
        return busy / 1e6 / spent


def measure(config: Config, seconds: float, precision: str) -> list[dict[str, Any]]:
    """A row for every stage, each of which may take about so many `seconds`."""
    sources = Sources(config)
    torch.manual_seed(0)
    plugins = resolve_plugins(config)
    corpora = {name: sources.corpus(name, plugins) for name in config.modalities}
    pipeline = UnifiedPipeline.build(config, corpora)
    rows = []
    for stage in config.stages:
        accelerator = Accelerator(
            mixed_precision={"fp32": "no", "bf16": "bf16"}[precision],
            cpu=current_device().type == "cpu",
        )
        if accelerator.device.type != "cpu":
            torch.accelerator.reset_peak_memory_stats()
        materials = Materials(config, stage, pipeline.to(accelerator.device), sources, plugins)
        with tempfile.TemporaryDirectory() as folder:
            steps = Steps(materials, accelerator, folder)
            steps.take(WARMUP)
            times, end = [], time.perf_counter() + seconds
            while time.perf_counter() < end:
                times += steps.take(4)
            kernels = steps.kernels()
            steps.data.close()
        rows.append(
            {
                "stage": stage.name,
                "batch": stage.batch_size,
                "ms": round(statistics.median(times) * 1e3, 2),
                "kernels": None if kernels is None else round(kernels, 3),
                "gb": round(memory(accelerator.device), 2),
                "tensors": steps.tensors,
            }
        )
    return rows


def memory(device: torch.device) -> float:
    from unified.training.metrics import memory_gb

    return memory_gb(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    device = current_device()
    parser.add_argument("--size", choices=SIZES, default="tiny" if device.type == "cpu" else "full")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each stage")
    parser.add_argument("--workers", type=int, default=min(8, (os.cpu_count() or 2) - 1))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    precision = resolve(args.precision, device)
    config = configuration(args.size, args.workers, args.compile)
    rows = measure(config, args.seconds, precision)
    if args.json:
        print(json.dumps({"device": device.type, "precision": precision, "stages": rows}, indent=2))
        return
    print(f"{args.size} sizes on {device.type}, {precision}, compiled: {args.compile}")
    print(f"{'stage':12}{'batch':>6}{'ms':>10}{'kernels':>9}{'gb':>7}{'tensors':>9}")
    for row in rows:
        kernels = "-" if row["kernels"] is None else f"{row['kernels']:.0%}"
        print(
            f"{row['stage']:12}{row['batch']:6}{row['ms']:10.2f}{kernels:>9}{row['gb']:7.2f}"
            f"{row['tensors']:9}"
        )


if __name__ == "__main__":
    main()
