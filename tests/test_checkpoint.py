"""Checkpoints: exact continuation, and nothing read that is not whole and of the same model."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn
from toy_stage import lines, on_the_cpu, stage_config, toy, training_config

from unified.config.schema import IntervalConfig
from unified.errors import StoppedError
from unified.latents.weights import (
    load_weights,
    named_tensors,
    save_tensors,
    save_weights,
    written_whole,
)
from unified.training import checkpoint
from unified.training.loop import Stage, train_stage


@pytest.fixture
def accelerator() -> Accelerator:
    return on_the_cpu()


def everything(folder: Path) -> dict[str, Tensor]:
    """All tensors of the newest checkpoint."""
    path = checkpoint.newest(folder / "checkpoints", "toy")
    assert path is not None
    return {
        f"{group}/{name}": tensor
        for group in ("model", "ema", "optimizer")
        for name, tensor in checkpoint.read(path, group).items()
    }


class KilledError(Exception):
    """The machine went away."""


def killed_at(stage: Stage, step: int) -> Stage:
    """`stage`, which dies in the forward of `step` (from 0)."""
    forward, calls = stage.objective.forward, iter(range(1000))

    def dying(batch: object) -> dict[str, Tensor]:
        if next(calls) == step * stage.config.accumulate:
            raise KilledError
        return forward(batch)

    stage.objective.forward = dying  # type: ignore[method-assign]
    return stage


@pytest.mark.parametrize("died_at", [3, 5])
def test_a_killed_run_continues_bit_for_bit(
    tmp_path: Path, accelerator: Accelerator, died_at: int
) -> None:
    settings = {"interval": IntervalConfig(train=2, freeze=2), "accumulate": 2}
    dropout = {"dropout": 0.3}
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    train_stage(toy(straight, stage_config(**settings), objective=dropout), accelerator)
    with pytest.raises(KilledError):
        train_stage(
            killed_at(toy(broken, stage_config(**settings), objective=dropout), died_at),
            accelerator,
        )
    train_stage(toy(broken, stage_config(**settings), objective=dropout), accelerator)
    one, two = everything(straight), everything(broken)
    assert one.keys() == two.keys()
    assert all(one[name].equal(two[name]) for name in one)
    timing = {"seconds", "examples_per_s", "positions_per_s", "data_wait", "memory_gb"}
    compared = [
        [{k: v for k, v in line.items() if k not in timing} for line in lines(f)]
        for f in (straight, broken)
    ]
    assert compared[0] == compared[1]


def test_the_newest_two_and_the_best_are_kept(tmp_path: Path, accelerator: Accelerator) -> None:
    stage = toy(tmp_path, stage_config(steps=8), training_config(save_every=1, validate_every=1))
    stage.validate = lambda step: {"loss": abs(step - 2.0)}
    train_stage(stage, accelerator)
    found = checkpoint.steps(tmp_path / "checkpoints", "toy")
    assert list(found) == [2, 7, 8]
    state = checkpoint.read_state(found[8])
    assert state is not None
    assert state["progress"]["best_step"] == 2


def test_the_best_is_saved_between_regular_saves(tmp_path: Path, accelerator: Accelerator) -> None:
    stage = toy(tmp_path, None, training_config(save_every=6, validate_every=2))
    stage.validate = lambda step: {"loss": abs(step - 2.0)}
    train_stage(stage, accelerator)
    assert list(checkpoint.steps(tmp_path / "checkpoints", "toy")) == [2, 6]


@pytest.mark.parametrize("damage", ["cut", "missing", "no state", "empty state", "one bit"])
def test_a_damaged_checkpoint_is_named_and_never_read(
    tmp_path: Path, accelerator: Accelerator, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    train_stage(toy(tmp_path), accelerator)
    path = tmp_path / "checkpoints" / "toy-6"
    (shard,) = path.glob("*.safetensors")
    data = shard.read_bytes()
    if damage == "cut":
        shard.write_bytes(data[:-7])
    elif damage == "one bit":
        shard.write_bytes(data[:-7] + bytes([data[-7] ^ 1]) + data[-6:])
    elif damage == "empty state":
        (path / "state.json").write_text("")
    else:
        {"missing": shard, "no state": path / "state.json"}[damage].unlink()
    found, sentences = checkpoint.newest_sound(tmp_path / "checkpoints", "toy")
    assert found == path.with_name("toy-3")
    assert "toy-6 is damaged: " in sentences[0]
    capsys.readouterr()
    assert train_stage(toy(tmp_path), accelerator).step == 6
    said = capsys.readouterr().err
    assert "toy-6 is damaged" in said
    assert "continuing toy at step 3" in said
    assert checkpoint.newest_sound(tmp_path / "checkpoints", "toy") == (path, [])


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_loses_nothing(
    tmp_path: Path,
    accelerator: Accelerator,
    background: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    full: set[int] = {4, 6}
    seal = checkpoint.seal

    def sealing(partial: Path, path: Path, stage: str, progress: Mapping[str, Any]) -> None:
        if progress["step"] in full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        seal(partial, path, stage, progress)

    monkeypatch.setattr(checkpoint, "seal", sealing)
    settings = training_config(save_every=2, background_checkpoints=background)
    with pytest.raises(
        ValueError, match=r"its last checkpoint could not be written to .* make roo"
    ):
        train_stage(toy(tmp_path, None, settings), accelerator)
    said = capsys.readouterr().err
    assert "the checkpoint of step 4 could not be written" in said
    assert "No space left" in said
    assert list(checkpoint.steps(tmp_path / "checkpoints", "toy")) == [2]
    full.clear()
    assert train_stage(toy(tmp_path, None, settings), accelerator).step == 6
    assert list(checkpoint.steps(tmp_path / "checkpoints", "toy")) == [4, 6]
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_a_checkpoint_written_in_the_background_is_that_of_its_step(
    tmp_path: Path, accelerator: Accelerator
) -> None:
    for background in (False, True):
        folder = tmp_path / str(background)
        settings = training_config(save_every=1, background_checkpoints=background)
        settings.keep_checkpoints = 6
        train_stage(toy(folder, None, settings), accelerator)
    for step in range(1, 7):
        one, two = (
            checkpoint.read(tmp_path / which / "checkpoints" / f"toy-{step}", group)
            for which in ("False", "True")
            for group in ("model",)
        )
        assert all(one[name].equal(two[name]) for name in one)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, accelerator: Accelerator) -> None:
    train_stage(toy(tmp_path), accelerator)
    stage = toy(tmp_path)
    stage.objective.frozen = nn.Linear(4, 5)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"model/frozen\.\w+ in .*toy-6 has shape"):
        train_stage(stage, accelerator)
    stage.objective.extra = nn.Linear(1, 1)  # type: ignore[attr-defined]
    stage.objective.frozen = nn.Linear(4, 4)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"toy-6 lacks tensor model/extra\.bias"):
        train_stage(stage, accelerator)


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with written_whole(tmp_path / "a") as folder:
        (folder / "x").write_text("old")

    def fail() -> None:
        with written_whole(tmp_path / "a") as folder:
            (folder / "x").write_text("new")
            raise KilledError

    with pytest.raises(KilledError):
        fail()
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a" / "x").read_text() == "old"


def test_nothing_is_pickled(tmp_path: Path, accelerator: Accelerator) -> None:
    train_stage(toy(tmp_path), accelerator)
    endings = {p.suffix for p in tmp_path.rglob("*") if p.is_file()}
    assert endings == {".safetensors", ".json", ".jsonl"}


class Tied(nn.Module):
    def __init__(self, width: int = 3):
        super().__init__()
        self.a = nn.Linear(width, width)
        self.b = self.a
        self.register_buffer("shift", torch.zeros(width))


def test_weights_round_trip_with_tied_tensors(tmp_path: Path) -> None:
    one, two = Tied(), Tied()
    save_weights(one, tmp_path)
    load_weights(two, tmp_path)
    assert sorted(named_tensors(one)) == ["a.bias", "a.weight", "shift"]
    assert all(named_tensors(two)[n].equal(t) for n, t in named_tensors(one).items())


def test_large_weights_are_sharded(tmp_path: Path) -> None:
    one, two = Tied(), Tied()
    save_tensors(named_tensors(one), tmp_path, max_shard_size=30)
    load_weights(two, tmp_path)
    assert len(json.loads((tmp_path / "model.safetensors.index.json").read_text())) == 2
    assert two.a.weight.equal(one.a.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a.weight": torch.zeros(2, 2)}, r"a\.weight in .* has shape \[2, 2\], .* \[3, 3\]"),
        ({"a.weight": None}, r"lacks tensor a\.weight"),
        ({"c": torch.zeros(1)}, "has tensor c, unknown here"),
    ],
)
def test_weights_of_another_model_are_refused(
    tmp_path: Path, change: dict[str, Tensor | None], message: str
) -> None:
    tensors = {**named_tensors(Tied()), **change}
    found = {n: t.clone() for n, t in tensors.items() if t is not None}
    save_file(found, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message) as caught:
        load_weights(Tied(), tmp_path)
    assert "\n" not in str(caught.value)
    assert "model.safetensors" in str(caught.value)


def test_an_earlier_failure_in_the_background_is_not_the_last_ones(
    tmp_path: Path, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    seal = checkpoint.seal

    def sealing(partial: Path, path: Path, stage: str, progress: Mapping[str, Any]) -> None:
        if progress["step"] == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        seal(partial, path, stage, progress)

    monkeypatch.setattr(checkpoint, "seal", sealing)
    settings = training_config(save_every=2, background_checkpoints=True)
    assert train_stage(toy(tmp_path, None, settings), accelerator).step == 6
    assert list(checkpoint.steps(tmp_path / "checkpoints", "toy")) == [2, 6]


@pytest.mark.parametrize("background", [False, True])
def test_sigterm_saves_and_stops(
    tmp_path: Path, accelerator: Accelerator, background: bool
) -> None:
    settings = training_config(save_every=100, background_checkpoints=background)
    train_stage(toy(tmp_path / "straight", None, settings), accelerator)
    stage = toy(tmp_path / "stopped", None, settings)
    forward, calls = stage.objective.forward, iter(range(100))

    def asked(batch: object) -> dict[str, Tensor]:
        if next(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(batch)

    stage.objective.forward = asked  # type: ignore[method-assign]
    with pytest.raises(StoppedError, match=r"stopped at step [34] of toy, .* same command"):
        train_stage(stage, accelerator)
    assert len(checkpoint.steps(tmp_path / "stopped" / "checkpoints", "toy")) == 1
    train_stage(toy(tmp_path / "stopped", None, settings), accelerator)
    one, two = everything(tmp_path / "straight"), everything(tmp_path / "stopped")
    assert all(one[name].equal(two[name]) for name in one)
