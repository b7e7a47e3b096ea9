"""The shell is as general as the core: any task of any model is generated, shown and put on a page,
by the names of its segments."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny
import torch
import yaml
from PIL import Image

from unified import cli
from unified.demos import app
from unified.pipeline import UnifiedPipeline

TASKS = {
    **tiny.TASKS,
    "editing": {"type": "editing", "source": "s"},
    "vqa": {"type": "captioning", "source": "s", "block": 4, "question": "q"},
}
PLUGIN = '''
from unified.sequence.layout import Layout, Segment
from unified.sequence.task import Task, TaskConfig
from unified.sequence.visibility import ALL


class Between(Task):
    """A picture between two others."""

    Config = TaskConfig

    @property
    def layout(self):
        given = {"A": ALL, "B": ALL}
        segments = (
            Segment("A", "image", name="first"),
            Segment("B", "image", name="last", positions_of="A"),
            Segment("M", "image", noise="segment", name="middle", positions_of="A"),
        )
        return Layout(segments, {"A": given, "B": given, "M": {**given, "M": ALL}})

    @property
    def generates(self):
        return "M"

    def fill(self, example):
        return {"A": example["first.image"], "B": example["image"], "M": example["middle.image"]}
'''


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose every weight is random, so that all that is given counts."""
    folder = tmp_path_factory.mktemp("shell")
    (folder / "between.py").write_text(PLUGIN)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        tasks = {**TASKS, "between": {"type": "between:Between", "source": "s"}}
        config = tiny.config(tasks=tasks)
        torch.manual_seed(0)
        pipeline = UnifiedPipeline.build(config, {"text": tiny.CAPTIONS}, trust_remote_code=True)
        tiny.randomise(pipeline.prior)
        pipeline.save_pretrained(folder / "model")
        for name, caption in (("red", "a big red square"), ("blue", "a small blue square")):
            tiny.square(caption).save(folder / f"{name}.png")
        (folder / "ask.txt").write_text("as line art")
        (folder / "no.png").write_text("no image")
        yield folder


@pytest.fixture(autouse=True)
def here(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model)


