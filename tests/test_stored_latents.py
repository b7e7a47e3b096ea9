"""Stored latents: training from them is training from the items; others are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml

from unified.cli import app
from unified.config.loading import merge
from unified.config.schema import Config
from unified.data.shards import read_shards
from unified.data.stored import from_bytes, to_bytes
from unified.data.tools.encode import encode
from unified.latents.ragged import Posteriors
from unified.pipeline import UnifiedPipeline
from unified.training.run import train


def tree(folder: Path, shard: str, **joint: Any) -> dict[str, Any]:
    """A joint stage over all three tasks, and two autoencoder stages before it."""
    stages = [tiny.autoencoder("image"), tiny.joint(steps=4, row_length=96, **joint)]
    found: dict[str, Any] = tiny.tree(folder, shard, stages=stages)
    found["data"]["sources"]["s"]["val"] = [shard]
    found["training"]["sample_every"] = 4
    return found


def losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    found = [line for line in lines if line["stage"] == "joint"]
    return [line.get("loss", line.get("val/loss")) for line in found]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the items' shard, the autoencoders, and the latents they made."""
    root = tmp_path_factory.mktemp("stored")
    shard = tiny.write_shard(root / "s.tar", tiny.squares())
    settings = tree(root / "vae", shard)
    settings["training"]["max_steps"] = 2
    settings["stages"][1:] = []
    train(Config.model_validate(settings))
    pipeline = UnifiedPipeline.from_pretrained(root / "vae" / "final")
    encode(Config.model_validate(tree(root / "unused", shard)), pipeline, root / "latents")
    return root


@pytest.mark.parametrize("posterior", ["mean", "sample"])
def test_training_from_latents_is_training_from_items(
    stored: Path, tmp_path: Path, posterior: str
) -> None:
    items = tree(tmp_path / "items", str(stored / "s.tar"), posterior=posterior)
    items["stages"].pop(0)
    items["init"] = {f"{m}_vae": str(stored / "vae" / "final") for m in ("text", "image")}
    told = yaml.safe_load((stored / "latents" / "latents.yaml").read_text())
    latents = merge(items, told)
    latents["run"] = {"dir": str(tmp_path / "latents")}
    del latents["data"]["sources"]["s"]
    for settings in (items, latents):
        train(Config.model_validate(settings))
    assert losses(tmp_path / "latents") == pytest.approx(losses(tmp_path / "items"), rel=1e-4)
    assert len(losses(tmp_path / "items")) == 5
    assert (tmp_path / "latents" / "samples" / "joint-4" / "captioning-0.txt").is_file()


def test_the_latents_of_other_autoencoders_are_refused(stored: Path, tmp_path: Path) -> None:
    told = yaml.safe_load((stored / "latents" / "latents.yaml").read_text())
    settings = merge(tree(tmp_path / "run", str(stored / "s.tar")), told)
    settings["stages"].pop(0)
    del settings["init"]["image_vae"]
    with pytest.raises(ValueError, match=r"made by another image autoencoder .* init\.image_vae"):
        train(Config.model_validate(settings))


def test_autoencoders_that_train_need_items(stored: Path, tmp_path: Path) -> None:
    told = yaml.safe_load((stored / "latents" / "latents.yaml").read_text())
    settings = merge(tree(tmp_path / "run", str(stored / "s.tar")), told)
    settings["stages"].pop(0)
    settings["stages"][0]["optimizer"] = {"vae_lr_ratio": 0.5}
    with pytest.raises(ValueError, match=r"trains the \w+ autoencoder, which stored latents"):
        train(Config.model_validate(settings))
    with pytest.raises(ValueError, match=r"only those of frozen ones can be stored"):
        encode(Config.model_validate(settings), tiny.pipeline(), tmp_path / "out")


def test_shards_that_are_there_are_left_alone(stored: Path, tmp_path: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in (stored / "latents").glob("*.tar")}
    assert len(before) == 6
    pipeline = UnifiedPipeline.from_pretrained(stored / "vae" / "final")
    settings = Config.model_validate(tree(tmp_path, str(stored / "s.tar")))
    assert not encode(settings, pipeline, stored / "latents").examples
    assert {p: p.stat().st_mtime_ns for p in (stored / "latents").glob("*.tar")} == before
    (shard, *_) = before
    shard.unlink()
    assert list(encode(settings, pipeline, stored / "latents").examples.values()) == [6]


def test_parts_make_the_whole(stored: Path, tmp_path: Path) -> None:
    settings = Config.model_validate(tree(tmp_path, str(stored / "s.tar")))
    settings.data.sources["s"].train *= 3
    pipeline = UnifiedPipeline.from_pretrained(stored / "vae" / "final")
    for part in (1, 0):
        encode(settings, pipeline, tmp_path / "latents", part=(part, 2))
    names = sorted(p.name for p in (tmp_path / "latents").glob("captioning-train-*"))
    assert names == [f"captioning-train-0000{i}.tar" for i in range(3)]
    assert len(read_shards(str(tmp_path / "latents" / "captioning-train-{00000..00002}.tar"))) == 18


def test_a_member_round_trips_and_names_what_is_wrong() -> None:
    posterior = Posteriors(torch.randn(4, 3), torch.randn(4, 3), ((1, (2, 2)),))
    data = to_bytes({"C@1": posterior}, {"text": "ab"}, torch.float32)
    (back,) = from_bytes(data, {"text": "ab", "image": "cd"}).values()
    assert back.mean_NC.equal(posterior.mean_NC)
    assert back.logvar_NC.equal(posterior.logvar_NC)
    assert back.grid == (2, 2)
    with pytest.raises(ValueError, match=r"does not hold stored latents"):
        from_bytes(data[:-1], {"text": "ab"})
    with pytest.raises(ValueError, match=r"does not hold stored latents"):
        from_bytes(b"", {"text": "ab"})


def test_the_command_stores_and_tells(stored: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(tree(tmp_path / "run", str(stored / "s.tar"))))
    asked = ["data", "encode", str(file), str(tmp_path / "out"), "--dtype", "float16"]
    asked += ["--checkpoint", str(stored / "vae" / "final")]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    assert "captioning-train: 6 examples" in done.output
    half, full = (
        len(read_shards(str(next(folder.glob("captioning-train-*"))))[0].members["latents"])
        for folder in (tmp_path / "out", stored / "latents")
    )
    assert half < full
