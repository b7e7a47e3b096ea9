"""Trains the tiny model, as one of several processes: ``processes.py FOLDER KEY=VALUE...``.

`launch` runs it under torchrun. The configuration has two modalities, all three tasks, autoencoders
that learn in the joint stage and rest at times, and two multi-stream blocks: whatever can go wrong
between processes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import devices
import tiny
import yaml

from unified.config.loading import load_config
from unified.config.schema import Config
from unified.errors import StoppedError

LEARNING = {"lr": 1e-2, "warmup_steps": 2, "vae_lr_ratio": 0.5}
STAGES = [
    tiny.autoencoder("image", batch_size=6),
    tiny.joint(
        steps=6,
        batch_size=12,
        row_length=128,
        optimizer=LEARNING,
        interval={"train": 2, "freeze": 1},
    ),
]
TRAINING = {"save_every": 3, "validate_every": 3, "validation_examples": 5, "sample_every": 6}


def config(folder: Path, *overrides: str) -> Config:
    """The run in `folder`, whose configuration and shard lie beside it."""
    shard, file = folder.parent / "squares.tar", folder.parent / "tiny.yaml"
    if not file.is_file():
        tiny.write_shard(shard, tiny.squares())
        tree = tiny.tree(folder, str(shard), stages=STAGES)
        tree["prior"] = {**tiny.PRIOR, "multi_stream_depth": 2}
        tree["data"]["sources"]["s"]["val"] = [str(shard)]
        tree["training"] |= TRAINING
        # often, a process has no image in its part of a batch
        tree["tasks"] = {**tiny.TASKS, "continuation": {**tiny.TASKS["continuation"], "ratio": 6}}
        file.write_text(yaml.safe_dump(tree))
    return load_config(file, [*overrides, f"run.dir={folder}"])


def launch(folder: Path, processes: int, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Train as `processes` processes; what they printed is in the result."""
    devices.need(processes)
    config(folder, *overrides)  # writes the files that all processes read
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run(
        [sys.executable, *command, __file__, str(folder), *overrides],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
    )


def main(folder: str, *overrides: str) -> None:
    import torch.distributed as dist

    from unified.training import loop
    from unified.training.run import train

    distribute = loop.distribute

    def telling(model: Any, *args: Any) -> Any:
        distributed = distribute(model, *args)
        if dist.is_initialized():
            tell(model)
        return distributed

    loop.distribute = telling  # type: ignore[attr-defined]
    try:
        train(config(Path(folder), *overrides))
    except StoppedError as stopped:
        print(stopped, file=sys.stderr)


def tell(model: Any) -> None:
    """Print what kind of parameters this process has, and how much of them."""
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor

    parameters = list(model.parameters())
    (kind,) = {"DTensor" if isinstance(p, DTensor) else "Parameter" for p in parameters}
    local = sum(getattr(p, "_local_tensor", p).numel() for p in parameters)
    whole = sum(p.numel() for p in parameters)
    print(f"process {dist.get_rank()} of {dist.get_world_size()}: {kind}, {local} of {whole}")


if __name__ == "__main__":
    main(*sys.argv[1:])
