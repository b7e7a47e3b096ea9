"""Names resolve to plugin classes, and only trusted paths to code are followed."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import tiny

import unified
from unified.config import plugins, registry
from unified.config.registry import SHIPPED, resolve
from unified.training.run import train


@pytest.mark.parametrize(("group", "name"), [(g, n) for g, table in SHIPPED.items() for n in table])
def test_every_shipped_name_leads_to_one_of_its_group(group, name):
    from unified.flow.path import Path
    from unified.latents.modality import Modality
    from unified.sequence.task import Task

    bases = {"modality": Modality, "task": Task, "path": Path}
    found = resolve(group, name)
    assert callable(found) if group == "optimizer" else issubclass(found, bases[group])


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(ValueError, match="unknown task 'captionning'; did you mean captioning"):
        resolve("task", "captionning")
    with pytest.raises(ValueError, match="unknown modality 'smell'; known: image, text"):
        resolve("modality", "smell")


def test_a_path_to_code_is_followed_only_when_trusted():
    path = "unified.tasks.captioning:Captioning"
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        resolve("task", path)
    assert resolve("task", path, trust_remote_code=True) is resolve("task", "captioning")


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("nowhere.at_all:Thing", "cannot be found"),
        ("unified.tasks.captioning:Thing", "has no 'Thing'"),
        ("json:dumps", "should be a class with a Config"),
    ],
)
def test_a_path_that_leads_to_no_plugin_says_so(path, why):
    with pytest.raises(ValueError, match=why):
        resolve("task", path, trust_remote_code=True)


def test_a_missing_dependency_of_a_plugin_is_not_taken_for_a_missing_plugin(tmp_path, monkeypatch):
    (tmp_path / "needy_plugin.py").write_text("import a_library_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_library_that_is_not_there"):
        resolve("task", "needy_plugin:Thing", trust_remote_code=True)


def test_installed_packages_add_names_but_cannot_replace_shipped_ones(monkeypatch):
    installed = [
        EntryPoint("dialogue", "unified.tasks.continuation:Continuation", "unified.tasks"),
        EntryPoint("captioning", "unified.tasks.continuation:Continuation", "unified.tasks"),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: installed)
    assert resolve("task", "dialogue").__name__ == "Continuation"
    assert resolve("task", "captioning").__name__ == "Captioning"


def test_trust_is_asked_where_something_is_loaded_and_nowhere_else():
    """Every other file takes the `Plugins` that were found there."""
    asks = {
        "cli.py",
        "config/plugins.py",
        "config/registry.py",
        "data/tools/check.py",
        "pipeline.py",
        "planning/describe.py",
        "planning/draft.py",
        "training/export.py",
        "training/run.py",
    }
    root = Path(unified.__file__).parent
    found = {
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        if "trust_remote_code" in path.read_text() and "commands" not in path.parts
    }
    assert found <= asks


def test_a_run_resolves_each_plugin_once(tmp_path, monkeypatch):
    asked = []

    def counted(group, name, trust_remote_code):
        asked.append((group, name))
        return resolve(group, name, trust_remote_code)

    monkeypatch.setattr(plugins, "resolve", counted)
    shard = tiny.write_shard(tmp_path / "s.tar", tiny.squares())
    config = tiny.config(tmp_path / "run", shard)
    config.training.max_steps = 0
    train(config)
    parts = {"modality": config.modalities, "task": config.tasks}
    assert asked == [
        *((group, part.type) for group, named in parts.items() for part in named.values()),
        ("path", config.flow.path),
        *(("optimizer", stage.optimizer.type) for stage in config.stages),
    ]
