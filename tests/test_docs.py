"""What the documentation says is so: links lead somewhere, drawings are drawn, examples run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from unified.config.loading import load_config
from unified.config.schema import Config
from unified.data.shards import read_shards
from unified.pipeline import UnifiedPipeline
from unified.planning.describe import find_task, parse_lengths, shortened, show_task, task_layout
from unified.training.run import train

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text("utf-8"))
    assert not [link for link in links if not (page.parent / link).exists()]


def test_every_decision_is_in_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text("utf-8")
    written = sorted(path.name for path in (ROOT / "docs" / "decisions").glob("*.md"))
    assert re.findall(r"\(decisions/(.+?)\)", index)[-len(written) :] == written


@pytest.mark.parametrize(
    ("name", "lengths"), [("infilling:Infilling", "B=2,A=2,C=4"), ("editing", "")]
)
def test_the_tasks_of_the_page_are_shown_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, lengths: str
) -> None:
    (tmp_path / "infilling.py").write_text(block("add_a_task.md", "python", "`infilling.py`:"))
    monkeypatch.syspath_prepend(str(tmp_path))
    task = find_task(name, trust_remote_code=True)
    layout = shortened(task.layout, 2)
    shown = show_task(layout, parse_lengths(lengths, layout), task=task)
    assert f"\n{shown}\n```" in (ROOT / "docs" / "add_a_task.md").read_text("utf-8")


@pytest.mark.parametrize("task", ["continuation", "text_to_image", "captioning"])
def test_the_drawings_are_those_of_the_tables(task: str) -> None:
    layout = task_layout(task, block=2)
    drawing = show_task(layout, parse_lengths("", layout)).partition("\n\n")[0]
    shown = "\n".join(f"    {line}" for line in drawing.splitlines())
    assert shown in (ROOT / "docs" / "architecture.md").read_text("utf-8")


def block(page: str, language: str, after: str) -> str:
    """The first code block of a language after a phrase."""
    text = (ROOT / "docs" / page).read_text("utf-8").partition(after)[2]
    found = re.search(rf"```{language}\n(.*?)```", text, re.DOTALL)
    assert found is not None
    return found[1]


@pytest.mark.slow
def test_the_modality_and_the_task_of_the_examples_train(tmp_path: Path) -> None:
    page = "add_a_modality.md"
    (tmp_path / "tone.py").write_text(block(page, "python", "`tone.py`:"))
    (tmp_path / "tone.yaml").write_text(block(page, "yaml", "`tone.yaml`:"))
    (tmp_path / "infilling.py").write_text(block("add_a_task.md", "python", "`infilling.py`:"))
    run = {"cwd": tmp_path, "check": True}
    subprocess.run([sys.executable, "-c", block(page, "python", "`make_tones.py`")], **run)
    infilling = ["tasks.infilling.type=infilling:Infilling", "tasks.infilling.source=tones"]
    command = ["-m", "unified.cli", "train", "tone.yaml", "--trust-remote-code"]
    short = ["training.max_steps=1", "training.trackers=[]"]
    subprocess.run([sys.executable, *command, *short, *infilling], **run)
    use = block(page, "python", "(`PYTHONPATH=.`). Then:") + "assert len(tone) == 128\n"
    subprocess.run([sys.executable, "-c", use], **run)
    (tmp_path / "sounds").mkdir()
    (tmp_path / "sounds" / "a.f32").write_bytes(bytes(4 * 256))
    (tmp_path / "sounds" / "a.txt").write_text("silence")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for line in block(page, "bash", "A folder of tones").splitlines():
        words = shlex.split(line.partition("#")[0].removeprefix("PYTHONPATH=. unified"))
        command = [sys.executable, "-m", "unified.cli", *words]
        subprocess.run(command, **run, env=environment, stdout=subprocess.DEVNULL)
    assert len(read_shards(str(tmp_path / "shards" / "train-00000.tar"))) == 1
    assert (tmp_path / "a.f32").read_bytes()


def test_the_path_the_optimizer_and_the_metric_of_the_examples_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs" / "training.md").read_text("utf-8")
    for name in ("late", "lion", "repeats"):
        code = page.partition(f"```python\n# {name}.py\n")[2].partition("```")[0]
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    tiny.write_shard(tmp_path / "squares.tar", tiny.squares())
    tree = tiny.tree(tmp_path / "run", str(tmp_path / "squares.tar"), flow={"path": "late:Late"})
    tree["stages"] = [tiny.joint(row_length=128, optimizer={"type": "lion:Lion", "lr": 3e-4})]
    tree["training"] |= {"metrics": ["repeats:repeats"], "validate_every": 1}
    final = train(Config.model_validate(tree), trust_remote_code=True)
    assert '"val/repeats": ' in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert type(UnifiedPipeline.from_pretrained(final, True).path).__name__ == "Late"


def test_the_configuration_of_the_readme_is_one(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    found = re.search(r"```yaml\n(# mine.yaml.*?)```", text, re.DOTALL)
    assert found is not None
    (tmp_path / "mine.yaml").write_text(found[1])
    assert list(load_config(tmp_path / "mine.yaml").data.sources) == ["prose", "pairs"]
