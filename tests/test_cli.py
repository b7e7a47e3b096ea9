"""The command line: what it prints, and how it fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from PIL import Image

from unified import cli
from unified.model.precision import current_device

CONFIG = """
modalities:
  text: {type: text, vocab_size: 300, dim: 24, ffn_dim: 32, num_heads: 2, latent_dim: 4}
tasks: {continuation: {type: continuation, source: prose}}
data: {sources: {prose: {train: [a.tar]}}}
prior: {width: 32, heads: 2, head_dim: 16, rope_dim: 12, single_stream_depth: 2}
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(CONFIG)
    return str(path)


def run(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    printed = capsys.readouterr()
    assert end.value.code == 0, printed.err
    return printed.out


def fails(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    return capsys.readouterr().err


# ---- show --------------------------------------------------------------------------------------


def test_show_config_prints_what_is_resolved(config, capsys):
    tree = yaml.safe_load(run(capsys, "show", "config", config, "prior.width=64"))
    assert tree["prior"]["width"] == 64
    assert tree["tasks"] == {"continuation": {"type": "continuation", "source": "prose"}}


def test_show_task_draws_the_grid(capsys):
    drawing = """
  P P I I C C C C N N N N
P # # # # . . . . . . . .
P # # # # . . . . . . . .
I # # # # . . . . . . . .
I # # # # . . . . . . . .
C # # # # # # . . . . . .
C # # # # # # . . . . . .
C # # # # # # # # . . . .
C # # # # # # # # . . . .
N # # # # . . . . # # . .
N # # # # . . . . # # . .
N # # # # # # . . . . # #
N # # # # # # . . . . # #
"""
    assert ("\n" + run(capsys, "show", "task", "captioning")).startswith(drawing)


def test_show_task_as_json(capsys):
    printed = run(
        capsys, "show", "task", "captioning", "--lengths", "P=3,I=4,C=6", "--block", "2", "--json"
    )
    grid = json.loads(printed)
    assert "".join(grid["kinds"]) == "PPPIIIICCCCCCNNNNNN"
    assert grid["blocks"] == [0, 0, 0, 1, 1, 1, 1, 2, 2, 3, 3, 4, 4, 2, 2, 3, 3, 4, 4]
    assert len(grid["visible"]) == 19
    assert grid["visible"][0] == [1] * 7 + [0] * 12
    assert grid["visible"][-1] == [1] * 11 + [0] * 6 + [1] * 2


def test_show_task_adds_the_unconditional_copies(capsys):
    printed = run(capsys, "show", "task", "text_to_image", "--unconditional", "--json")
    grid = json.loads(printed)
    assert "".join(grid["kinds"]) == "CCCCIINNNNUUUUUU"
    for kind, block, row in zip(grid["kinds"], grid["blocks"], grid["visible"], strict=True):
        if kind == "U":
            pairs = zip(grid["kinds"], grid["blocks"], strict=True)
            assert row == [int(pair == ("U", block)) for pair in pairs]


@pytest.mark.parametrize(
    ("lengths", "says"),
    [
        ("N=3", "error: no segment 'N' to give a length; known: C, I, P"),
        ("C=x", "error: the length of C should be a whole number, found 'x'"),
        ("C=-1", "found '-1'"),
        ("C", "found ''"),
    ],
)
def test_show_task_explains_lengths(capsys, lengths, says):
    assert says in fails(capsys, "show", "task", "captioning", "--lengths", lengths)


def test_show_model_counts_without_allocating(config, capsys):
    small = json.loads(run(capsys, "show", "model", config, "--json"))
    parts = {name: module["parts"] for name, module in small["modules"].items()}
    assert list(parts) == ["text", "prior"]
    assert small["total"] == sum(sum(p.values()) for p in parts.values()) > 0
    # A width that no machine here could hold: 10 TB of weights.
    big = [config, "prior.width=65536", "prior.heads=1024", "prior.head_dim=64"]
    assert json.loads(run(capsys, "show", "model", *big, "--json"))["total"] > 10**11
    assert f"{small['total']:,}" in run(capsys, "show", "model", config)


def test_show_model_counts_the_official_models(capsys):
    found = json.loads(run(capsys, "show", "model", "cola-2b.yaml", "--json"))["modules"]
    assert {name: part["parameters"] for name, part in found.items()} == {
        "text": 501_871_574,
        "prior": 1_829_875_728,
    }
    assert found["text"]["embedding"] == 308_054_016
    printed = run(capsys, "show", "model", "cola-2b.yaml")
    for number in ("308,054,016", "501,871,574", "1,829,875,728"):
        assert number in printed


def test_show_model_counts_what_the_model_has(config, capsys):
    from unified.config.loading import load_config
    from unified.config.plugins import resolve_model
    from unified.model.prior import Prior

    read = load_config(config)
    cls, options = resolve_model(read).modalities["text"]
    text = cls.build(options, None)
    prior = Prior(read.prior, channels={"text": text.channels})
    counted = json.loads(run(capsys, "show", "model", config, "--json"))["modules"]
    for name, module in {"text": text, "prior": prior}.items():
        assert counted[name]["parameters"] == sum(p.numel() for p in module.parameters())


def test_version(capsys):
    from unified import __version__

    assert run(capsys, "version").strip() == __version__


# ---- train and generate: what they pass on -----------------------------------------------------


def stand_in(monkeypatch, name: str, **contents) -> None:
    module = ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)


def test_train_passes_the_configuration_on(config, capsys, monkeypatch):
    calls = []

    def train(read, source, trust_remote_code):
        calls.append((read.run.seed, source, trust_remote_code))
        return Path(read.run.dir, "final")

    stand_in(monkeypatch, "unified.training.run", train=train)
    printed = run(capsys, "train", config, "run.seed=7", "run.dir=elsewhere")
    assert printed == f"{Path('elsewhere/final')}\n"
    run(capsys, "train", config, "--trust-remote-code")
    assert calls == [(7, config, False), (0, config, True)]


class FakePipeline:
    """Records how it was called, and gives results of the right types."""

    calls: list[tuple] = []  # noqa: RUF012 - reset by the fixture

    @classmethod
    def from_pretrained(cls, folder, trust_remote_code, device):
        assert device == current_device()
        cls.calls.append(("from_pretrained", str(folder), trust_remote_code))
        return cls()

    def continue_text(self, prompts, **options):
        self.calls.append(("continue_text", prompts, options))
        return [f"{p}..." for p in prompts]

    def caption(self, images, prompts=None, **options):
        self.calls.append(("caption", [i.size for i in images], prompts, options))
        return ["a picture"] * len(images)

    def text_to_image(self, prompts, size, **options):
        self.calls.append(("text_to_image", prompts, size, options))
        return [Image.new("RGB", (4, 4)) for _ in prompts]


@pytest.fixture
def calls(monkeypatch):
    monkeypatch.setattr(FakePipeline, "calls", [])
    stand_in(monkeypatch, "unified.pipeline", UnifiedPipeline=FakePipeline)
    return FakePipeline.calls


def test_generate_continuation(calls, capsys):
    options = ["--checkpoint", "here", "--prompt", "One", "--prompt", "Two", "--seed", "3"]
    options += ["--steps", "4", "--guidance", "1.5", "--max-new-tokens", "9"]
    printed = run(capsys, "generate", "continuation", *options, "--trust-remote-code")
    assert printed == "One...\nTwo...\n"
    given = {"seed": 3, "num_steps": 4, "guidance_scale": 1.5, "max_new_tokens": 9}
    assert calls == [("from_pretrained", "here", True), ("continue_text", ["One", "Two"], given)]


def test_generate_captioning(calls, capsys, tmp_path):
    Image.new("L", (6, 5)).save(tmp_path / "a.png")
    options = ["--checkpoint", "here", "--image", str(tmp_path / "a.png")]
    assert run(capsys, "generate", "captioning", *options) == "a picture\n"
    assert calls[1:] == [("caption", [(6, 5)], None, {"task": "captioning", "seed": 0})]
    run(capsys, "generate", "captioning", *options, "--prompt", "What?", "--task", "vqa")
    assert calls[-1] == ("caption", [(6, 5)], ["What?"], {"task": "vqa", "seed": 0})


def test_generate_text_to_image(calls, capsys, tmp_path):
    output = tmp_path / "boat.png"
    options = ["--checkpoint", "here", "--prompt", "a boat", "--output", str(output)]
    run(capsys, "generate", "text_to_image", *options, "--size", "32")
    assert Image.open(output).size == (4, 4)
    assert calls[1:] == [("text_to_image", ["a boat"], 32, {"seed": 0})]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["max_new_tokens=abc"], "max_new_tokens is 'abc' but should be a valid integer"),
        (["max_new_tokens=2.5"], "max_new_tokens"),
        (["seed=3"], "unknown key seed"),
        (["solvr=heun"], "unknown key solvr; did you mean solver?"),
        (["num_steps=3", "--steps", "4"], "num_steps is given twice"),
        (["temperature"], "an override should read key=value, found 'temperature'"),
    ],
)
def test_a_wrong_setting_is_found_before_anything_is_loaded(calls, capsys, settings, says):
    options = ["--checkpoint", "x", "--prompt", "a boat"]
    assert says in fails(capsys, "generate", "continuation", *options, *settings)
    assert calls == []


