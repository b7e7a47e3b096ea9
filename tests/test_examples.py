"""The examples do what they say."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import tiny
import yaml

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_loop_of_ones_own_learns(tmp_path: Path) -> None:
    shard = tiny.write_shard(tmp_path / "s.tar", tiny.squares())
    file = tmp_path / "tiny.yaml"
    stages = [tiny.joint(batch_size=24, optimizer={"lr": 1e-2})]
    file.write_text(yaml.safe_dump(tiny.tree(tmp_path, shard, stages=stages)))
    found = list(load("train_loop").losses(str(file), [], 60))
    assert sum(found[-10:]) < 0.93 * sum(found[:10])


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of its cells, one after the other, on a model that has learned nothing."""
    tiny.pipeline().save_pretrained(tmp_path / "model")
    monkeypatch.setenv("UNIFIED_CHECKPOINT", str(tmp_path / "model"))
    notebook = json.loads((EXAMPLES / "first_steps.ipynb").read_text("utf-8"))
    shared: dict[str, object] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            exec(compile("".join(cell["source"]), cell["id"], "exec"), shared)
    assert shared["image"] is not None


def test_generation_by_definition_is_what_the_pipeline_gives() -> None:
    pipeline = tiny.pipeline()
    for module in pipeline.modules.values():
        tiny.randomise(module)
    slow = load("generate").generate(pipeline, "a big red square", seed=7)
    (fast,) = pipeline.text_to_image(["a big red square"], seed=[7])
    assert np.abs(np.asarray(slow, int) - np.asarray(fast, int)).max() <= 1
    (other,) = pipeline.text_to_image(["a small blue square"], seed=[7])
    assert np.abs(np.asarray(other, int) - np.asarray(fast, int)).max() > 1