Run = Callable[..., str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as end:
            cli.main(arguments)
        printed = capsys.readouterr()
        assert not end.value.code, printed.err
        return printed.out

    return run


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """A command that must fail, before any weight is read."""

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    def run(*arguments: str) -> str:
        monkeypatch.setattr(UnifiedPipeline, "from_pretrained", never)
        with pytest.raises(SystemExit) as end:
            cli.main(arguments)
        assert end.value.code == 2
        return capsys.readouterr().err

    return run


MODEL = ("--checkpoint", "model", "--seed", "3", "--trust-remote-code")
EDIT = ("--given", "source=@red.png", "--given", "prompt=as line art")


def loaded() -> UnifiedPipeline:
    return UnifiedPipeline.from_pretrained("model", trust_remote_code=True)


# ---- generate ------------------------------------------------------------------------------------


def test_any_task_is_generated_from_what_its_segments_are_called(run: Run, tmp_path: Path) -> None:
    outputs = [tmp_path / f"{i}.png" for i in range(4)]
    for output, given in zip(
        outputs,
        (
            EDIT,
            ("--given", "S=@red.png", "--given", "P=@ask.txt"),
            ("--given", "source=@red.png", "--given", "prompt=as a cat"),
            ("--given", "source=@blue.png", "--given", "prompt=as line art"),
        ),
        strict=True,
    ):
        assert run("generate", "editing", *MODEL, *given, "--output", str(output)) == f"{output}\n"
    whole, letters, prompt, source = (output.read_bytes() for output in outputs)
    assert whole == letters
    assert len({whole, prompt, source}) == 3
    (image,) = loaded().generate(
        "editing", [{"source": Image.open("red.png"), "prompt": "as line art"}], seed=3
    )
    assert image.tobytes() == Image.open(outputs[0]).tobytes()


def test_a_task_of_a_plugin_is_no_other(run: Run, tmp_path: Path) -> None:
    given = ("--given", "first=@red.png", "--given", "last=@blue.png")
    output = tmp_path / "m.webp"
    run("generate", "between", *MODEL, *given, "--output", str(output), "num_steps=2")
    assert Image.open(output).format == "WEBP"


@pytest.mark.parametrize(
    ("task", "given", "shorthand"),
    [
        (
            "captioning",
            ("image=@red.png", "prompt=What?"),
            ("--image", "red.png", "--prompt", "What?"),
        ),
        ("captioning", ("image=@red.png",), ("--image", "red.png")),
        ("continuation", ("prompt=a big",), ("--prompt", "a big", "--steps", "3")),
    ],
)
def test_the_shorthand_says_the_same(
    run: Run, task: str, given: tuple[str, ...], shorthand: tuple[str, ...], tmp_path: Path
) -> None:
    items = [word for pair in given for word in ("--given", pair)] + list(shorthand[-2:])
    items = items if "--steps" in items else items[:-2]
    wanted = run("generate", task, *MODEL, *shorthand)
    assert run("generate", task, *MODEL, *items) == wanted
    run("generate", task, *MODEL, *items, "--output", str(tmp_path / "said.txt"))
    assert (tmp_path / "said.txt").read_text() == wanted


def test_a_text_may_begin_with_the_sign_of_a_file(run: Run, tmp_path: Path) -> None:
    (tmp_path / "at.txt").write_text("@red")
    told = [
        run(
            "generate", "continuation", *MODEL, "--given", f"prompt={word}", "--max-new-tokens", "5"
        )
        for word in ("@@red", f"@{tmp_path / 'at.txt'}", "red")
    ]
    assert told[0] == told[1]


def test_text_to_image_by_names(run: Run, tmp_path: Path) -> None:
    one, two = tmp_path / "1.png", tmp_path / "2.png"
    run("generate", "text_to_image", *MODEL, "--given", "prompt=red", "--output", str(one))
    run("generate", "text_to_image", *MODEL, "--prompt", "red", "--output", str(two))
    assert one.read_bytes() == two.read_bytes()
    run(
        "generate", "text_to_image", *MODEL, "--given", "C=red", "--size", "8", "--output", str(two)
    )
    assert Image.open(two).size == (8, 8)


OUT = ("--output", "x.png")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("edit", *EDIT, *OUT), "this model has no task 'edit'; did you mean editing?"),
        (("editing", *OUT), "editing needs source, prompt: say --given source=..."),
        (("editing", *EDIT[:2], *OUT), "editing needs prompt: say --given prompt=..."),
        (
            ("editing", *EDIT, "--given", "I=@red.png", *OUT),
            "editing takes no 'I'; known: prompt, sou",
        ),
        (("editing", *EDIT, "--given", "sorce=x", *OUT), "takes no 'sorce'; did you mean source?"),
        (("editing", *EDIT, "--given", "P=more", *OUT), "prompt is given twice, .* as 'P=more'"),
        (
            ("editing", "--given", "red.png", *OUT),
            "should read NAME=TEXT or NAME=@FILE, found 'red",
        ),
        (
            ("editing", "--given", "source=red.png", *OUT),
            "source is no text .* --given source=@FILE",
        ),
        (("editing", "--given", "source=@gone.png", *OUT), "--given source: there is no file gone"),
        (("editing", *EDIT), "what is made is no text to print: name a file for it with --output"),
        (
            ("editing", *EDIT, "--output", "x"),
            "--output should end in an image format such as .png",
        ),
        (("editing", *EDIT, "--output", "no/x.png"), "--output no/x.png: there is no folder no"),
        (
            ("editing", *EDIT, *OUT, "--prompt", "x"),
            "--prompt is a shorthand of continuation, capt",
        ),
        (("vqa", "--image", "red.png"), "--image is a shorthand .* unified show task vqa"),
        (("vqa", "--given", "image=@red.png"), "vqa needs prompt"),
        (("captioning", "--given", "image=@red.png", "--task", "vqa"), "does not go with --given"),
        (("continuation", "--image", "red.png"), "continuation takes no --image"),
        (("text_to_image", "--prompt", "a", "--prompt", "b", *OUT), "takes one --prompt, found 2"),
        (("continuation",), "continuation needs --prompt, or --given for each segment"),
        (("continuation", "--prompt", "a", "--prompt", "b", "--output", "f"), "but 2 texts are to"),
        (("captioning", "--image", "red.png", "--size", "3"), "captioning takes no --size"),
        (("text_to_image", "--prompt", "a"), "name a file for it with --output"),
        (
            ("text_to_image", "--prompt", "a", *OUT, "--max-new-tokens", "3"),
            "takes no --max-new-tok",
        ),
    ],
)
def test_a_mistake_is_found_before_weights_are_read(
    fails: Run, arguments: tuple[str, ...], says: str
) -> None:
    message = fails("generate", *arguments, *MODEL)
    assert message.count("\n") == 1
    assert re.search(says, message), message


