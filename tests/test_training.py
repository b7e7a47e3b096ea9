"""The engine: one loss however a batch is split, who learns when, and what is reported."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from toy_stage import (
    ToyObjective,
    interval_stage,
    lines,
    on_the_cpu,
    stage_config,
    toy,
    training_config,
)

from unified.config.schema import EMAConfig, IntervalConfig, OptimizerConfig
from unified.training import checkpoint
from unified.training import divergence as trend
from unified.training.ema import EMA
from unified.training.loop import DivergedError, Loop, Stage, train_stage
from unified.training.metrics import tracker_names
from unified.training.optim import build_optimizer, learning_rate, vae_learns


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    yield on_the_cpu()
    AcceleratorState._reset_state(reset_partial_state=True)


def raw_weights(folder: Path, stage: str = "toy") -> dict[str, Tensor]:
    """The raw weights at the end of a stage."""
    path = checkpoint.newest(folder / "checkpoints", stage)
    assert path is not None
    return checkpoint.read(path, "model")


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in lines(folder) if "loss" in line]


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_changes_nothing(
    tmp_path: Path, accelerator: Accelerator, accumulate: int
) -> None:
    for a in (1, accumulate):
        train_stage(toy(tmp_path / str(a), stage_config(accumulate=a)), accelerator)
    one, many = tmp_path / "1", tmp_path / str(accumulate)
    assert losses(one) == pytest.approx(losses(many), rel=1e-5)
    for name, tensor in raw_weights(one).items():
        torch.testing.assert_close(raw_weights(many)[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_two_processes_change_nothing(tmp_path: Path, accelerator: Accelerator) -> None:
    train_stage(toy(tmp_path / "1", interval_stage()), accelerator)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script = str(Path(__file__).parent / "toy_stage.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, *command, script, str(tmp_path / "2"), "2"], check=True, env=environment
    )
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "2"), rel=1e-5)
    for name, tensor in raw_weights(tmp_path / "1").items():
        torch.testing.assert_close(raw_weights(tmp_path / "2")[name], tensor, rtol=1e-4, atol=1e-6)


def test_the_loss_is_the_weighted_sum_of_averages_per_position(
    tmp_path: Path, accelerator: Accelerator
) -> None:
    train_stage(toy(tmp_path), accelerator)
    for line in lines(tmp_path):
        assert line["loss"] == pytest.approx(line["loss/fit"] + 0.1 * line["loss/size"])
        assert {"stage", "step", "lr", "grad_norm", "examples_per_s", "seconds"} <= line.keys()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_batch_that_does_not_divide_is_refused(tmp_path: Path, accelerator: Accelerator) -> None:
    stage = toy(tmp_path, stage_config(batch_size=9, accumulate=3))
    stage.config.accumulate = 2
    with pytest.raises(ValueError, match="batch_size 9 must be a multiple of 1 processes times"):
        train_stage(stage, accelerator)


@pytest.mark.usefixtures("accelerator")
def test_bf16_trains_and_keeps_float32_weights(tmp_path: Path) -> None:
    stage = toy(tmp_path, stage_config(steps=60))
    train_stage(stage, on_the_cpu(mixed_precision="bf16"))
    assert {t.dtype for t in raw_weights(tmp_path).values()} == {torch.float32}
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]


def test_max_steps_caps_a_stage(tmp_path: Path, accelerator: Accelerator) -> None:
    assert train_stage(toy(tmp_path, None, training_config(max_steps=2)), accelerator).step == 2
    none = toy(tmp_path / "none", None, training_config(max_steps=0))
    assert train_stage(none, accelerator).step == 0


# ---- who learns --------------------------------------------------------------------------------


def test_learning_rate_warms_up_and_follows_a_cosine() -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=4, final_lr_ratio=0.1)
    rates = [learning_rate(step, 104, config) for step in range(105)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[54] == pytest.approx(0.55)
    assert rates[104] == pytest.approx(0.1)
    assert learning_rate(0, 10, OptimizerConfig(lr=1.0, warmup_steps=0)) == 1.0


def test_groups_have_their_rates_and_only_matrices_decay() -> None:
    config = OptimizerConfig(lr=1.0, vae_lr_ratio=0.5, weight_decay=0.3)
    optimizer = build_optimizer(ToyObjective().groups(), config)
    found = {(g["ratio"], g["weight_decay"], len(g["params"])) for g in optimizer.param_groups}
    assert found == {(1.0, 0.3, 1), (1.0, 0.0, 1), (0.5, 0.3, 1), (0.5, 0.0, 1)}


def test_what_is_in_no_group_or_has_rate_zero_does_not_move(
    tmp_path: Path, accelerator: Accelerator
) -> None:
    train_stage(toy(tmp_path, stage_config(optimizer={"lr": 0.1, "vae_lr_ratio": 0})), accelerator)
    start = ToyObjective().state_dict()
    moved = {n.split(".")[0] for n, t in raw_weights(tmp_path).items() if not t.equal(start[n])}
    assert moved == {"main"}


def test_in_interval_mode_the_vae_rests_without_gradient_decay_or_drift(
    tmp_path: Path, accelerator: Accelerator
) -> None:
    interval = IntervalConfig(train=2, freeze=3)
    assert [vae_learns(s, interval) for s in range(7)] == [True, True, *[False] * 3, True, True]
    stage = toy(tmp_path, stage_config(interval=interval, steps=6), prefetch=0)
    loop = Loop(stage, accelerator)
    vae, ema = stage.objective.encoder, loop.trained.ema
    history = []
    for step in range(6):
        loop.step(step, loop.prepare(step))
        history.append([vae.weight.detach().clone(), ema.shadow["encoder.weight"].clone()])
    for before, after in pairwise(history[1:5]):
        assert before[0].equal(after[0])
        assert before[1].equal(after[1])
    assert not history[0][0].equal(history[1][0])
    assert not history[4][0].equal(history[5][0])


def test_ema_follows_its_rule_and_swaps_back_exactly() -> None:
    parameter = torch.nn.Parameter(torch.tensor([1.0]))
    ema = EMA({"p": parameter}, EMAConfig(decay=0.9, warmup=10))
    with torch.no_grad():
        parameter.fill_(2.0)
    ema.update(0)
    assert ema.shadow["p"].item() == pytest.approx(0.1 * 1 + 0.9 * 2)
    assert ema.decay(1000) == 0.9
    with ema.applied():
        assert parameter.item() == pytest.approx(1.9)
    assert parameter.item() == 2.0


# ---- hooks, reports and accidents --------------------------------------------------------------


def test_validation_and_samples_use_the_averages(tmp_path: Path, accelerator: Accelerator) -> None:
    stage = toy(tmp_path, None, training_config(sample_every=4))
    seen: list[Tensor] = []

    def validate(step: int) -> dict[str, float]:
        seen.append(stage.objective.main.weight.detach().clone())
        assert not torch.is_grad_enabled()
        return {"loss": float(step)}

    def sample(step: int, folder: Path) -> dict[str, str]:
        (folder / "a.txt").write_text(str(step))
        return {"a": str(step)}

    stage.validate, stage.sample = validate, sample
    train_stage(stage, accelerator)
    assert stage.objective.main.weight.equal(seen[-1])
    assert not raw_weights(tmp_path)["main.weight"].equal(seen[-1])
    values = [(line["step"], line["val/loss"]) for line in lines(tmp_path) if "val/loss" in line]
    assert values == [(3, 3.0), (6, 6.0)]
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["toy-4", "toy-6"]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, accelerator: Accelerator) -> None:
    stage = toy(tmp_path, objective={"diverge_at": 4})
    with pytest.raises(DivergedError, match=r"stage toy, step 5: fit is nan; .* is .*toy-3"):
        train_stage(stage, accelerator)
    assert all(tensor.isfinite().all() for tensor in raw_weights(tmp_path).values())


@pytest.mark.parametrize("at", range(6))
@pytest.mark.parametrize(
    "due",
    [
        {"save_every": 1, "log_every": 50},
        {"validate_every": 1, "save_every": 50, "log_every": 50},
        {"sample_every": 1, "save_every": 50, "log_every": 50},
        {"validate_every": 2, "sample_every": 3, "save_every": 4, "log_every": 50},
    ],
    ids=["saved", "validated", "sampled", "in turn"],
)
def test_nothing_comes_of_a_step_that_is_not_finite(
    tmp_path: Path, accelerator: Accelerator, at: int, due: dict[str, Any]
) -> None:
    """It is met one step late at most, and no checkpoint, validation or sample follows it."""
    settings = training_config(keep_checkpoints=9, **{"validate_every": 50, **due})
    stage = toy(tmp_path, None, settings, objective={"diverge_at": at})
    seen: list[int] = []

    def validate(step: int) -> dict[str, float]:
        seen.append(step)
        return {"loss": -float(step)}  # always the best, which is saved

    def sample(step: int, folder: Path) -> dict[str, str]:
        seen.append(step)
        return {}

    stage.validate, stage.sample = validate, sample
    with pytest.raises(DivergedError, match=rf"stage toy, step {at + 1}: fit is nan"):
        train_stage(stage, accelerator)
    saved = checkpoint.steps(tmp_path / "checkpoints", "toy")
    assert max([*seen, *saved, 0]) <= at
    assert max((int(line["step"]) for line in written(tmp_path)), default=0) <= at
    for path in saved.values():
        assert all(tensor.isfinite().all() for tensor in checkpoint.read(path, "model").values())
    if due.get("save_every") == 1:
        assert list(saved) == list(range(1, at + 1))


def written(folder: Path) -> list[dict[str, Any]]:
    return lines(folder) if (folder / "metrics.jsonl").is_file() else []


def test_the_host_looks_at_a_loss_one_step_late(
    tmp_path: Path, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing is due, a step begins before the numbers of the one before are looked at; where
    something is, none is left to look at."""
    settings = training_config(save_every=50, log_every=3, validate_every=50)
    step, between = Loop.step, Loop.between
    waiting: list[tuple[str, int]] = []

    def stepping(loop: Loop, number: int, work: Any) -> Any:
        waiting.append(("step", len(loop.coming)))
        return step(loop, number, work)

    def due(loop: Loop, values: Any) -> None:
        waiting.append(("between", len(loop.coming)))
        between(loop, values)

    monkeypatch.setattr(Loop, "step", stepping)
    monkeypatch.setattr(Loop, "between", due)
    train_stage(toy(tmp_path, stage_config(steps=7), settings), accelerator)
    assert [n for what, n in waiting if what == "step"] == [0, 1, 1, 0, 1, 1, 0]
    assert [n for what, n in waiting if what == "between"] == [1, 1, 0, 1, 1, 0, 0]


