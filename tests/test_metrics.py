"""Metrics of one's own: called with the pipeline that validation has, logged beside the loss."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny

from unified.config.plugins import resolve_plugins
from unified.config.schema import Config
from unified.training.run import train
from unified.training.validation import own

METRICS = """
import torch

def shape(pipeline, step):
    weight = next(pipeline.prior.parameters())
    grad = torch.is_grad_enabled() or pipeline.prior.training
    return {"parts": len(pipeline.modules), "at": step, "learning": grad, "weight": weight.sum()}

def words(pipeline, step):
    made = pipeline.continue_text(["a red square"], 4, seed=0, num_steps=2)
    return {"words": len(made)}

def loss(pipeline, step): return {"loss": 1.0}
def number(pipeline, step): return 3
def text(pipeline, step): return {"name": "three"}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "own_metrics.py").write_text(METRICS)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("own_metrics", None)


def config(folder: Path, held_out: bool, **training: Any) -> Config:
    shard = str(folder / "squares.tar")
    tiny.write_shard(folder / "squares.tar", tiny.squares())
    tree = tiny.tree(folder / "run", shard, stages=[tiny.joint(row_length=128)])
    tree["data"]["sources"]["s"]["val"] = [shard] if held_out else []
    metrics = ["own_metrics:shape", "own_metrics:words"]
    tree["training"] |= {"validate_every": 1, "metrics": metrics, **training}
    return Config.model_validate(tree)


@pytest.mark.parametrize("held_out", [True, False])
def test_values_are_logged_at_every_validation(folder: Path, held_out: bool) -> None:
    train(config(folder, held_out), trust_remote_code=True)
    lines = [json.loads(x) for x in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if "val/parts" in line]
    assert [(line["step"], line["val/at"]) for line in found] == [(1, 1.0), (2, 2.0)]
    assert all(line["val/parts"] == 3 and line["val/words"] == 1 for line in found)
    assert all(line["val/learning"] == 0 for line in found)
    assert all(("val/loss" in line) == held_out for line in found)
    assert found[0]["val/weight"] != found[1]["val/weight"]


def test_metrics_change_no_step_and_may_change_in_a_run(folder: Path) -> None:
    train(config(folder, True), trust_remote_code=True)
    with_them = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    again = config(folder, True, metrics=[], max_steps=2)
    again.run.dir = str(folder / "plain")
    train(again)
    without = (folder / "plain" / "metrics.jsonl").read_text().splitlines()
    losses = [[json.loads(x).get("loss") for x in part] for part in (with_them, without)]
    assert losses[0] == losses[1]
    again.run.dir = str(folder / "run")
    train(again)


def test_code_runs_with_trust_alone(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"metric 'own_metrics:shape' is a path to code.*trust"):
        train(config(folder, True))
    assert not (folder / "run").exists()
    with pytest.raises(ValueError, match=r"the metric 'own_metrics:shap'.* has no 'shap'"):
        resolve_plugins(config(folder, True, metrics=["own_metrics:shap"]), True)
    with pytest.raises(ValueError, match="metric 'shape' should be a path to code"):
        resolve_plugins(config(folder, True, metrics=["shape"]), True)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("loss", "returns loss, which validation already has"),
        ("number", "should return names and numbers, found 3"),
        ("text", "returns 'three' as name, which should be a number"),
    ],
)
def test_what_is_no_metric_is_said_in_a_sentence(folder: Path, name: str, says: str) -> None:
    told = config(folder, True, metrics=[f"own_metrics:{name}"])
    found = resolve_plugins(told, trust_remote_code=True).metrics
    with pytest.raises(ValueError, match=says):
        own(found, tiny.pipeline(), 1, {"loss": 0.0})
