"""The emoji evaluation runs on any small model, and its report is whole in each of three files."""

from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from unified.config.schema import Config
from unified.demos import emoji_evaluation
from unified.demos.emoji import SIDE
from unified.demos.emoji_evaluation import Evaluation, evaluate_emoji
from unified.demos.emoji_report import write_report
from unified.demos.linear import ImagePCA, mean_psnr, thumbnail
from unified.demos.quickstart import main
from unified.demos.report import charts
from unified.pipeline import UnifiedPipeline

TEXT = {
    "type": "text", "vocab_size": 300, "dim": 16, "ffn_dim": 32, "num_heads": 2,
    "encoder_num_blocks": 1, "decoder_num_blocks": 1, "latent_dim": 4,
}  # fmt: skip
NETWORK = {"block_out_channels": [8, 8, 8], "norm_groups": 4, "pixel_patch": 4, "attention": False}
SCRIPT = '<script>"nothing" runs & nothing breaks</script>'


def shard(path: Path, examples: list[dict[str, bytes]]) -> str:
    with tarfile.open(path, "w") as tar:
        for i, members in enumerate(examples):
            for ending, data in members.items():
                member = tarfile.TarInfo(f"{i:06d}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return str(path)


def made_up(i: int) -> dict[str, bytes]:
    """One emoji: a colour as name, a side and a hue by style."""
    style, side = ("3D", 128) if i % 2 else ("flat", 64)
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (10 * i % 256, 200, 30)).save(buffer, "PNG")
    told = {"name": f"colour {i // 2}", "style": style}
    caption = f"a {style} emoji of {told['name']}"
    return {"png": buffer.getvalue(), "txt": caption.encode(), "json": json.dumps(told).encode()}


def config(folder: Path) -> Config:
    emoji = shard(folder / "emoji.tar", [made_up(i) for i in range(16)])
    prose = shard(folder / "prose.tar", [{"txt": b"it was a dark night " * 3}] * 8)
    task = {"source": "emoji", "block": 4}
    sources = {"emoji": {"splits": {"other": [emoji]}}, "prose": {}}
    shards = {"emoji": [emoji], "prose": [prose]}
    tree: dict[str, Any] = {
        "modalities": {
            "text": TEXT,
            "image": {"type": "image", "max_size": 64, "channels": 8, "network": NETWORK},
        },
        "prior": {"width": 16, "heads": 2, "head_dim": 8, "rope_dim": 6, "single_stream_depth": 1},
        "tasks": {
            "continuation": {"type": "continuation", "source": "prose", "block": 4},
            "captioning": {"type": "captioning", **task},
            "text_to_image": {"type": "text_to_image", **task},
        },
        "data": {
            "sources": {n: {"train": shards[n], "val": shards[n], **s} for n, s in sources.items()}
        },
        "generation": {"num_steps": 1, "max_new_tokens": 8},
    }
    return Config.model_validate(tree)


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    torch.manual_seed(0)
    chosen = config(tmp_path_factory.mktemp("shards"))
    pipeline = UnifiedPipeline.build(chosen, {"text": ["a 3D emoji of colour 1", "a dark night"]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emoji_evaluation, "COMPONENTS", (2, 4))
        patch.setattr(emoji_evaluation, "CANDIDATES", 4)
        return evaluate_emoji(pipeline, chosen, splits=("val", "other", "train"), count=6)


def leaves(tree: Any) -> list[Any]:
    return [x for v in tree.values() for x in leaves(v)] if isinstance(tree, dict) else [tree]


def test_every_score_is_a_plain_number(evaluation: Evaluation):
    assert all(isinstance(x, int | float) for x in leaves(evaluation.scores))
    assert json.loads(json.dumps(evaluation.scores)) == evaluation.scores


def test_an_untrained_model_predicts_no_velocity_and_ignores_its_condition(evaluation: Evaluation):
    for found in evaluation.scores["flow loss"].values():
        assert found["now"] == found["start"]
    for tasks in evaluation.scores["permuted pairs"].values():
        for ways in tasks.values():
            assert all(way["low"] <= 0 <= way["high"] for way in ways.values())


def test_what_is_generated_is_shown(evaluation: Evaluation):
    assert set(evaluation.gallery.painted) == {"val", "other", "train"}
    for pairs in evaluation.gallery.painted.values():
        assert {image.size for _, image in pairs} == {(SIDE, SIDE)}
        assert len(pairs) == 6
    assert len(evaluation.gallery.continued) == emoji_evaluation.PROMPTS


def test_the_report_is_whole_in_each_file(evaluation: Evaluation, tmp_path: Path):
    evaluation.gallery.continued[0] = (SCRIPT, "costs $5 and $6_^")
    lines = [
        {"stage": "joint", "step": 1, "loss": 2.0, "loss/flow/text": 1.0},
        {"stage": "joint", "step": 1, "val/flow/text": 1.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    report = write_report(evaluation, tmp_path, "about")
    assert json.loads((tmp_path / "evaluation.json").read_text()) == evaluation.scores
    page = (tmp_path / "report.html").read_text()
    assert SCRIPT not in page
    assert "&lt;script&gt;" in page
    assert set(re.findall(r'src="(.{10})', page)) == {"data:image"}
    assert "http" not in page
    for rows in report.table.values():
        for row in rows:
            assert row.name in page
            assert row.value in page
            assert row.name in report.text()
    with Image.open(tmp_path / "report.png") as picture:
        assert picture.height > picture.width > 1000


def test_charts_show_the_flow_terms_or_the_total(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"stage": "vae", "step": 1, "loss": 2.0, "loss/kl": 1.0, "lr": 0.1},
        {"stage": "joint", "step": 1, "loss": 2.0, "loss/flow/text": 1.0},
        {"stage": "joint", "step": 2, "loss": 2.0, "loss/flow/text": 0.5},
        {"stage": "joint", "step": 2, "val/flow/text": 1.5, "val/loss": 1.0},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    vae, joint = charts(path)
    assert [(c.name, c.values) for c in vae.curves] == [("loss", [2.0])]
    assert [c.name for c in joint.curves] == ["flow/text", "flow/text, held out"]
    assert joint.curves[0].steps == [1, 2]
    assert charts(tmp_path / "none") == []


def test_simple_codes_of_images():
    rng = torch.Generator().manual_seed(0)
    smooth = [
        Image.new("RGB", (64, 64), tuple(torch.randint(255, (3,), generator=rng).tolist()))
        for _ in range(8)
    ]
    assert mean_psnr(smooth, [thumbnail(image, 4) for image in smooth]) > 45
    pca = ImagePCA(smooth, 4)
    assert mean_psnr(smooth, pca.reconstruct(smooth, 4)) > 45  # colours have three dimensions
    assert mean_psnr(smooth, pca.reconstruct(smooth, 1)) < 40
    large = smooth[0].resize((128, 128))
    assert pca.reconstruct([large], 4)[0].size == (128, 128)


def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        main(["quickstart.yaml", "run.dirr=x"])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
