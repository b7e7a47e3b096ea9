"""Kill a run at random moments, again and again, and compare it with one that nobody touched.

    python benchmarks/kill_resume.py --kills 50 [--workers 2] [--background] [--processes 2]

A small joint model trains for some steps, saving every few. One run goes through. The other is
killed --kills times: at a random moment, with SIGKILL or SIGTERM; while it is starting; by SIGKILL
while a checkpoint is written (tensors there, sums not yet); or by a power cut, after which the
newest checkpoint ends in zeros. The same command then goes on each time. At the end, the losses of
every step and all weights must be bit-equal.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

#: kinds of kills, by how often they are drawn
KINDS = {"SIGKILL": 6, "SIGTERM": 2, "starting": 1, "while saving": 3, "power cut": 2}
#: keys of metrics.jsonl that tell time or memory
TIMED = {"seconds", "examples_per_s", "positions_per_s", "data_wait", "memory_gb"}
#: makes the process kill itself where it would seal a checkpoint
WHILE_SAVING = """
import os, signal, sys
from unified.training import checkpoint
checkpoint.seal = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
"""
TRAIN = "import sys; from unified.cli import main; sys.argv = ['unified', *sys.argv[1:]]; main()"


@dataclass
class Result:
    kills: Counter[str] = field(default_factory=Counter)
    #: checkpoints that a sitting found damaged, and sittings that began at step 0
    damaged: int = 0
    sittings: int = 0
    steps: int = 0
    losses_equal: bool = False
    weights_equal: bool = False
    seconds: float = 0.0


def config(folder: Path, args: argparse.Namespace) -> Path:
    """A text and an image autoencoder (untrained), and a joint stage over all three tasks."""
    emoji, prose = "embedded:emoji/train-00000.tar", "embedded:prose/val-00000.tar"
    task = {"source": "emoji", "block": 8}
    tree = {
        "modalities": {
            "text": {
                "type": "text", "vocab_size": 512, "dim": 32, "ffn_dim": 64, "num_heads": 2,
                "encoder_num_blocks": 1, "decoder_num_blocks": 1, "max_tokens": 2048,
            },
            "image": {
                "type": "image", "max_size": 64, "channels": 8,
                "network": {"block_out_channels": [8, 8, 8], "layers_per_block": 1,
                            "norm_groups": 4, "attention": False, "pixel_patch": 4},
            },
        },
        "prior": {"width": 32, "heads": 2, "head_dim": 16, "rope_dim": 12,
                  "multi_stream_depth": 1, "single_stream_depth": 1},
        "tasks": {
            "captioning": {"type": "captioning", **task},
            "text_to_image": {"type": "text_to_image", **task},
            "continuation": {"type": "continuation", "source": "prose", "block": 8,
                             "max_tokens": 48},
        },
        "data": {
            "sources": {"emoji": {"train": [emoji]}, "prose": {"train": [prose]}},
            "shuffle_buffer": 64, "workers": args.workers, "max_bad_share": 0.2,
        },
        "training": {
            "precision": "fp32", "log_every": 1, "save_every": 5, "validate_every": 10**6,
            "trackers": [], "background_checkpoints": args.background, "sharding": args.sharding,
        },
        "stages": [{"name": "joint", "objective": "joint", "steps": args.steps, "batch_size": 8,
                    "row_length": 160, "too_long": "truncate",
                    "optimizer": {"lr": 1e-3, "vae_lr_ratio": 0.5}}],
    }  # fmt: skip
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def start(file: Path, run: Path, args: argparse.Namespace, prelude: str = "") -> Any:
    """The training command."""
    script = run.parent / f"train{'-dies' if prelude else ''}.py"
    script.write_text(prelude + TRAIN)
    launcher = [sys.executable]
    if args.processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone"]
        launcher += [f"--nproc_per_node={args.processes}"]
    command = [*launcher, str(script), "train", str(file), f"run.dir={run}"]
    with (run.parent / f"{run.name}.log").open("a") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip


def kill(process: Any, how: signal.Signals) -> None:
    """End a sitting, the processes that torchrun launched too, and wait for all of them."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
        for member in (psutil.Process(process.pid), *(family if how == signal.SIGKILL else [])):
            with contextlib.suppress(psutil.NoSuchProcess):
                member.send_signal(how)
        psutil.wait_procs(family)
    process.wait()