def test_settings_are_passed_on(calls, capsys):
    options = ["--checkpoint", "x", "--prompt", "a", "solver=heun", "guidance_interval=[0.2,1.0]"]
    run(capsys, "generate", "continuation", *options)
    given = {"seed": 0, "solver": "heun", "guidance_interval": (0.2, 1.0)}
    assert calls[1:] == [("continue_text", ["a"], given)]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("boat", "--output should end in an image format such as .png, found boat"),
        ("boat.txt", "found boat.txt"),
        ("nowhere/boat.png", "there is no folder"),
    ],
)
def test_a_bad_output_is_found_before_anything_is_loaded(calls, capsys, tmp_path, name, says):
    options = ["--checkpoint", "x", "--prompt", "a boat", "--output", str(tmp_path / name)]
    assert says in fails(capsys, "generate", "text_to_image", *options)
    assert calls == []


def test_a_file_that_is_no_image_is_named(calls, capsys, tmp_path):
    (tmp_path / "a.png").write_text("no image")
    options = ["--checkpoint", "x", "--image", str(tmp_path / "a.png")]
    assert "a.png should be an image file" in fails(capsys, "generate", "captioning", *options)
    options[-1] = str(tmp_path / "b.png")
    assert "b.png: No such file" in fails(capsys, "generate", "captioning", *options)


