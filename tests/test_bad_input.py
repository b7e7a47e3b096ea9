"""What a user gets wrong, from the command line to the last line of output: one sentence, exit
code 2, and nothing half-written. (Each part's own refusals are tested with the part.)"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from unified import cli
from unified.pipeline import UnifiedPipeline

Fails = Callable[..., str]


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    """Run a command that must fail; gives the last line of what it says."""

    def run(*arguments: str | Path) -> str:
        with pytest.raises(SystemExit) as end:
            cli.main([str(a) for a in arguments])
        assert end.value.code == 2
        printed = capsys.readouterr()
        *before, last = printed.err.splitlines()
        assert last.startswith("error: ")
        assert "Traceback" not in printed.err
        assert not [line for line in before if line.startswith("error")]
        assert printed.out == ""
        return last.removeprefix("error: ")

    return run


def write_config(folder: Path, **changes: Any) -> Path:
    """A configuration of a short run in ``folder/run``, on a shard of squares."""
    shard = tiny.write_shard(folder / "squares.tar", tiny.squares())
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump(tiny.tree(folder / "run", shard, **changes)))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline") / "model"
    tiny.pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    """The model in a folder of its own, to be damaged."""
    UnifiedPipeline.from_pretrained(model).save_pretrained(tmp_path / "copy")
    return tmp_path / "copy"


# ---- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("training.save_evry=3", "unknown key training.save_evry; did you mean"),
        ("stages.joint.steps=many", "stages.2.steps is 'many' but should be a valid int"),
        ("modalities.text.dims=3", "unknown key modalities.text.dims; did you mean"),
        ("modalities.image=null", "task captioning names the modality 'image', which is not"),
        ("stages.image_vae.sources={s: 0}", "stage image_vae has a zero-weight objective"),
        ("data.sources.s.train=[nowhere.tar]", "shard nowhere.tar was not found at"),
        ("data.sources.s.val=[nowhere.tar]", "shard nowhere.tar was not found at"),
        ("training.trackers=[abacus]", "training.trackers asks for abacus, which is not"),
        ("init.prior=nowhere", "init.prior: nowhere is no folder of a prior (with config.json)"),
        ("modalities.text.vocab_size=100", "vocab_size 100 is too small: 258 tokens are needed"),
        ("prior.rope_dim=7", "rope_dim"),
    ],
)
def test_a_run_that_cannot_begin_writes_no_model(
    fails: Fails, tmp_path: Path, override: str, says: str
) -> None:
    path = write_config(tmp_path)
    assert says in fails("train", path, override)
    run = tmp_path / "run"
    assert not [p for p in run.rglob("*") if p.is_file() and p.parent.name != "unified"]


def test_a_mistake_can_be_corrected_in_the_same_folder(fails: Fails, tmp_path: Path) -> None:
    path = write_config(tmp_path, stages=[tiny.autoencoder("text", steps=1)])
    fails("train", path, "init.prior=nowhere")
    with pytest.raises(SystemExit) as end:
        cli.main(["train", str(path)])
    assert not end.value.code
    assert (tmp_path / "run" / "final" / "model_index.json").is_file()


def test_an_empty_shard_is_named(fails: Fails, tmp_path: Path) -> None:
    path, empty = write_config(tmp_path), tmp_path / "empty.tar"
    empty.touch()
    message = fails("train", path, f"data.sources.s.train=[{empty}]")
    assert f"shard {empty} is empty (0 bytes); write or fetch it again" in message


def png_bomb(side: int) -> bytes:
    """A PNG whose header claims `side` x `side` pixels."""
    data = bytearray(tiny.as_png(Image.new("RGB", (1, 1))))
    data[16:24] = side.to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


BAD_IMAGES = {
    "undecodable": (b"no image at all", "no WebP, PNG, JPEG or GIF image"),
    "truncated": (tiny.as_png(tiny.square("a big red square"))[:60], "is damaged"),
    "bomb": (png_bomb(9000), "an image of 9000 x 9000 pixels was found: at most 64000000 pixels"),
}


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_a_bad_image_is_skipped_and_too_many_end_the_run(
    fails: Fails, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    data, says = BAD_IMAGES[kind]
    members = [*tiny.squares(), ("9999.png", data), ("9999.txt", b"a big red square")]
    shard = tiny.write_shard(tmp_path / "bad.tar", members)
    stages = [tiny.autoencoder("image", steps=3)]
    path = write_config(tmp_path, stages=stages, data={"sources": {"s": {"train": [shard]}}})
    message = fails("train", path)
    assert f"shard {shard}, example 9999: " in message
    assert says in message
    assert "source s has too many bad examples for s: 1 of 7, where max_bad_share" in message
    assert not (tmp_path / "run" / "final").exists()
    with pytest.raises(SystemExit) as end:
        cli.main(["train", str(path), "data.max_bad_share=0.2", f"run.dir={tmp_path / 'again'}"])
    assert not end.value.code
    assert "replacing a bad example" in caplog.text


def test_captions_longer_than_a_row_end_the_run_if_all_are(fails: Fails, tmp_path: Path) -> None:
    tasks = {"captioning": tiny.TASKS["captioning"]}
    path = write_config(tmp_path, tasks=tasks, stages=[tiny.joint(steps=1)])
    message = fails("train", path, "stages.joint.row_length=30", "data.max_bad_share=1")
    assert "source s has too many bad examples for captioning: 100 of 100" in message
    assert "a row holds 30; shorten the item, raise row_length, or set too_long" in message


def test_one_caption_longer_than_a_row_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = "a big red square " * 12
    members = [*tiny.squares(), ("9999.png", tiny.squares()[0][1]), ("9999.txt", long.encode())]
    shard = tiny.write_shard(tmp_path / "long.tar", members)
    settings = tiny.tree(
        tmp_path / "run",
        shard,
        modalities={"text": {**tiny.TEXT, "max_tokens": 512}, "image": tiny.IMAGE},
        tasks={"text_to_image": tiny.TASKS["text_to_image"]},
        data={"sources": {"s": {"train": [shard]}}, "max_bad_share": 0.2},
        stages=[tiny.joint(steps=2, row_length=96)],
    )
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(settings))
    with pytest.raises(SystemExit) as end:
        cli.main(["train", str(path)])
    assert not end.value.code
    assert "example 9999: the sample has" in caplog.text
    assert "a row holds 96" in caplog.text


# ---- generating ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("", "a prompt is empty; it must say something"),
        ("long " * 40, "tokens, eos included, but max_tokens is 64: shorten it"),
    ],
)
def test_a_prompt_that_cannot_be_read_is_explained(
    fails: Fails, model: Path, tmp_path: Path, prompt: str, says: str
) -> None:
    output = tmp_path / "out.png"
    arguments = ("--checkpoint", model, "--prompt", prompt)
    assert says in fails("generate", "text_to_image", *arguments, "--output", output)
    assert not output.exists()
    if not prompt:
        assert says in fails("generate", "continuation", *arguments)


@pytest.mark.parametrize("size", [7, 24])
def test_a_size_that_cannot_be_painted_is_explained(
    fails: Fails, model: Path, tmp_path: Path, size: int
) -> None:
    output = tmp_path / "out.png"
    arguments = ("--checkpoint", model, "--prompt", "red", "--output", output, "--size", str(size))
    message = fails("generate", "text_to_image", *arguments)
    assert "both sides must be multiples of 8, and the area at most 16 x 16" in message
    assert not output.exists()


def test_a_truncated_image_file_is_explained(fails: Fails, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.png"
    path.write_bytes(tiny.as_png(tiny.square("a big red square"))[:60])
    message = fails("generate", "captioning", "--checkpoint", model, "--image", path)
    assert str(path) in message


@pytest.mark.parametrize("side", [9000, 60_000])
def test_an_image_bomb_is_not_decoded(fails: Fails, model: Path, tmp_path: Path, side: int) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_bomb(side))
    message = fails("generate", "captioning", "--checkpoint", model, "--image", path)
    assert str(path) in message


def test_an_image_reaches_the_model_as_training_saw_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transparent pixels show white, whatever colour hides behind them, and rotation is applied."""
    seen: list[Any] = []
    path, exif = tmp_path / "clear.png", Image.Exif()
    image = Image.new("RGBA", (16, 8), (200, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 8, 8))
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.save(path, exif=exif)

    def caption(self: UnifiedPipeline, images: list[Any], **options: Any) -> list[str]:
        seen.extend(self.modalities["image"].observe(i) for i in images)
        return ["something"]

    monkeypatch.setattr(UnifiedPipeline, "caption", caption)
    arguments = ["generate", "captioning", "--checkpoint", str(model), "--image", str(path)]
    with pytest.raises(SystemExit):
        cli.main(arguments)
    (pixels,) = seen
    assert pixels.shape == (3, 16, 8)
    assert pixels[:, 0, 0].tolist() == [0, 0, 255]
    assert pixels[:, -1, -1].tolist() == [255, 255, 255]


