"""A run folder as `unified runs show` reads it: in full, half-written, or not one at all."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from PIL import Image

from unified import cli
from unified.config.loading import dump_config
from unified.runs.curves import panels
from unified.runs.health import WINDOW, warnings
from unified.runs.history import read_run
from unified.runs.history_text import duration, show_runs, size
from unified.training.run import train


def line(stage: str, step: int, **values: Any) -> dict[str, Any]:
    return {"stage": stage, "step": step, **{k.replace("__", "/"): v for k, v in values.items()}}


def folder(path: Path, lines: list[dict[str, Any]], end: str = "", **changes: Any) -> Path:
    """A run folder with these lines of metrics, written by hand."""
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(dump_config(tiny.config(path, **changes)))
    text = "".join(json.dumps(x) + "\n" for x in lines)
    (path / "metrics.jsonl").write_text(text + end)
    return path


def losses(*values: float) -> list[dict[str, Any]]:
    return [line("text_vae", i, loss=v, seconds=2.0 * i) for i, v in enumerate(values, 1)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps, with checkpoints, validation and samples; one stage is cut short."""
    path = tmp_path_factory.mktemp("trained")
    shard = tiny.write_shard(path / "s.tar", tiny.squares())
    training = {**tiny.tree()["training"], "save_every": 2, "validate_every": 2, "sample_every": 2}
    told = tiny.config(
        path / "run",
        shard,
        training=training,
        stages=[tiny.autoencoder("text", steps=4), tiny.joint(steps=3)],
        data={"sources": {"s": {"train": [shard], "val": [shard]}}},
    )
    train(told)
    return path / "run"


