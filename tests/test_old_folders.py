"""Folders that an earlier version wrote: a run that stopped at step 2 of 4, and its pipeline.

`old/` holds what commit 92f7f70 left of a tiny text-only configuration.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from unified.config.loading import load_config
from unified.pipeline import UnifiedPipeline
from unified.training import checkpoint
from unified.training.run import train

OLD = Path(__file__).parent / "old"


@pytest.mark.parametrize("name", ["run", "pipeline"])
def test_they_are_small(name: str) -> None:
    assert sum(p.stat().st_size for p in (OLD / name).rglob("*")) < 300_000


def test_an_old_pipeline_opens_and_generates() -> None:
    pipeline = UnifiedPipeline.from_pretrained(OLD / "pipeline")
    stored = load_file(OLD / "pipeline" / "prior" / "model.safetensors")
    for name, tensor in pipeline.prior.state_dict().items():
        assert torch.equal(tensor, stored[name]), name
    (text,) = pipeline.continue_text(["a big"], max_new_tokens=4, seed=0)
    assert isinstance(text, str)


def test_an_old_run_continues(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From its weights, its moments and its step, and it says what changes."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(OLD / "run", "run")
    shutil.copy(OLD / "s.tar", "s.tar")
    final = train(load_config("run/config.yaml", ["training.max_steps=4"]))
    told = capsys.readouterr().err
    assert "continuing joint at step 2" in told
    assert "the noise that steps draw changes from here" in told
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    joint = [line for line in lines if line["stage"] == "joint" and "loss" in line]
    losses = {line["step"]: line["loss"] for line in joint}
    assert sorted(losses) == [1, 2, 3, 4]
    newest = checkpoint.newest(Path("run/checkpoints"), "joint")
    assert newest is not None
    assert checkpoint.draws_alike(newest)
    steps = {k: v for k, v in checkpoint.read(newest, "optimizer").items() if k.startswith("step/")}
    assert steps
    assert {float(s) for s in steps.values()} == {4.0}  # moments go on, they do not begin again
    assert UnifiedPipeline.from_pretrained(final).prior is not None