def test_an_unweighted_term_is_named(tmp_path: Path, accelerator: Accelerator) -> None:
    stage = toy(tmp_path)
    stage.objective.weights = lambda step: {"fit": 1.0}  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="loss term size has no weight"):
        train_stage(stage, accelerator)


def test_a_tracker_that_is_not_there_is_named() -> None:
    assert tracker_names(["tensorboard"]) == ["tensorboard"]
    with pytest.raises(ValueError, match="asks for tensorbored, which is not installed"):
        tracker_names(["tensorbored"])


def test_a_loss_that_grows_without_end_stops_the_run(
    tmp_path: Path, accelerator: Accelerator
) -> None:
    def growing(folder: str, divergence: float | None) -> Stage:
        settings = training_config(divergence=divergence, save_every=50)
        stage = toy(tmp_path / folder, stage_config(steps=220), settings)
        forward, calls = stage.objective.forward, iter(range(1000))

        def grows(batch: Any) -> dict[str, Tensor]:
            rise = 1.05 ** next(calls)
            return {term: rise * value for term, value in forward(batch).items()}

        stage.objective.forward = grows  # type: ignore[method-assign]
        return stage

    with pytest.raises(DivergedError, match=r"grown to .* more than training.divergence 2;"):
        train_stage(growing("watched", 2.0), accelerator)
    assert train_stage(growing("free", None), accelerator).step == 220


def test_what_joins_late_or_rises_by_design_is_no_growth() -> None:
    found: dict[str, dict[str, float]] = {}
    for step in range(400):
        late = {"critic": 5.0} if step > 200 else {}
        losses = {"fit": 0.1, "kl": 1.0 + step, "entropy": -3.0, **late}
        weights = {"fit": 1.0, "kl": 1e-6 * step, "entropy": 0.1, "critic": 1.0}
        trend.follow(found, step, losses, weights)
    assert trend.growth(found) == pytest.approx(0, abs=0.2)
    for step in range(400, 600):
        trend.follow(found, step, {"fit": 1.0, "kl": 1.0, "entropy": -3.0}, weights)
    assert trend.growth(found) > 2