# ---- mistakes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["show", "task", "captionin"], "unknown task 'captionin'; did you mean captioning?"),
        (["show", "task", "some.module:Task"], "trust_remote_code=True"),
        (["show", "config", "nowhere"], "no configuration 'nowhere'"),
        (["train", "nowhere"], "no configuration 'nowhere'"),
    ],
)
def test_a_mistake_is_one_line(capsys, arguments, says):
    message = fails(capsys, *arguments)
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert says in message


def test_an_unknown_key_is_one_line(config, capsys):
    message = fails(capsys, "show", "config", config, "prior.witdh=3")
    assert message == (
        "error: the override prior.witdh=3: unknown key prior.witdh; did you mean prior.width?\n"
    )


def test_the_trace_is_shown_on_request(monkeypatch):
    monkeypatch.setenv("UNIFIED_DEBUG", "1")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        cli.main(["show", "config", "nowhere"])


@pytest.mark.parametrize("arguments", [["--help"], ["show", "config"], ["generate", "--help"]])
def test_help_and_configurations_need_no_torch(config, arguments):
    if arguments == ["show", "config"]:
        arguments = [*arguments, config]
    code = (
        "import sys\nfrom unified.cli import main\n"
        f"try: main({arguments!r})\n"
        "finally: assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
