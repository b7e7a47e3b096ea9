"""Editing: pairs of styles become shards, and a model learns from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image

from unified.data.examples import Example
from unified.data.shards import read_shards
from unified.data.streams import TaskStream
from unified.data.tools.check import check_config
from unified.data.tools.pack import write_shard
from unified.demos import styles_pairs
from unified.pipeline import UnifiedPipeline
from unified.randomness import generator
from unified.training.run import train

COLOURS = {"3D": "red", "silhouette": "black", "line art": "green"}

SHAPES = {"box": (2, 2, 14, 14), "bar": (2, 6, 14, 10), "dot": (6, 6, 10, 10)}


def styles(folder: Path, sides: dict[str, int] | None = None) -> str:
    """A shard of two names in three styles, and of one name in a single style."""
    places = [(n, s) for n in ("box", "bar") for s in COLOURS] + [("dot", "3D")]
    examples = []
    for index, (name, style) in enumerate(places):
        side = (sides or {}).get(style, tiny.SIDE)
        image = Image.new("RGB", (side, side), "white")
        image.paste(COLOURS[style], SHAPES[name])
        record = {"name": name, "style": style, "license": "MIT"}
        members = {"png": tiny.as_png(image), "json": json.dumps(record).encode()}
        examples.append((f"{index:03}", members | {"txt": b"a caption"}))
    write_shard(folder / "styles.tar", examples)
    return str(folder / "styles.tar")


def test_every_picture_is_the_target_of_one_pair(tmp_path: Path) -> None:
    shard = styles(tmp_path)
    (path,) = styles_pairs.write(tmp_path / "out", [shard], seed=1)
    found = read_shards(str(path))
    assert [e.key for e in found] == [f"{i:09}" for i in range(6)]  # "dot" has a single style
    given = {e.members["png"]: json.loads(e.members["json"]) for e in read_shards(shard)}
    for example in found:
        source, target = given[example.members["source.png"]], given[example.members["png"]]
        told = json.loads(example.members["json"])
        assert source["name"] == target["name"] == told["name"]
        assert (source["style"], target["style"]) == (told["from"], told["to"])
        assert source["style"] != target["style"]
        assert told["source"]["license"] == told["target"]["license"] == "MIT"
    said = {e.members["txt"].decode() for e in found}
    assert said == {"as a 3D emoji", "as a silhouette", "as line art"}
    again = styles_pairs.write(tmp_path / "again", [shard], seed=1)[0]
    assert again.read_bytes() == path.read_bytes()
    others = {styles_pairs.write(tmp_path / str(s), [shard], s)[0].read_bytes() for s in range(5)}
    assert len(others) > 1


def test_the_command_says_what_it_cannot_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    styles_pairs.main([])
    assert capsys.readouterr().out.startswith("usage: python -m unified.demos.styles_pairs OUT")
    plain = tiny.write_shard(tmp_path / "s.tar", tiny.squares())
    for arguments, says in (
        ([plain], "example 0000: a .json with a name and a style is needed, found nothing"),
        (["nowhere.tar"], "shard nowhere.tar was not found"),
    ):
        with pytest.raises(SystemExit):
            styles_pairs.main([str(tmp_path / "out"), *arguments])
        assert says in capsys.readouterr().err
    styles_pairs.main([str(tmp_path / "out"), styles(tmp_path), "split=val", "seed=2"])
    assert capsys.readouterr().out == f"{tmp_path / 'out' / 'val-00000.tar'}\n"


def editing(folder: Path, shard: str, steps: int) -> Any:
    fast = {"batch_size": 8, "optimizer": {"lr": 1e-2, "warmup_steps": 2}}
    stages = [
        tiny.autoencoder("text", steps=1),
        tiny.autoencoder("image", steps=steps, **fast),
        tiny.joint(steps=steps, **fast),
    ]
    tasks = {"editing": {"type": "editing", "source": "s"}}
    return tiny.config(folder / "run", shard, tasks=tasks, stages=stages)


def test_a_model_learns_to_edit(tmp_path: Path) -> None:
    (path,) = styles_pairs.write(tmp_path, [styles(tmp_path)])
    config = editing(tmp_path, str(path), 50)
    (report,) = check_config(config, workers=1)
    assert report.found.usable["task editing"] == 6
    assert not report.found.bad
    final = train(config, "own")
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    losses = [row["loss/flow/image"] for row in lines if "loss/flow/image" in row]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    pipeline = UnifiedPipeline.from_pretrained(final)
    given = [{"source": tiny.square(c), "prompt": "as line art"} for c in tiny.CAPTIONS[:2]]
    together = pipeline.generate("editing", given, seed=[1, 2])
    (alone,) = pipeline.generate("editing", given[1:], seed=[2])
    assert together[1].tobytes() == alone.tobytes()


def test_pictures_of_two_sizes_make_a_bad_example(tmp_path: Path) -> None:
    (path,) = styles_pairs.write(tmp_path, [styles(tmp_path, {"silhouette": 8})])
    pipeline = tiny.pipeline(editing(tmp_path, str(path), 1))
    stream = TaskStream("editing", pipeline.tasks["editing"], pipeline.modalities, row_length=64)
    reasons = []
    for raw in read_shards(str(path)):
        try:
            stream.prepare(Example(raw, pipeline.modalities), generator(0))
        except ValueError as error:
            reasons.append(str(error))
    silhouettes = [e for e in read_shards(str(path)) if b"silhouette" in e.members["json"]]
    assert len(reasons) == len(silhouettes) > 0
    assert all("segment I lies on the positions of S" in reason for reason in reasons)


def test_generation_places_the_target_on_its_source() -> None:
    """One step from noise is one velocity, that of a forward pass over the whole sequence."""
    from unified.config.schema import GenerationConfig
    from unified.generation.blocks import Request, Session
    from unified.latents.ragged import Latent
    from unified.sequence.packing import Sample, latents_of, pack

    tasks = {"editing": {"type": "editing", "source": "s"}}
    pipeline = tiny.pipeline(tiny.config(tasks=tasks))
    tiny.randomise(pipeline.prior)
    layouts = {"editing": pipeline.tasks["editing"].layout}
    channels = pipeline.prior.channels
    grids = {"S": (2, 3), "P": (4,), "I": (2, 3)}
    rng = generator(0)
    values = {k: torch.randn(n, c, generator=rng) for k, (n, c) in {
        "S": (6, channels["image"]), "P": (4, channels["text"]), "I": (6, channels["image"]),
    }.items()}  # fmt: skip
    given = {k: Latent(values[k], grids[k]) for k in "SP"}
    request = Request(given, grids["I"], 1, noise=[values["I"]])
    settings = GenerationConfig(num_steps=1, guidance_scale=1.0)
    session = Session(pipeline.prior, layouts, "editing", "I", [request], settings)
    with torch.no_grad():
        made = session.step()[0]
    samples = [Sample("editing", grids)]
    batch = pack(samples, layouts, session.visibility, None, 3)
    batch = batch.with_latents(latents_of(samples, layouts, [values]))
    batch.time_RL[0, 10:] = 1.0
    with torch.no_grad():
        v = pipeline.prior(batch)["image"][6:]
    torch.testing.assert_close(made, values["I"] - v, rtol=1e-4, atol=1e-4)