# ---- checkpoints ---------------------------------------------------------------------------------


def misshape(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n, t in tensors.items() if t.ndim == 2)
    save_file({**tensors, name: tensors[name][:, :-1].contiguous()}, folder / "model.safetensors")


def drop(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(dict(list(tensors.items())[1:]), folder / "model.safetensors")


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def gone(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("part", ["text_vae", "prior"])
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (misshape, "but the model needs"),
        (drop, "lacks tensor"),
        (cut, "is not a whole safetensors file"),
        (gone, "there is no weights file"),
        (not_json, "is not JSON"),
    ],
)
def test_a_damaged_checkpoint_is_named(
    fails: Fails, copy: Path, part: str, damage: Callable[[Path], None], says: str
) -> None:
    damage(copy / part)
    message = fails("generate", "continuation", "--checkpoint", copy, "--prompt", "red")
    assert says in message
    assert f"{copy / part}" in message


def test_a_damaged_tokenizer_is_named(fails: Fails, copy: Path) -> None:
    (copy / "tokenizer" / "tokenizer.json").write_text("{")
    message = fails("generate", "continuation", "--checkpoint", copy, "--prompt", "red")
    assert f"{copy / 'tokenizer' / 'tokenizer.json'} is no tokenizer file" in message


def test_code_in_a_checkpoint_is_not_run_without_trust(fails: Fails, copy: Path) -> None:
    index = json.loads((copy / "model_index.json").read_text())
    index["tasks"]["captioning"]["type"] = "somebody.elses.code:Task"
    (copy / "model_index.json").write_text(json.dumps(index))
    message = fails("generate", "continuation", "--checkpoint", copy, "--prompt", "red")
    assert "somebody.elses.code:Task" in message
    assert "trust_remote_code" in message


# ---- as a process --------------------------------------------------------------------------------


def test_the_process_ends_with_one_line_and_code_2(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    command = [sys.executable, "-m", "unified.cli", "train", path, "data.sources.s.train=[x.tar]"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("error: shard x.tar was not found at ")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