def once(kind: str, file: Path, run: Path, args: argparse.Namespace, draw: random.Random) -> bool:
    """One sitting that ends badly; whether it was ended before it was finished."""
    process = start(file, run, args, WHILE_SAVING if kind == "while saving" else "")
    if kind != "starting":
        wait_for_steps(process, run)
    delay = draw.random() * args.longest
    try:
        process.wait(timeout=None if kind == "while saving" else delay)
        return bool(process.returncode)
    except subprocess.TimeoutExpired:
        kill(process, signal.SIGTERM if kind == "SIGTERM" else signal.SIGKILL)
    if kind == "power cut":
        cut(run)
    return True


def wait_for_steps(process: Any, run: Path) -> None:
    """Until this sitting writes its first line of metrics, or ends."""
    metrics = run / "metrics.jsonl"
    before = metrics.stat().st_mtime_ns if metrics.is_file() else 0
    while process.poll() is None:
        if metrics.is_file() and metrics.stat().st_mtime_ns > before and metrics.stat().st_size:
            return
        time.sleep(0.02)


def cut(run: Path) -> None:
    """What a disk may hold after a power cut: the newest checkpoint's last bytes are zeros."""
    shards = sorted(run.glob("checkpoints/*/*.safetensors"), key=lambda p: p.stat().st_mtime)
    if len({shard.parent for shard in shards}) > 1:  # else there is none to fall back on
        data = shards[-1].read_bytes()
        shards[-1].write_bytes(data[:-4096] + bytes(min(4096, len(data))))


def losses(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMED} for line in found]


def weights(run: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run)): p.read_bytes() for p in run.glob("final/**/*.safetensors")}


def measure(folder: Path, args: argparse.Namespace) -> Result:
    file, straight, killed = config(folder, args), folder / "straight", folder / "killed"
    if start(file, straight, args).wait():
        raise SystemExit((folder / "straight.log").read_text()[-2000:])
    result, draw = Result(), random.Random(args.seed)
    began = time.monotonic()
    while sum(result.kills.values()) < args.kills and not (killed / "final").is_dir():
        kind = draw.choices(list(KINDS), list(KINDS.values()))[0]
        result.kills[kind] += once(kind, file, killed, args, draw)
        result.sittings += 1
    start(file, killed, args).wait()
    result.seconds = time.monotonic() - began
    result.damaged = (folder / "killed.log").read_text().count("is damaged")
    result.steps = len(losses(straight))
    result.losses_equal = losses(straight) == losses(killed)
    result.weights_equal = weights(straight) == weights(killed) != {}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--sharding", choices=["none", "full", "hybrid"], default="none")
    parser.add_argument("--background", action="store_true", help="save in the background")
    parser.add_argument("--longest", type=float, default=4.0, help="a kill comes within so many s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), args)
    if args.json:
        print(json.dumps({**vars(args), **vars(result)}, indent=2))
        return
    kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(result.kills.items()))
    columns = [
        "processes",
        "workers",
        "saving",
        "steps",
        "kills",
        "damage named",
        "losses",
        "weights",
    ]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    saving = "background" if args.background else "at once"
    equal = {True: "equal", False: "DIFFERENT"}
    print(
        f"| {args.processes} (sharding {args.sharding}) | {args.workers} | {saving} |"
        f" {result.steps} | {kinds} | {result.damaged} | {equal[result.losses_equal]} |"
        f" {equal[result.weights_equal]} |"
    )


if __name__ == "__main__":
    main()