def test_a_file_that_its_modality_cannot_read_is_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ("--given", "source=@no.png", "--given", "prompt=x")
    with pytest.raises(SystemExit):
        cli.main(["generate", "editing", *MODEL, *given, *OUT])
    assert "error: --given source: no.png: 8 bytes are no WebP" in capsys.readouterr().err


def test_an_edited_picture_is_as_large_as_its_source() -> None:
    pipeline = loaded()
    given = [{"source": Image.new("RGB", (16, 8)), "prompt": "x"}]
    (image,) = pipeline.generate("editing", given, seed=0)
    assert image.size == (16, 8)
    with pytest.raises(
        ValueError, match=r"as large as its source, of 1 x 2 latents, but the size 8"
    ):
        pipeline.generate("editing", given, size=8)
    (same,) = pipeline.generate("editing", given, size=(8, 16), seed=0)
    assert same.tobytes() == image.tobytes()


def test_items_are_named_once() -> None:
    pipeline = loaded()
    with pytest.raises(ValueError, match="segment P is given twice, the second time as prompt"):
        pipeline.generate("captioning", [{"P": "a", "prompt": "b"}])
    with pytest.raises(
        ValueError, match="no segment 'N' to give an item for; known: answer, image"
    ):
        pipeline.generate("captioning", [{"N": "a"}])


# ---- score ---------------------------------------------------------------------------------------


def test_the_task_that_goes_on_with_a_text_is_scored_whatever_its_name() -> None:
    scores = []
    for name in ("continuation", "story"):
        made = tiny.pipeline(tiny.config(tasks={name: tiny.TASKS["continuation"]}))
        tiny.randomise(made.prior)
        scores += made.score(["a big"], num_samples=2, num_steps=2)
    assert scores[0] == scores[1]
    tasks = dict.fromkeys(("story", "poem"), tiny.TASKS["continuation"])
    two = tiny.pipeline(tiny.config(tasks=tasks))
    with pytest.raises(ValueError, match="this model has several that do, story, poem: name one"):
        two.score(["a"])
    assert two.score(["a"], task="poem", num_samples=1, num_steps=2)
    only = tiny.pipeline(tiny.config(tasks={"captioning": tiny.TASKS["captioning"]}))
    with pytest.raises(ValueError, match="this model has none that does"):
        only.score(["a"])


# ---- show ----------------------------------------------------------------------------------------


