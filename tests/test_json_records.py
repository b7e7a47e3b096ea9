"""Questions, answers and captions that stand in an example's .json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image

from unified import cli
from unified.config.registry import resolve
from unified.data.examples import Example
from unified.data.shards import read_shards
from unified.pipeline import UnifiedPipeline
from unified.training.run import train

VQA: dict[str, Any] = {
    "type": "captioning",
    "source": "s",
    "block": 4,
    "question": "question",
    "answer": "answers.0",
}


def make(name: str, **options: Any) -> Any:
    cls: Any = resolve("task", name)
    return cls(cls.Config(source="any", **options))


def record(caption: str) -> dict[str, Any]:
    colour = caption.split()[2]
    return {"question": "which colour?", "answers": [colour, f"all {colour}"]}


def write_vqa(path: Path) -> str:
    """A shard of images and their .json; only the first half has a .txt."""
    members = []
    for i, caption in enumerate(tiny.CAPTIONS):
        members += [
            (f"{i:04}.png", tiny.as_png(tiny.square(caption))),
            (f"{i:04}.json", json.dumps(record(caption)).encode()),
        ]
        members += [(f"{i:04}.txt", caption.encode())] if i < 3 else []
    return tiny.write_shard(path, members)


def test_a_plain_mapping_holds_its_fields_itself() -> None:
    example = {"image": object(), "text": "a cat", **record("a big red square")}
    vqa = make("captioning", question="question", answer="answers.1")
    assert vqa.fill(example) == {"P": "which colour?", "I": example["image"], "C": "all red"}
    assert make("captioning", question="question").fill(example)["C"] == "a cat"
    assert make("captioning", answer="answers.0").fill(example)["P"] == "Describe the image."
    assert make("continuation", field="answers.0").fill(example) == {"C": "red"}
    painted = make("text_to_image", caption="question").fill(example)
    assert painted == {"C": "which colour?", "I": example["image"]}


@pytest.mark.parametrize(
    ("field", "says"),
    [
        ("answer", r"captioning needs a .json with the field 'answer', found answers, q.*"),
        ("answers", "needs a text in the field 'answers' .* a list; answers.0 is its first"),
        ("answers.2", "the field 'answers.2', found a list of 2"),
        ("answers.x", "the field 'answers.x', found a list of 2"),
        ("question.0", "the field 'question.0', found a str"),
    ],
)
def test_a_field_that_is_no_text_is_named_with_its_example(
    tmp_path: Path, field: str, says: str
) -> None:
    model = tiny.pipeline()
    raw = read_shards(write_vqa(tmp_path / "vqa.tar"))[0]
    task = make("captioning", answer=field)
    example = Example(raw, model.modalities)
    with pytest.raises(ValueError, match=rf"vqa\.tar, example 0000: .*{says}"), example.naming():
        task.fill(example)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two steps on questions and answers, by the real loop."""
    folder = tmp_path_factory.mktemp("vqa")
    config = tiny.config(
        folder / "run",
        write_vqa(folder / "vqa.tar"),
        tasks={"vqa": VQA},
        stages=[tiny.joint(batch_size=4)],
    )
    torch.manual_seed(0)
    return Path(train(config))


def test_it_trains_on_the_answer_given_the_question(trained: Path) -> None:
    lines = (trained.parent / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert all(json.loads(line)["loss/flow/text"] > 0 for line in lines)


def test_a_trained_model_is_asked_a_question(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tiny.square(tiny.CAPTIONS[0])
    image.save(tmp_path / "a.png")
    pipeline = UnifiedPipeline.from_pretrained(trained)
    images = [Image.open(tmp_path / "a.png")]
    (said,) = pipeline.caption(images, ["which colour?"], task="vqa", seed=0)
    with pytest.raises(ValueError, match="vqa has no instruction for every image: give prompts"):
        pipeline.caption(images, task="vqa")
    asked = ["--image", str(tmp_path / "a.png"), "--task", "vqa", "--prompt", "which colour?"]
    with pytest.raises(SystemExit) as end:
        cli.main(["generate", "captioning", "--checkpoint", str(trained), *asked])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"{said}\n"
