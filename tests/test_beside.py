"""Our networks beside others: every pair runs and is matched. No times are compared here."""

from __future__ import annotations

import json

import pytest
import scripts
import torch

beside = scripts.load("beside")

SMALL = beside.Size(
    width=64, heads=2, depth=4, rows=1, side=8, caption=16, text=32, vocabulary=64,
    levels=(8, 8), pixels=16,
)  # fmt: skip
PAIRS = list(beside.PAIRS)


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_does_as_much_per_position_in_its_layers(name: str):
    row = beside.measure(name, SMALL, "fp32", repeats=1)
    assert row["layer_flops_per_position_ratio"] == pytest.approx(1, abs=0.15)
    assert row["ours"]["flops"] > row["ours"]["layer_flops"] > 0


@pytest.mark.parametrize("name", ["sd3", "flux", "image_vae", "text_vae"])
def test_with_equal_positions_a_pair_does_as_much_in_all(name: str):
    row = beside.measure(name, SMALL, "fp32", repeats=1)
    assert row["ours"]["positions"] == row["theirs"]["positions"]
    assert row["flop_ratio"] == pytest.approx(1, abs=0.15)


def test_a_text_has_two_positions_for_each_token_of_a_language_model():
    ours, theirs = beside.text(SMALL)
    last = SMALL.rows * min(beside.BLOCK, SMALL.text)  # clean, and seen by no loss
    assert ours.positions == 2 * theirs.positions - last


@pytest.mark.parametrize("name", PAIRS)
def test_a_step_leaves_gradients_in_almost_all_weights(name: str):
    for contender in beside.PAIRS[name](SMALL):
        contender.step("bf16")
        weights = list(contender.module.parameters())
        reached = sum(p.numel() for p in weights if p.grad is not None and p.grad.any())
        assert reached > 0.95 * sum(p.numel() for p in weights)


def test_the_gates_of_a_prior_are_open():
    torch.manual_seed(0)
    assert all(parameter.any() for parameter in beside.new_prior(SMALL, 2).parameters())


def test_what_is_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(beside.SIZES, "small", SMALL)
    threads = str(torch.get_num_threads())
    options = ["beside", "--only", "flux", "--repeats", "1", "--threads", threads]
    monkeypatch.setattr("sys.argv", [*options, "--json"])
    beside.main()
    (row,) = json.loads(capsys.readouterr().out)
    assert set(row) == {
        "pair", "dtype", "threads", "load", "ours", "theirs", "time_ratio", "median_time_ratio",
        "cpu_time_ratio", "flop_ratio", "layer_flops_per_position_ratio",
    }  # fmt: skip
    assert set(row["ours"]) == set(row["theirs"]) == {
        "name", "parameters", "positions", "flops", "layer_flops", "seconds", "median_seconds",
        "cpu_seconds",
    }  # fmt: skip
    monkeypatch.setattr("sys.argv", options)
    beside.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert len({line.count("|") for line in lines}) == 1


def test_no_repeats_are_refused(capsys: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.setattr("sys.argv", ["beside", "--repeats", "0"])
    with pytest.raises(SystemExit):
        beside.main()
    assert "at least 1 is needed, 0 was given" in capsys.readouterr().err