def test_a_task_is_shown_as_the_model_has_it(run: Run, tmp_path: Path) -> None:
    told = json.loads(run("show", "task", "between", *MODEL[:2], "--trust-remote-code", "--json"))
    assert "".join(told["kinds"]) == "AABBMM"
    assert (told["generates"], told["continues"], told["given"]) == ("M", None, ["A", "B"])
    assert [s["name"] for s in told["segments"]] == ["first", "last", "middle"]
    assert [s["positions_of"] for s in told["segments"]] == [None, "A", "A"]
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(tiny.tree(tasks=TASKS)))
    command = ("show", "task", "continuation", "--config", str(tmp_path / "own.yaml"))
    told = json.loads(run(*command, "--json"))
    assert told["sees"] == {"C": {"C": [None, 0]}, "N": {"C": [None, -1], "N": [0, 0]}}
    assert [(s["kind"], s["block"], s["copies"]) for s in told["segments"]] == [
        ("C", 4, None),
        ("N", 4, "C"),
    ]
    assert told["continues"] == "C"
    lines = run(*command).splitlines()
    assert "C  prompt  text  given, generated, in blocks of 4" in lines
    assert "N  N       text  the noisy twin of C, in blocks of 4" in lines


def test_lengths_go_by_name_and_shared_positions_share_them(run: Run) -> None:
    told = json.loads(run("show", "task", "editing", "--lengths", "source=3,P=1", "--json"))
    assert "".join(told["kinds"]) == "SSSPIII"


def test_what_is_no_task_of_the_model_is_named(fails: Run) -> None:
    assert "no task 'edit' is configured; did you mean editing?" in fails(
        "show", "task", "edit", *MODEL[:2]
    )
    asked = ("show", "task", "vqa", *MODEL[:2], "--config", "quickstart.yaml")
    assert "name a checkpoint or a configuration, not both" in fails(*asked)


# ---- the page ------------------------------------------------------------------------------------


class Gradio(ModuleType):
    """What the page asks of gradio: components that note how they were made."""

    def __init__(self) -> None:
        super().__init__("gradio")
        self.made: list[tuple[str, dict[str, Any]]] = []
        self.clicked: list[tuple[Any, list[Any], Any]] = []
        self.Error = type("Error", (Exception,), {})

    def Blocks(self, **_: Any) -> Any:  # noqa: N802
        return nullcontext()

    def Tab(self, label: str) -> Any:  # noqa: N802
        self.made.append(("Tab", {"label": label}))
        return nullcontext()

    def Button(self, _: str) -> Any:  # noqa: N802
        click = lambda run, inputs, out: self.clicked.append((run, inputs, out))  # noqa: E731
        return type("Button", (), {"click": staticmethod(click)})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **told: self.made.append((name, told)) or (name, told.get("label"))


def test_the_page_has_a_tab_for_every_task(monkeypatch: pytest.MonkeyPatch) -> None:
    gradio, pipeline = Gradio(), loaded()
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    app.page(pipeline)
    tabs = [told["label"] for name, told in gradio.made if name == "Tab"]
    assert tabs == [name.replace("_", " ") for name in pipeline.tasks]
    pages = dict(zip(pipeline.tasks, gradio.clicked, strict=True))
    run, inputs, out = pages["editing"]
    assert inputs[:2] == [("Image", "source"), ("Textbox", "prompt")]
    assert out == ("Image", "image")
    settings = (0, 2, 1.5)
    made = run("red.png", "as line art", *settings)
    assert Image.open(made).size == (16, 16)
    with pytest.raises(gradio.Error, match="give the source first"):
        run(None, "as line art", *settings)
    with pytest.raises(gradio.Error, match="8 bytes are no WebP"):
        run("no.png", "as line art", *settings)
    run, inputs, out = pages["continuation"]
    assert (inputs[0], out) == (("Textbox", "prompt"), ("Textbox", "what follows"))
    wanted = pipeline.continue_text(["a big"], seed=0, num_steps=2, guidance_scale=1.5)
    assert run("a big", *settings) == wanted[0]
    instruction = {"label": "prompt", "value": "Describe the image."}
    assert ("Textbox", instruction) in gradio.made
