"""The examples do what they say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
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


def test_generation_by_definition_is_what_the_pipeline_gives() -> None:
    pipeline = tiny.pipeline()
    for module in pipeline.modules.values():
        tiny.randomise(module)
    slow = load("generate").generate(pipeline, "a big red square", seed=7)
    (fast,) = pipeline.text_to_image(["a big red square"], seed=[7])
    assert np.abs(np.asarray(slow, int) - np.asarray(fast, int)).max() <= 1
    (other,) = pipeline.text_to_image(["a small blue square"], seed=[7])
    assert np.abs(np.asarray(other, int) - np.asarray(fast, int)).max() > 1
