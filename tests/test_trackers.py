"""What trackers are given besides the numbers, and what is said of one that is not there."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
from PIL import Image

from unified.training.metrics import Metrics, tracker_names
from unified.training.run import train

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def test_tensorboard_shows_the_samples_that_are_written(tmp_path: Path) -> None:
    shard = tiny.write_shard(tmp_path / "s.tar", tiny.squares())
    training = {**tiny.tree()["training"], "sample_every": 2, "trackers": ["tensorboard"]}
    told = tiny.config(
        tmp_path / "run",
        shard,
        training={**training, "validation_examples": 2},
        stages=[tiny.autoencoder("image"), tiny.joint()],
        data={"sources": {"s": {"train": [shard], "val": [shard]}}},
    )
    train(told)
    found = accumulator.EventAccumulator(str(tmp_path / "run" / "trackers" / "unified")).Reload()
    tags = found.Tags()
    named = {"image_vae/s-0", "image_vae/s-1", "joint/text_to_image-0", "joint/text_to_image-1"}
    named |= {"image_vae/s-sheet"}
    assert set(tags["images"]) == named
    texts = {f"joint/{t}-{i}/text_summary" for t in ("captioning", "continuation") for i in (0, 1)}
    assert texts <= set(tags["tensors"])
    (image,) = found.Images("joint/text_to_image-0")
    assert (image.step, image.width, image.height) == (4, tiny.SIDE, tiny.SIDE)
    (text,) = found.Tensors("joint/captioning-0/text_summary")
    written = (tmp_path / "run" / "samples" / "joint-2" / "captioning-0.txt").read_text()
    assert text.tensor_proto.string_val[0].decode() == written.removesuffix("\n")


class Tracker:
    """Records the images it is given."""

    def __init__(self, name: str):
        self.name, self.seen = name, {}

    def log_images(self, values: dict[str, Any], step: int, **options: Any) -> None:
        self.seen = {"values": values, "step": step, **options}


def test_each_tracker_gets_what_it_can_show(tmp_path: Path) -> None:
    trackers = [Tracker("tensorboard"), Tracker("wandb"), SimpleNamespace(name="trackio")]
    logged: dict[str, Any] = {}
    accelerator = SimpleNamespace(
        is_main_process=True,
        trackers=trackers,
        log=lambda values, step: logged.update(values, step=step),
    )
    metrics = Metrics(tmp_path / "metrics.jsonl", "joint", 3, accelerator, first=10)
    picture = Image.new("L", (3, 2), 7)
    metrics.write_samples(2, {"a-0": "text", "b-0": picture, "c-0": np.zeros(3)})
    assert logged == {"joint/a-0": "text", "step": 12}
    tensorboard, wandb = trackers[0].seen, trackers[1].seen
    assert (tensorboard["dataformats"], tensorboard["step"]) == ("NHWC", 12)
    assert wandb.keys() == {"values", "step"}
    (image,) = wandb["values"]["joint/b-0"]
    assert image.shape == (2, 3, 3)
    assert (image == 7).all()


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_that_an_extra_brings_names_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    with pytest.raises(
        ValueError, match=rf"not installed: pip install 'unified-latents\[{name}\]'"
    ):
        tracker_names([name])
