"""A whole run, stage by stage: the same command continues it, and ends in a pipeline folder."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from unified.config.schema import Config
from unified.latents.weights import named_tensors
from unified.pipeline import UnifiedPipeline
from unified.training import loop
from unified.training.init import initialise
from unified.training.run import train

TEXT = {
    "type": "text",
    "vocab_size": 300,
    "dim": 16,
    "ffn_dim": 32,
    "num_heads": 2,
    "encoder_num_blocks": 1,
    "decoder_num_blocks": 1,
    "latent_dim": 4,
}


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("shards") / "train.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(24):
            data = f"number {i} is a number like {i * 7 % 11}".encode()
            member = tarfile.TarInfo(f"{i:06d}.txt")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return str(path)


def config(folder: Path, shard: str, **changes: Any) -> Config:
    stages = [
        {"name": "vae", "objective": "autoencoder", "modality": "text", "sources": {"s": 1.0}},
        {"name": "joint", "objective": "joint", "optimizer": {"vae_lr_ratio": 0.5}},
    ]
    tree = {
        "run": {"dir": str(folder)},
        "modalities": {"text": TEXT},
        "prior": {"width": 16, "heads": 2, "head_dim": 8, "rope_dim": 6, "single_stream_depth": 1},
        "tasks": {"continuation": {"type": "continuation", "source": "s", "block": 4}},
        "data": {"sources": {"s": {"train": [shard], "val": [shard]}}},
        "stages": [{"steps": 4, "batch_size": 4, **stage} for stage in stages],
        "training": {
            "precision": "fp32",
            "save_every": 2,
            "log_every": 1,
            "validate_every": 2,
            "validation_examples": 4,
            "trackers": [],
        },
        **changes,
    }
    return Config.model_validate(tree)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, shard: str) -> Path:
    folder = tmp_path_factory.mktemp("run") / "straight"
    train(config(folder, shard))
    return folder


def lines(folder: Path) -> list[dict[str, Any]]:
    timing = {"seconds", "examples_per_s", "positions_per_s", "data_wait", "memory_gb"}
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in timing} for line in found]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    modules = UnifiedPipeline.from_pretrained(folder).modules
    return {f"{p}.{n}": t for p, m in modules.items() for n, t in named_tensors(m).items()}


def same(one: Path, two: Path) -> bool:
    a, b = weights(one / "final"), weights(two / "final")
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


@pytest.mark.parametrize("died_at", [("vae", 3), ("joint", 0), ("joint", 2)])
def test_the_same_command_continues_a_killed_run(
    tmp_path: Path,
    shard: str,
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
    died_at: tuple[str, int],
) -> None:
    step = loop.Loop.step

    def dying(self: loop.Loop, at: int, work: Any) -> dict[str, float]:
        if (self.stage.config.name, at) == died_at:
            raise KeyboardInterrupt
        return step(self, at, work)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "step", dying)
        with pytest.raises(KeyboardInterrupt):
            train(config(tmp_path, shard))
    train(config(tmp_path, shard))
    assert lines(tmp_path) == lines(finished)
    assert same(tmp_path, finished)


def test_only_the_last_stage_can_be_made_longer(tmp_path: Path, shard: str) -> None:
    settings = config(tmp_path, shard)
    settings.stages[1].steps = 2
    train(settings)
    settings.stages[1].steps = 4
    train(settings)
    joint = [line["step"] for line in lines(tmp_path) if line["stage"] == "joint"]
    assert joint == [1, 2, 2, 3, 4, 4]
    settings.stages[0].steps = 9
    with pytest.raises(ValueError, match="vae finished at step 4 and cannot be made longer"):
        train(settings)


def test_a_finished_run_says_so_and_does_nothing(
    finished: Path, shard: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    assert train(config(finished, shard)) == finished / "final"
    assert "is finished" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*")} == before


def test_another_configuration_is_refused(finished: Path, shard: str) -> None:
    other = config(finished, shard, prior={"width": 32}, flow={"clean_prefix_rate": 0.5})
    with pytest.raises(ValueError, match=r"prior\.width \(16 then, 32 now\), .* and more"):
        train(other)
    changed = config(finished, shard)
    changed.training.log_every, changed.generation.num_steps = 7, 3
    train(changed)


def test_samples_are_written(tmp_path: Path, shard: str) -> None:
    settings = config(tmp_path, shard)
    settings.training.sample_every, settings.training.max_steps = 2, 2
    train(settings)
    names = sorted(str(p.relative_to(tmp_path)) for p in (tmp_path / "samples").rglob("*-0.txt"))
    assert names == ["samples/joint-2/continuation-0.txt", "samples/vae-2/s-0.txt"]


# ---- pipeline folders --------------------------------------------------------------------------


def test_a_pipeline_round_trips(tmp_path: Path, finished: Path) -> None:
    pipeline = UnifiedPipeline.from_pretrained(finished / "final")
    assert pipeline.weights == "ema"
    pipeline.save_pretrained(tmp_path / "copy")
    one, two = weights(finished / "final"), weights(tmp_path / "copy")
    assert all(one[name].equal(two[name]) for name in one)
    text = (tmp_path / "copy" / "model_index.json").read_text()
    assert str(finished) not in text


def test_a_folder_of_something_else_is_not_replaced(tmp_path: Path, finished: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds other files and no pipeline"):
        UnifiedPipeline.from_pretrained(finished / "final").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="neither a pipeline folder"):
        UnifiedPipeline.from_pretrained(tmp_path)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_checkpoint_that_does_not_fit_is_one_line(tmp_path: Path, finished: Path) -> None:
    UnifiedPipeline.from_pretrained(finished / "final").save_pretrained(tmp_path / "m")
    edit(tmp_path / "m" / "prior" / "config.json", width=32)
    with pytest.raises(ValueError, match=r"shape .* needs") as caught:
        UnifiedPipeline.from_pretrained(tmp_path / "m")
    assert "\n" not in str(caught.value)
    assert "prior/model.safetensors" in str(caught.value)


def test_code_in_a_checkpoint_needs_trust(tmp_path: Path, finished: Path) -> None:
    UnifiedPipeline.from_pretrained(finished / "final").save_pretrained(tmp_path / "m")
    text = {**TEXT, "type": "unified.modalities.text.modality:TextModality"}
    edit(tmp_path / "m" / "model_index.json", modalities={"text": text})
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        UnifiedPipeline.from_pretrained(tmp_path / "m")
    assert UnifiedPipeline.from_pretrained(tmp_path / "m", trust_remote_code=True).modalities


def test_the_hub_holds_the_same_folder(
    tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    class Hub:
        def create_repo(self, repo_id: str, **options: Any) -> Any:
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, *, repo_id: str, folder_path: Path) -> str:
            shutil.copytree(folder_path, tmp_path / repo_id)
            return f"hub/{repo_id}"

    monkeypatch.chdir(tmp_path / "..")
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda n, **_: str(tmp_path / n))
    UnifiedPipeline.from_pretrained(finished / "final").push_to_hub("me/model")
    assert UnifiedPipeline.from_pretrained("me/model").weights == "ema"


# ---- init --------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [True, False])
def test_parts_of_another_model_are_loaded_and_reported(
    tmp_path: Path, shard: str, finished: Path, whole: bool
) -> None:
    final = finished / "final"
    parts = {p: str(final if whole else final / p) for p in ("text_vae", "prior")}
    settings = config(tmp_path / "run", shard, init=parts)
    settings.training.max_steps = 0
    train(settings)
    assert same(tmp_path / "run", finished)
    report = json.loads((tmp_path / "run" / "init_report.json").read_text())
    assert report["prior"]["new"] == report["prior"]["unused"] == []
    assert bool(report["text_vae"]["files"]) == whole


def test_new_and_unused_tensors_are_named_and_misshapen_ones_refused(
    tmp_path: Path, shard: str, finished: Path
) -> None:
    prior = {"width": 16, "heads": 2, "head_dim": 8, "rope_dim": 6}
    init = {"prior": str(finished / "final")}

    def pipeline(**changes: Any) -> UnifiedPipeline:
        return UnifiedPipeline.build(
            config(tmp_path, shard, prior={**prior, **changes}, init=init), {"text": ["a b c"]}
        )

    deeper = initialise(pipeline(single_stream_depth=2))["prior"]
    assert deeper.new
    assert all(name.startswith("blocks.1.") for name in deeper.new)
    assert initialise(pipeline(single_stream_depth=0))["prior"].unused
    with pytest.raises(ValueError, match=r"tensor \S+ in .*prior has shape"):
        initialise(pipeline(width=8))
