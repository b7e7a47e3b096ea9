"""Seconds until something happens, from the start of a new process.

    python benchmarks/startup.py                          # a table; --json for JSON

* ``import unified``: nothing else
* ``unified --help``: the command line says what it can do
* ``first token``: a small checkpoint (made in a temporary folder) is read, and the first block of a
  continuation is there
* ``generate``: the same by ``unified generate continuation``, to its end

Each is a process of its own, `--repeats` times after one that is not timed (it fills the file
cache); the best and the median are shown.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import machine
import reference
import torch

from unified.data.shards import read_shards
from unified.pipeline import UnifiedPipeline

CORPUS = "embedded:prose/val-00000.tar"
PROMPT = "It was a dark night"
FIRST = f"""
import sys
from unified import UnifiedPipeline
pipeline = UnifiedPipeline.from_pretrained(sys.argv[1])
print(next(pipeline.stream("continuation", [{{"C": {PROMPT!r}}}], seed=0)))
"""


def save(folder: Path, size: str) -> None:
    """A checkpoint with random weights and a tokenizer that was trained on a few passages."""
    config = reference.configuration(size)
    vocabulary = max(512, config.modalities["text"].options["vocab_size"])
    options = config.modalities["text"].options | {"vocab_size": vocabulary}
    part = config.modalities["text"].model_validate({"type": "text", **options})
    config = config.model_copy(update={"modalities": {"text": part}})
    torch.manual_seed(0)
    passages = [raw.members["txt"].decode() for raw in read_shards(CORPUS)[:50]]
    pipeline = UnifiedPipeline.build(config, {"text": passages})
    for module in pipeline.modules.values():
        reference.nudge(module)
    pipeline.save_pretrained(folder)


def commands(checkpoint: Path) -> dict[str, list[str]]:
    """What is timed, as arguments of Python."""
    cli = ["-m", "unified.cli"]
    asked = ["--checkpoint", str(checkpoint), "--prompt", PROMPT, "--max-new-tokens", "16"]
    return {
        "import unified": ["-c", "import unified"],
        "unified --help": [*cli, "--help"],
        "first token": ["-c", FIRST, str(checkpoint)],
        "generate": [*cli, "generate", "continuation", *asked],
    }


def measure(what: str, arguments: Sequence[str], repeats: int) -> dict[str, Any]:
    """One row of the table. CalledProcessError for a command that fails."""

    def run() -> None:
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)

    run()
    times = [machine.seconds(run) for _ in range(repeats)]
    return {"what": what, "best_s": min(times), "median_s": median(times)}


def main(arguments: Sequence[str] | None = None) -> None:
    options = machine.parser(__doc__)
    options.add_argument("--size", choices=list(reference.SIZES), default="reference")
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--only", nargs="+", choices=list(commands(Path())), help="some of them")
    args = machine.parse(options, arguments)
    with TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint"
        save(checkpoint, args.size)
        chosen = {k: v for k, v in commands(checkpoint).items() if k in (args.only or [k])}
        rows = [measure(what, command, args.repeats) for what, command in chosen.items()]
    machine.show(rows, args)


if __name__ == "__main__":
    main()
