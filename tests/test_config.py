"""Configurations: inheritance, overrides, and mistakes told in one sentence."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from unified.config import loading as configuring
from unified.config.loading import dump_config, load_config, save_config
from unified.config.plugins import resolve_model, resolve_plugins

BASE = """
modalities:
  text: {type: text}
  image: {type: image}
tasks:
  continuation: {type: continuation, source: prose, block: 8}
  captioning: {type: captioning, source: pairs}
data:
  sources:
    prose: {train: [a.tar]}
    pairs: {train: [b.tar], val: [c.tar]}
stages:
  - {name: text_vae, objective: autoencoder, modality: text, sources: {prose: 1}, steps: 5}
  - {name: joint, objective: joint, steps: 7, optimizer: {lr: 2e-4}}
"""


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return path


def child(base, text):
    path = base.with_name("child.yaml")
    path.write_text(f"extends: base.yaml\n{text}")
    return path


def fails(source, *overrides) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the callers compare the text
        load_config(source, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_round_trip(base, tmp_path):
    config = load_config(base, ["run.dir=1e5x", "training.trackers=['3e-4', 'no', '12']"])
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    assert config.training.trackers == ["3e-4", "no", "12"]
    assert config.tasks["continuation"].options == {"source": "prose", "block": 8}


@pytest.mark.parametrize(
    ("text", "value"),
    [("3e-4", 3e-4), ("3E4", 3e4), ("1.5e3", 1.5e3), (".5e-1", 0.05), ("-2e0", -2.0), ("7", 7.0)],
)
def test_numbers_read_as_one_writes_them(base, text, value):
    loaded = load_config(base, [f"stages.joint.loss.beta={text}", f"tasks.captioning.x={text}"])
    assert loaded.stages[1].loss.beta == value
    assert loaded.tasks["captioning"].options["x"] == value


def test_overrides_reach_list_items_by_index_and_by_name(base):
    config = load_config(base, ["stages.0.steps=10", "stages.joint.loss.modality.image=0.5"])
    assert [s.steps for s in config.stages] == [10, 7]
    assert config.stages[1].loss.modality == {"image": 0.5}
    assert "no item 'vae'; known: 0, 1, joint, text_vae" in fails(base, "stages.vae.steps=1")
    assert "did you mean joint?" in fails(base, "stages.jiont.steps=1")
    assert "no item '2'" in fails(base, "stages.2.steps=1")


@pytest.mark.parametrize("override", ["training.save_every", "=3", "", "run.dir.deeper=3"])
def test_a_malformed_override_is_quoted(base, override):
    assert override in fails(base, "run.dir=x", override)


def test_extends_merges_mappings_and_replaces_lists(base):
    path = child(
        base, "tasks: {continuation: {block: 4}}\ndata: {sources: {pairs: {train: [z.tar]}}}\n"
    )
    config = load_config(path)
    assert config.tasks["continuation"].options == {"source": "prose", "block": 4}
    assert config.data.sources["pairs"].train == ["z.tar"]
    assert config.data.sources["pairs"].val == ["c.tar"]


def test_null_takes_out_a_task_and_stays_a_value_elsewhere(base):
    path = child(base, "tasks: {captioning: null}\ndata: {sources: {pairs: null}}\n")
    config = load_config(path, ["training.ema=null", "modalities.image=null"])
    assert list(config.tasks) == ["continuation"]
    assert list(config.data.sources) == ["prose"]
    assert list(config.modalities) == ["text"]
    assert config.training.ema is None


def test_extends_finds_shipped_files_and_circles(base, tmp_path, monkeypatch):
    folder = tmp_path / "shipped"
    folder.mkdir()
    (folder / "quick.yaml").write_text(BASE)
    monkeypatch.setattr(configuring, "shipped", lambda: folder)
    path = tmp_path / "own.yaml"
    path.write_text("extends: quick\nrun: {seed: 3}\n")
    assert load_config(path).run.seed == 3
    assert load_config("quick") == load_config("quick.yaml")
    with pytest.raises(FileNotFoundError, match=r"no configuration 'quik'.*did you mean quick\?"):
        load_config("quik")
    path.write_text("extends: own2.yaml")
    path.with_name("own2.yaml").write_text("extends: own.yaml")
    assert "own.yaml -> own2.yaml -> own.yaml" in fails(path)
    path.write_text("extends: [a, b]")
    assert "extends is ['a', 'b']" in fails(path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("training: {precison: bf16}", "unknown key training.precison; did you mean training.prec"),
        ("training: {lr: 1}", "unknown key training.lr; did you mean stages.*.optimizer.lr?"),
        ("seed: 1", "unknown key seed; did you mean run.seed?"),
        ("trainin: {}", "unknown key trainin; did you mean training?"),
        ("data: {sources: {a: {tran: []}}}", "unknown key data.sources.a.tran; did you mean"),
        (
            "training: {save_every: often}",
            "training.save_every is 'often' but should be a valid int",
        ),
        (
            "training: {precision: fp8}",
            "training.precision is 'fp8' but should be 'auto', 'fp32' or 'bf16'",
        ),
        ("training: {save_every: 0}", "training.save_every is 0 but should be greater than 0"),
        ("tasks: {captioning: yes}", "tasks.captioning is True but should be a mapping"),
        ("tasks: {new: {source: x}}", "tasks.new.type is missing"),
    ],
)
def test_a_mistake_names_file_and_key(base, text, says):
    message = fails(child(base, text))
    assert message.startswith(f"{base.with_name('child.yaml')}: ")
    assert says in message


def test_a_mistake_names_who_wrote_it(base):
    assert fails(base, "stages.joint.step=3").startswith(
        "the override stages.joint.step=3: unknown"
    )
    assert fails(base, "stages.0={name: a, steps: x}").startswith("the override stages.0=")
    base.write_text(BASE + "flow: {wrong: 1}\n")
    assert fails(child(base, "run: {seed: 1}")).startswith(f"{base}: unknown key flow.wrong")


def test_stage_rules_are_kept(base):
    assert "batch_size 32 must be a multiple of accumulate 5" in fails(
        base, "stages.0.accumulate=5"
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "should hold a mapping of keys, found None"),
        ("- a", "should hold a mapping of keys"),
        ("run: {seed: 1}\nrun: {}", "line 2: the key run is written twice"),
        ("run: [", "line 1: "),
        ("run: !!python/object:os.system {}", "could not determine a constructor"),
    ],
)
def test_bad_yaml_is_told_in_one_line(tmp_path, text, says):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert re.search(f"{re.escape(str(path))}.*{re.escape(says)}", fails(path))


# ---- plugins -----------------------------------------------------------------------------------


def complaint(base, *overrides) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the callers compare the text
        resolve_plugins(load_config(base, overrides), source="base.yaml")
    return str(caught.value)


def test_parts_that_fit_are_accepted(base):
    config = load_config(base)
    resolve_plugins(config)
    assert resolve_model(config).tasks["continuation"].config.block == 8


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["modalities.image=null"], "task captioning names the modality 'image'"),
        (["tasks.captioning.source=pears"], "task captioning names the data source 'pears'"),
        (["tasks.captioning.source=pears"], "did you mean pairs?"),
        (["stages.0.modality=texts"], "stage text_vae names the modality 'texts'"),
        (["stages.0.sources={pros: 1}"], "stage text_vae names the data source 'pros'"),
        (["stages.0.sources={prose: 0}"], "stage text_vae has a zero-weight objective"),
        (["stages.1.loss.modality={sound: 1}"], "loss.modality names the modality 'sound'"),
        (["flow.timesteps.sound={}"], "flow.timesteps names the modality 'sound'"),
        (["tasks.captioning.ratio=-1"], "task captioning has ratio -1.0; it should be 0 or more"),
        (
            ["tasks.captioning.ratio=0", "tasks.continuation.ratio=0"],
            "stage joint has a zero-weight objective: no tasks with a ratio above 0",
        ),
        (
            ["tasks.captioning.instuction=x"],
            "base.yaml: unknown key tasks.captioning.instuction; did you mean"
            " tasks.captioning.instruction?",
        ),
        (["tasks.captioning.type=caption"], "unknown task 'caption'; did you mean captioning?"),
        (["tasks.continuation.block=x"], "tasks.continuation.block is 'x' but should be a valid"),
    ],
)
def test_parts_that_do_not_fit_are_named(base, overrides, says):
    assert says in complaint(base, *overrides)


def test_reading_a_configuration_needs_no_torch(base):
    code = (
        "import sys; from unified.config.loading import *; import unified, unified.config.plugins;"
        f"dump_config(load_config({str(base)!r})); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_dump_keeps_the_order_of_the_schema(base):
    text = dump_config(load_config(base))
    keys = [line.partition(":")[0] for line in text.splitlines() if re.match(r"\w+:", line)]
    assert keys[:4] == ["run", "modalities", "prior", "tasks"]
