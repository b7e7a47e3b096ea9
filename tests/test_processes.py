"""Several processes: the same losses and weights as one, replicated and sharded."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from torch import Tensor

from unified.config.schema import TrainingConfig
from unified.latents.weights import named_tensors
from unified.model import prior
from unified.model.attention import see
from unified.pipeline import UnifiedPipeline
from unified.training import checkpoint
from unified.training.parallel import mesh_shape
from unified.training.run import train

SHARDED = "training.sharding=full"
#: a step's loss may differ by the order of float32 additions
CLOSE: Any = {"rel": 1e-4, "abs": 1e-5}


def losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line.get("loss", line.get("val/loss")) for line in lines]


def weights(run: Path) -> dict[str, Tensor]:
    modules = UnifiedPipeline.from_pretrained(run / "final").modules
    return {f"{p}.{n}": t for p, m in modules.items() for n, t in named_tensors(m).items()}


def same(one: Path, two: Path) -> None:
    """The losses are those of the other run; so are nearly all weights (Adam's first steps divide
    by gradients near zero, so that a few follow the order of additions)."""
    assert losses(one) == pytest.approx(losses(two), **CLOSE)
    a, b = weights(one), weights(two)
    assert a.keys() == b.keys()
    apart = sum(int((~a[n].isclose(b[n], rtol=1e-2, atol=1e-3)).sum()) for n in a)
    assert apart < 0.01 * sum(t.numel() for t in a.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "options"),
    [
        (2, ["training.sharding=none"]),
        (2, [SHARDED, "data.workers=1", "stages.1.accumulate=2"]),
        (3, [SHARDED, "training.activation_checkpointing=true"]),
        (2, ["training.sharding=hybrid", "training.shard_size=1"]),
        (2, [SHARDED, "training.background_checkpoints=true"]),
    ],
)
def test_processes_change_nothing(tmp_path: Path, count: int, options: list[str]) -> None:
    train(processes.config(tmp_path / "alone"))
    done = processes.launch(tmp_path / "many", count, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    same(tmp_path / "many", tmp_path / "alone")
    assert (tmp_path / "many" / "samples" / "joint-6").is_dir()
    sharding = options[0].partition("=")[2]
    told = re.findall(r"process (\d) of (\d): (\w+), (\d+) of (\d+)", done.stdout)
    assert {(rank, world) for rank, world, *_ in told} == {
        (str(i), str(count)) for i in range(count)
    }
    kinds = {"none": "Parameter", "full": "DTensor", "hybrid": "DTensor"}
    assert {kind for _, _, kind, _, _ in told} == {kinds[sharding]}
    for total in {int(total) for *_, total in told}:  # of either stage
        local = [int(part) for *_, part, whole in told if int(whole) == total]
        assert sum(local) == total * (1 if sharding == "full" else count)
        assert max(local) <= total * (0.6 if sharding == "full" else 1)


@pytest.mark.slow
def test_what_two_processes_sharded_any_number_continues(tmp_path: Path) -> None:
    train(processes.config(tmp_path / "alone"))
    first = processes.launch(tmp_path / "two", 2, SHARDED, "training.max_steps=3")
    assert first.returncode == 0, first.stderr[-3000:]
    # a folder of its own may follow the first, since run.dir may change
    for count in (1, 3):
        shutil.copytree(tmp_path / "two", tmp_path / str(count))
    train(processes.config(tmp_path / "1"))
    third = processes.launch(tmp_path / "3", 3, SHARDED)
    assert third.returncode == 0, third.stderr[-3000:]
    assert "continuing joint at step 3" in third.stderr
    for count in (1, 3):
        same(tmp_path / str(count), tmp_path / "alone")


def test_groups_must_divide_the_processes() -> None:
    config = TrainingConfig(sharding="hybrid", shard_size=4)
    assert mesh_shape(config, 8)["mesh_shape"] == (2, 4)
    with pytest.raises(ValueError, match="shard_size is 4, which does not divide the 6 processes"):
        mesh_shape(config, 6)


def test_one_process_cannot_shard(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sharding is full, but this is one process alone"):
        train(processes.config(tmp_path / "run", SHARDED))


def test_a_second_run_in_one_folder_is_refused(tmp_path: Path) -> None:
    from unified.training.folder import RunFolder

    folder = RunFolder(tmp_path / "run")
    with (
        folder.claimed(),
        pytest.raises(ValueError, match=r"another process is training in .*run;"),
    ):
        train(processes.config(tmp_path / "run"))
    train(processes.config(tmp_path / "run", "training.max_steps=0"))


def test_a_checkpoint_becomes_a_pipeline(tmp_path: Path) -> None:
    from unified.training.export import exported

    train(processes.config(tmp_path / "run"))
    path = checkpoint.newest(tmp_path / "run" / "checkpoints", "joint")
    assert path is not None
    final = weights(tmp_path / "run")
    exported(path).save_pretrained(tmp_path / "copy" / "final")
    copy = weights(tmp_path / "copy")
    assert all(copy[n].equal(t) for n, t in final.items())
    exported(path, "raw").save_pretrained(tmp_path / "raw" / "final")
    raw = weights(tmp_path / "raw")
    assert not all(raw[n].equal(t) for n, t in final.items())
    with pytest.raises(ValueError, match="is not a whole checkpoint"):
        exported(tmp_path / "run")


@pytest.mark.slow
def test_sigterm_to_the_whole_group_saves_though_workers_are_in_it(tmp_path: Path) -> None:
    run, steps = tmp_path / "run", "stages.joint.steps=100000"
    many = [steps, "data.workers=2", "training.save_every=100000", "training.sample_every=null"]
    quiet = ["training.validate_every=100000"]
    processes.config(run)
    command = [sys.executable, processes.__file__, str(run), *many, *quiet]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    metrics = run / "metrics.jsonl"
    while not (metrics.is_file() and '"joint"' in metrics.read_text()):
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert "as asked by SIGTERM; the same command continues" in said
    assert checkpoint.newest(run / "checkpoints", "joint") is not None


@pytest.mark.slow
def test_a_sharded_run_that_is_capped_at_no_step_still_ends(tmp_path: Path) -> None:
    done = processes.launch(tmp_path / "run", 2, SHARDED, "training.max_steps=0")
    assert done.returncode == 0, done.stderr[-3000:]
    assert weights(tmp_path / "run")


def test_a_first_checkpoint_that_is_damaged_starts_the_stage_anew(tmp_path: Path) -> None:
    """Its statistics are fitted again: nothing of the damaged one is used."""
    train(processes.config(tmp_path / "alone"))
    train(processes.config(tmp_path / "run", "training.max_steps=3"))
    folder = tmp_path / "run"
    (path,) = (folder / "checkpoints").glob("joint-*")
    (shard,) = path.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-64] + bytes(64))
    finished = json.loads((folder / "stages" / "finished.json").read_text())
    del finished["joint"]
    (folder / "stages" / "finished.json").write_text(json.dumps(finished))
    shutil.rmtree(folder / "stages" / "joint")
    shutil.rmtree(folder / "final")
    train(processes.config(folder))
    assert losses(folder) == losses(tmp_path / "alone")
    assert all(weights(folder)[n].equal(t) for n, t in weights(tmp_path / "alone").items())


def test_settings_of_the_prior_reach_it_and_change_no_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled blocks (here as they are), and caches of fixed size in what is sampled."""
    train(processes.config(tmp_path / "plain"))
    compiled, backends = [], set()
    monkeypatch.setattr(torch, "compile", lambda f, *_, **__: compiled.append(f) or f)
    monkeypatch.setattr(prior, "see", lambda *args: backends.add(args[3]) or see(*args))
    settings = ["training.compile=true", "training.attention=sdpa"]
    train(processes.config(tmp_path / "set", *settings))
    assert len(compiled) == 3
    assert backends == {"sdpa"}
    plain, found = weights(tmp_path / "plain"), weights(tmp_path / "set")
    assert all(torch.equal(found[name], plain[name]) for name in plain)
