"""The losses of a fixed short run, step by step, against those on record.

Both autoencoders and the joint stage (all three tasks, everything learning, every term of eq. 3.18)
on a few of the shipped emoji and passages, in float32 on the CPU. A change that is meant to change
them rewrites the record: ``python tests/test_golden_losses.py``.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from unified.data.shards import read_shards
from unified.training.run import train

GOLDEN = Path(__file__).parent / "golden" / "losses.txt"
RTOL = 1e-4
EMOJI, PROSE, COUNT = "embedded:emoji/train-00000.tar", "embedded:prose/train-00000.tar", 12


def shard(folder: Path, url: str) -> dict[str, list[str]]:
    """The first examples of a shipped shard, as a source of their own: few enough for a quick
    tokenizer."""
    members = [
        (f"{raw.key}.{ending}", data)
        for raw in read_shards(url)[:COUNT]
        for ending, data in raw.members.items()
    ]
    return {"train": [tiny.write_shard(folder / f"{url.split(':')[1].split('/')[0]}.tar", members)]}


def configuration(folder: Path) -> Any:
    tasks = {
        name: {**task, "source": "prose" if name == "continuation" else "emoji"}
        for name, task in tiny.TASKS.items()
    }
    tasks["continuation"]["max_tokens"] = 24
    learning = {"optimizer": {"lr": 3e-3, "warmup_steps": 2, "vae_lr_ratio": 0.5}}
    return tiny.config(
        folder / "run",
        modalities={"text": {**tiny.TEXT, "max_tokens": 4096}, "image": tiny.IMAGE},
        tasks=tasks,
        data={"sources": {"emoji": shard(folder, EMOJI), "prose": shard(folder, PROSE)}},
        flow={"clean_prefix_rate": 0.3, "timesteps": {"text": {"loc": 0.0}}},
        stages=[
            tiny.autoencoder("text", sources={"emoji": 1.0, "prose": 1.0}, crop=24, steps=5),
            tiny.autoencoder("image", sources={"emoji": 1.0}, steps=5),
            tiny.joint(steps=10, accumulate=2, loss={"ref": 0.1}, **learning),
        ],
    )


def losses() -> list[str]:
    """One line a loss: stage, step, term, value."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the order of additions is part of the record
    try:
        with tempfile.TemporaryDirectory() as name:
            train(configuration(Path(name)))
            lines = (Path(name) / "run" / "metrics.jsonl").read_text().splitlines()
    finally:
        torch.set_num_threads(threads)
    return [
        f"{line['stage']} {line['step']} {term} {value:.7g}"
        for line in map(json.loads, lines)
        for term, value in sorted(line.items())
        if term.split("/")[0] == "loss"
    ]


def parsed(lines: list[str]) -> dict[str, float]:
    pairs = (line.rpartition(" ") for line in lines)
    return {key: float(value) for key, _, value in pairs}


def test_losses_are_those_on_record() -> None:
    found, recorded = parsed(losses()), parsed(GOLDEN.read_text("utf-8").splitlines())
    assert found.keys() == recorded.keys()
    assert found == pytest.approx(recorded, rel=RTOL, abs=1e-6)


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text("\n".join(losses()) + "\n", "utf-8")