def cli_output(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main(["runs", "show", *map(str, arguments)])
    printed = capsys.readouterr()
    assert end.value.code == 0, printed.err
    return printed.out


def complaint(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main(["runs", "show", *map(str, arguments)])
    assert end.value.code == 2
    return capsys.readouterr().err


# ---- a run that was trained ----------------------------------------------------------------------


def test_a_run_is_told_as_it_was(trained: Path) -> None:
    run = read_run(trained)
    assert (run.modalities, run.prior["width"]) == (["text", "image"], 16)
    from unified.pipeline import UnifiedPipeline

    prior = UnifiedPipeline.from_pretrained(trained / "final").prior
    assert run.prior_parameters == sum(p.numel() for p in prior.parameters())
    text, joint = run.stages
    assert [(s.name, s.done, s.planned, s.finished) for s in run.stages] == [
        ("text_vae", 4, 4, True),
        ("joint", 3, 3, True),
    ]
    assert text.samples == ["text_vae-2", "text_vae-4"]
    assert not text.checkpoints
    assert [c.step for c in joint.checkpoints] == [2, 3]
    state = json.loads((trained / "checkpoints" / "joint-3" / "state.json").read_text())
    assert joint.checkpoints[1].bytes == sum(file["size"] for file in state["files"].values())
    assert [c.step for c in joint.checkpoints if c.best] == [state["progress"]["best_step"]]
    assert {"loss", "loss/flow/text", "lr", "grad_norm", "val/loss"} <= joint.values.keys()


def test_it_is_printed_and_given_as_json(trained: Path, capsys: Any) -> None:
    printed = cli_output(capsys, trained)
    assert "text, image; continuation, captioning, text_to_image" in printed
    assert "text_vae  4 of 4 steps, finished, " in printed
    assert "  samples: joint-2, joint-3" in printed
    (told,) = json.loads(cli_output(capsys, trained, "--json"))
    run = read_run(trained)
    assert told["stages"][1]["values"]["lr"]["last"] == run.stages[1].values["lr"].last
    assert f"{run.stages[1].values['lr'].last:.4g}" in printed


def test_it_is_drawn(trained: Path, tmp_path: Path, capsys: Any) -> None:
    cli_output(capsys, trained, "--plot")
    one, two = (folder(tmp_path / name, losses(*range(60, 0, -1))) for name in "ab")
    cli_output(capsys, one, two, "--output", tmp_path / "both.png")
    for path in (trained / "curves.png", tmp_path / "both.png"):
        drawn = Image.open(path).convert("RGB")
        assert min(drawn.size) > 300
        colours = {pixel for _, pixel in drawn.getcolors(2**24) or ()}
        assert {(0x3B, 0x5B, 0xDB), (0xE8, 0x59, 0x0C)} <= colours
    with pytest.raises(SystemExit):
        cli.main(["runs", "show", str(one), "--output", str(tmp_path / "curves.gif2")])
    assert "error: " in capsys.readouterr().err


# ---- what is in the file -------------------------------------------------------------------------


def test_last_mean_and_lowest(tmp_path: Path) -> None:
    run = read_run(folder(tmp_path / "run", losses(*range(20, 5, -1), 7.0)))
    value = run.stages[0].values["loss"]
    assert (value.last, value.lowest, value.lowest_step) == (7.0, 6.0, 15)
    assert value.mean == sum([14, 13, 12, 11, 10, 9, 8, 7, 6, 7]) / 10
    assert run.stages[0].values["seconds"].last == 32.0


def test_every_number_is_shown_whatever_its_key(tmp_path: Path) -> None:
    new = line("joint", 1, data_wait=0.25, lr__vae=1e-4, bad=0, fill=0.9, note="x", gone=math.nan)
    path = folder(tmp_path / "run", [new])
    values = read_run(path).stages[2].values
    assert values.keys() == {"data_wait", "lr/vae", "bad", "fill"}
    printed = show_runs([read_run(path)])
    assert all(key in printed for key in values)


@pytest.mark.parametrize("end", ['{"stage": "joint", "st', "[1]\n", "\xff\n", '{"step": 3}\n'])
def test_a_line_that_is_none_is_passed_over(tmp_path: Path, end: str) -> None:
    run = read_run(folder(tmp_path / "run", losses(3, 2), end))
    assert run.curves == {"text_vae": {"loss": [(1, 3), (2, 2)], "seconds": [(1, 2), (2, 4)]}}


def test_a_run_without_metrics_yet(tmp_path: Path, capsys: Any) -> None:
    path = folder(tmp_path / "run", [])
    (path / "metrics.jsonl").unlink()
    assert "joint  0 of 2 steps" in cli_output(capsys, path)
    assert "there are no metrics to draw yet" in complaint(capsys, path, "--plot")


def test_a_cap_on_steps_is_the_plan(tmp_path: Path) -> None:
    training = {**tiny.tree()["training"], "max_steps": 1}
    assert read_run(folder(tmp_path / "run", [], training=training)).stages[0].planned == 1


def test_a_checkpoint_that_is_not_whole_is_none(tmp_path: Path) -> None:
    path = folder(tmp_path / "run", [])
    for step, size_ in ((2, 3), (4, 5)):
        here = path / "checkpoints" / f"joint-{step}"
        here.mkdir(parents=True)
        (here / "model.safetensors").write_bytes(b"abc")
        progress = {"step": step, "best_step": 2}
        state = {
            "stage": "joint",
            "progress": progress,
            "files": {"model.safetensors": {"size": size_}},
        }
        (here / "state.json").write_text(json.dumps(state))
    (found,) = read_run(path).stages[2].checkpoints
    assert (found.step, found.bytes, found.best) == (2, 3, True)


# ---- what is no run ------------------------------------------------------------------------------


def test_a_folder_that_is_no_run_names_one_that_is(tmp_path: Path, capsys: Any) -> None:
    path = folder(tmp_path / "outputs" / "first", [])
    (path / "final").mkdir()
    for asked, why in (
        (path.with_name("frist"), "is no folder"),
        (path.parent, "holds no run"),
        (path / "final", "holds no run"),
    ):
        message = complaint(capsys, asked)
        assert f"{asked} {why}" in message
        assert str(path) in message.partition(";")[2]


# ---- several -------------------------------------------------------------------------------------


def test_runs_are_compared_side_by_side(tmp_path: Path, capsys: Any) -> None:
    one = folder(tmp_path / "one", losses(3.0, 1.0))
    two = folder(tmp_path / "two", [*losses(5.0, 2.5), line("joint", 1, val__loss=7.25)])
    printed = cli_output(capsys, one, two)
    rows = {row.split()[0]: row.split()[1:] for row in printed.splitlines() if row.strip()}
    assert rows["loss"] == ["2", "3.75"]
    assert rows["val/loss"] == ["7.25"]
    assert f"[1] {one}" in printed
    both = json.loads(cli_output(capsys, one, two, "--json"))
    assert [run["path"] for run in both] == [str(one), str(two)]


def test_what_belongs_together_is_in_one_panel() -> None:
    keys = [
        "loss", "loss/flow/text", "loss/text", "lr", "lr/vae", "seconds", "fill", "val/loss",
        "val/flow/text", "val/captioning/flow/text", "val/text", "val/new",
    ]  # fmt: skip
    assert panels([{key: [(1, 1.0)] for key in keys}]) == {
        "loss": ["loss", "val/loss"],
        "flow/text": ["loss/flow/text", "val/flow/text", "val/captioning/flow/text"],
        "text": ["loss/text", "val/text"],
        "lr": ["lr", "lr/vae"],
        "fill": ["fill"],
        "new": ["val/new"],
    }


# ---- warnings ------------------------------------------------------------------------------------


def noisy(values: list[float], noise: float) -> list[float]:
    """`values` with a deterministic noise on them."""
    return [v + noise * math.sin(12.9898 * i * i) for i, v in enumerate(values)]


FALLING = [5 * math.exp(-i / 30) for i in range(200)]


@pytest.mark.parametrize(
    ("curves", "says"),
    [
        ({"loss": noisy(FALLING, 0.3)}, None),
        ({"loss": noisy([1.0] * 200, 0.3)}, None),
        ({"loss": noisy([-x for x in FALLING[::-1]], 0.01)}, None),
        ({"loss": noisy(FALLING + [0.02 * i for i in range(100)], 0.3)}, "loss rises"),
        ({"loss": [1.0] * (WINDOW * 3) + [9.0] * WINDOW}, "loss rises: 1 at its lowest, 9 now"),
        ({"loss": [1.0, 9.0]}, None),
        ({"val/loss": [2.0, 1.0, 0.7, 0.6, 0.61]}, None),
        ({"val/loss": [2.0, 1.0, 0.7, 0.6, 0.8, 1.1]}, "val/loss rises: 0.6 at its lowest"),
        ({"grad_norm": noisy([1.0] * 100, 0.5)}, None),
        ({"grad_norm": [9.0] * 10 + [1.0] * 100}, None),
        ({"grad_norm": [1.0] * 100 + [8.0] * 9}, "grad_norm blows up: 1 as a rule, 8 now"),
        ({}, None),
    ],
)
def test_only_what_is_plainly_wrong_is_warned_of(curves: Any, says: str | None) -> None:
    found = warnings(curves)
    assert [says in text for text in found] == [True] if says else not found


def test_a_warning_is_printed(tmp_path: Path) -> None:
    rising = losses(*[3.0] * 20, *[30.0] * 20)
    printed = show_runs([read_run(folder(tmp_path / "run", rising))])
    assert "  warning: loss rises: 3 at its lowest, 30 now" in printed


# ---- formatting, imports -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0 s"), (59.6, "1 min 0 s"), (524, "8 min 44 s"), (7505, "2 h 5 min"), (1e5, "1 d 3 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(12, "12 B"), (1234, "1.23 kB"), (5e9, "5 GB"), (3e12, "3 TB")]
)
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text


def test_reading_a_run_needs_no_torch(tmp_path: Path) -> None:
    path = folder(tmp_path / "run", losses(2, 1))
    code = (
        f"import sys; from unified.cli import main\ntry: main(['runs', 'show', {str(path)!r}])\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
