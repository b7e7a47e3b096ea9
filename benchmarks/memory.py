"""The peak of resident memory of training steps and of generation, each in a new process.

    python benchmarks/memory.py                           # a table; --json for JSON (Linux)
    python benchmarks/memory.py --batch 4 --seqlen 512

`train_step.py` and `generation.py` measure themselves: `peak_rss_gb` is the whole process, and
`rss_above_gb` its part above what the process held after its imports. Training is shown in fp32 and
bf16, with and without activation checkpointing. (`memory_model.py` compares a prediction.)

glibc keeps freed memory for later, which would count. The processes are told to give every tensor
above 64 KiB pages of its own, which go back when it ends.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine
import reference

SETTINGS = {"MALLOC_MMAP_THRESHOLD_": "65536"}
#: the matrices of the machine's own speed would count too, so it is looked at once and briefly
BRIEFLY = ["--repeats", "1", "--matmul-seconds", "0", "--json"]


def runs(args: argparse.Namespace) -> dict[str, list[str]]:
    """Name of a run -> its script and options."""
    sizes = ["--size", args.size, "--batch", str(args.batch)]
    training = ["train_step.py", *sizes, "--seqlen", str(args.seqlen)]
    generating = ["generation.py", *sizes, "--prompt", str(args.prompt), "--new", str(args.new)]
    found = {}
    for dtype in machine.DTYPES:
        found[f"training {dtype}"] = [*training, "--dtype", dtype]
        found[f"training {dtype}, recomputing"] = [*training, "--dtype", dtype, "--recompute"]
    return found | {f"generation {d}": [*generating, "--dtype", d] for d in machine.DTYPES}


def measure(name: str, command: Sequence[str], threads: int | None) -> dict[str, Any]:
    """One row of the table. CalledProcessError for a run that fails."""
    script, *options = command
    options += [] if threads is None else ["--threads", str(threads)]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(script)), *options, *BRIEFLY],
        env=os.environ | SETTINGS, check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    (row,) = json.loads(done.stdout)["rows"]
    return {"run": name, **{key: row[key] for key in ("rss_above_gb", "peak_rss_gb")}}


def main(arguments: Sequence[str] | None = None) -> None:
    options = machine.parser(__doc__)
    options.add_argument("--size", choices=list(reference.SIZES), default="reference")
    options.add_argument("--batch", type=int, default=4)
    options.add_argument("--seqlen", type=int, default=512, help="clean latents of a sample")
    options.add_argument("--prompt", type=int, default=64)
    options.add_argument("--new", type=int, default=64)
    options.add_argument("--only", nargs="+", help="runs whose name begins so, e.g. generation")
    args = machine.parse(options, arguments)
    chosen = {k: v for k, v in runs(args).items() if k.startswith(tuple(args.only or [""]))}
    machine.show([measure(name, command, args.threads) for name, command in chosen.items()], args)


if __name__ == "__main__":
    main()
