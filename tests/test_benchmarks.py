"""The benchmarks run at tiny sizes, and count FLOPs as PyTorch does. No time is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import scripts
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode

from unified.config.loading import save_config
from unified.demos.emoji import STYLES
from unified.modalities.text.vae import TextVAE
from unified.modalities.text.vae_config import TextVAEConfig
from unified.model.kernels.linear import COUNTED

reference, generation = scripts.load("reference"), scripts.load("generation")
machine, scaling = scripts.load("machine"), scripts.load("scaling")

BRIEF = ["--matmul-seconds", "0", "--repeats", "1"]
TINY = ["--size", "tiny"]
LIMIT = {"matmul_gflops_before", "matmul_gflops_after"}
MEMORY = {"peak_rss_gb", "rss_above_gb"}
GENERATION = {"tokens_per_s", "share", "first_block_s", "gflop", *LIMIT, *MEMORY}
TRAINING = {"s_per_step", "positions_per_s", "tokens_per_s", "share", "gflop", *LIMIT, *MEMORY}
JOINT = {"what", "batch", "per_item_s", "share", "gflop", *LIMIT, *MEMORY}
TEXTS = ["--batch", "2", "--prompt", "6", "--new", "7", "--steps", "2"]
LOADING = ["--generate", "16", "--side", "32", "--pixels", "32", "--batch", "4"]

#: script, its arguments, how many rows it gives and what is in the last one
CASES: list[tuple[str, list[str], int, set[str]]] = [
    ("machine", ["--seconds", "0"], 1, {"matmul_gflops"}),
    ("reference", TINY, 2, {"part", "parameters"}),
    ("generation", [*TINY, *BRIEF, *TEXTS, "--check"], 1, {*GENERATION, "tokens_checked"}),
    ("generation", [*TINY, *BRIEF, *TEXTS, "--dtype", "bf16"], 1, GENERATION),
    ("train_step", [*TINY, *BRIEF, "--seqlen", "8", "--accumulate", "2"], 1, TRAINING),
    ("train_step", [*TINY, *BRIEF, "--seqlen", "8", "--dtype", "bf16"], 1, TRAINING),
    ("joint", [*TINY, *BRIEF, "--batches", "2", "--new", "3"], 4, JOINT),
    ("joint", [*TINY, *BRIEF, "--only", "trained", "--dtype", "bf16"], 1, JOINT),
    (
        "attention",
        [*TINY, *BRIEF, "--positions", "64", "--lengths", "32", "--backends", "sdpa", "halves"],
        2,
        {"backend", "length", "rows", "forward_ms", "forward_share", "step_ms", "step_share"},
    ),
    (
        "data_loading",
        [*LOADING, "--examples", "8", "--repeats", "1", "--workers", "0"],
        1,
        {"workers", "mixture_per_s", "webdataset_per_s", "ratio"},
    ),
    (
        "startup",
        [*TINY, "--repeats", "1", "--only", "import unified"],
        1,
        {"what", "best_s", "median_s"},
    ),
    ("scaling", [*TINY, *BRIEF], 8, {"what", "x", "seconds", "share", "exponent"}),
]


def run(name: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> Any:
    scripts.load(name).main([*arguments, "--json"])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(("name", "arguments", "rows", "keys"), CASES)
def test_each_gives_its_figures(name, arguments, rows, keys, capsys):
    found = run(name, arguments, capsys)
    assert {"threads", "torch", "cpu"} <= found["machine"].keys()
    assert len(found["rows"]) == rows
    assert keys <= found["rows"][-1].keys()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments", "keys"),
    [
        ("memory", [*TINY, "--batch", "1", "--seqlen", "8", "--only", "training fp32"], MEMORY),
        ("startup", [*TINY, "--repeats", "1"], {"best_s"}),
        ("attention", [*TINY, *BRIEF, "--positions", "64", "--lengths", "32"], {"forward_ms"}),
        ("generation", [*TINY, *BRIEF, *TEXTS, "--compile"], GENERATION),
    ],
)
def test_what_starts_processes_or_compiles(name, arguments, keys, capsys):
    assert all(keys <= row.keys() for row in run(name, arguments, capsys)["rows"])


def test_a_table_has_a_line_on_the_machine(capsys):
    scripts.load("machine").main(["--seconds", "0"])
    first, _, head, rule, row = capsys.readouterr().out.splitlines()
    assert first.startswith("threads ")
    assert head.count("|") == rule.count("|") == row.count("|") == 2


# ---- shortcuts ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def emoji_model(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A tiny model and the configuration of its data: squares that are called emoji."""
    folder = tmp_path_factory.mktemp("emoji")
    members = []
    for i in range(20):
        told = {"name": f"square {i // 2}", "style": STYLES[i % 2]}
        members += [
            (f"{i:02}.png", tiny.as_png(tiny.square(tiny.CAPTIONS[i % len(tiny.CAPTIONS)]))),
            (f"{i:02}.txt", f"a {told['style']} emoji of {told['name']}".encode()),
            (f"{i:02}.json", json.dumps(told).encode()),
        ]
    shard = [tiny.write_shard(folder / "emoji.tar", members)]
    config = tiny.config(data={"sources": {"s": {"train": shard, "val": shard}}})
    save_config(config, folder / "config.yaml")
    pipeline = tiny.pipeline(config)
    tiny.randomise(pipeline.prior)
    pipeline.save_pretrained(folder / "model")
    return [str(folder / "model"), "--config", str(folder / "config.yaml")]


def test_shortcuts_are_set_beside_the_models_own_settings(emoji_model, capsys):
    brief = ["--count", "2", "--repeats", "1", "--fine-steps", "8", "--setting", "num_steps=1"]
    rows = run("shortcuts", [*emoji_model, *brief], capsys)["rows"]
    assert [row["task"] for row in rows[::2]] == ["text_to_image", "captioning", "continuation"]
    for own, coarse in zip(rows[::2], rows[1::2], strict=True):
        assert (own["time"], own["positions"]) == (1, 1)
        assert coarse["positions"] == pytest.approx(1 / 4)
        assert 0 < own["distance"] < coarse["distance"]
        assert all(own[key] == 0 for key in own if key.endswith((" change", " low", " high")))
    assert {"style", "retrieved"} <= rows[0].keys()
    assert {"style", "name distance", "text distance"} <= rows[2].keys()
    scripts.load("shortcuts").main([*emoji_model, *brief])
    *_, head, _, own, coarse = capsys.readouterr().out.splitlines()
    assert "| captioning: name distance |" in head
    assert "| 1.000 / 1.000 / 1.000 |" in own
    assert "| num_steps=1 |" in coarse


def test_a_shortcut_that_makes_no_sense_is_named(emoji_model):
    with pytest.raises(ValueError, match=r"settle is 3"):
        scripts.load("shortcuts").main([*emoji_model, "--setting", "settle=3"])


# ---- what is counted ----------------------------------------------------------------------------


def counted(run: Any) -> int:
    """FLOPs by PyTorch's counter, with attention as the products it is made of."""
    counter = FlopCounterMode(display=False, custom_mapping=COUNTED)
    with counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("act", ["swiglu", "gelu"])
@pytest.mark.parametrize("patch", [1, 2])
def test_flops_of_the_text_vae(act: str, patch: int):
    """Everything sees everything: a block as long as the text."""
    length = 8
    config = TextVAEConfig(
        vocab_size=50, dim=12, ffn_dim=20, num_heads=2, latent_dim=4, patch_size=patch,
        encoder_num_blocks=2, decoder_num_blocks=3, block_size=length, act=act,
    )  # fmt: skip
    vae, pairs = TextVAE(config), reference.causal_pairs(length, length)
    assert pairs == length**2
    ids, z = torch.zeros(1, length * patch, dtype=torch.int64), torch.zeros(1, length, 4)
    encoder = reference.encoder_flops(config, length, pairs)
    decoder = reference.decoder_flops(config, length, pairs, length)
    assert encoder == counted(lambda: vae.encoder(ids))
    assert decoder == counted(lambda: vae.decoder(z))


@pytest.mark.parametrize(("length", "block"), [(12, 4), (13, 4), (3, 4), (7, 1)])
def test_pairs_of_causal_blocks(length: int, block: int):
    at = torch.arange(length) // block
    assert reference.causal_pairs(length, block) == int((at[:, None] >= at).sum())


@pytest.mark.parametrize("guidance", [1.0, 7.0])
def test_flops_of_generation(guidance: float):
    """One block after a prompt within it: only the unconditional copy hides anything, and the text
    VAE's future, which PyTorch counts. The path may share modulation between steps, or not."""
    model = reference.build("tiny")
    block, known, steps = reference.SIZES["tiny"]["block"], 1, 3
    options = {"num_steps": steps, "guidance_scale": guidance}
    run = generation.Generation(model, 2, known, block - known, **options)
    prior, text = model.prior.config, model.modalities["text"].config
    pairs = 2 * block**2 if guidance != 1 else 0
    hidden = 2 * steps * 4 * prior.single_stream_depth * prior.heads * prior.head_dim * pairs
    future = block**2 - reference.causal_pairs(block)
    hidden += 2 * 4 * text.decoder_num_blocks * text.dim * future
    assert counted(run) == pytest.approx(run.flops + hidden, rel=0.1)


def test_the_reference_answers():
    """Gates are open: what is generated depends on the prompt."""
    model = reference.build("tiny")
    run = generation.Generation(model, 2, 8, 8, num_steps=2)
    (first, second), _ = run()
    assert len(first) == len(second) == 8
    assert first != second
    assert len(set(first)) > 1


def test_the_check_finds_another_token(monkeypatch: pytest.MonkeyPatch):
    run = generation.Generation(reference.build("tiny"), 1, 5, 6, num_steps=2)
    assert generation.check(run) == 6
    slow = run.plainly()
    monkeypatch.setattr(run, "plainly", lambda: [[slow[0][0] + 1, *slow[0][1:]]])
    with pytest.raises(ValueError, match=r"other tokens .* prompts \[0\]"):
        generation.check(run)


def test_the_exponent_is_that_of_a_power():
    x = [1.0, 2.0, 4.0, 8.0]
    assert scaling.exponent(x, [3 * v**1.5 for v in x]) == pytest.approx(1.5)


# ---- a step as a whole --------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "options", "keys"),
    [
        ("host", ["--steps", "2", "--warmup", "1"], {"main_us_per_example", "tensors_per_step"}),
        ("device", ["--seconds", "0.1", "--workers", "0", "--json"], {"ms", "kernels", "gb"}),
    ],
)
def test_steps_are_measured_by_stage(script: str, options: list[str], keys: set[str]) -> None:
    command = [sys.executable, str(scripts.FOLDER / f"{script}.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = json.loads(done.stdout)["stages"]
    assert [row["stage"] for row in rows] == ["text_vae", "image_vae", "joint"]
    assert all(keys <= row.keys() for row in rows)
    if script == "host":
        assert all(row["tensors_per_step"] <= 30 for row in rows)


# ---- frames -------------------------------------------------------------------------------------


def test_calls_stay_shallow_and_functions_short(tmp_path):
    """From `text_to_image` to the prior, and in the lengths of all functions."""
    frames = scripts.load("frames")
    found = frames.generating(frames.tiny(tmp_path))
    assert found[0].endswith("text_to_image")
    assert found[-1] == "unified/model/prior.py:Prior.forward"
    assert len(found) <= 8, "\n".join(found)
    lengths = frames.functions()
    assert lengths[len(lengths) // 10][0] <= 25
    assert lengths[0][0] <= 60, lengths[0]


@pytest.mark.slow
def test_the_depth_of_training_is_counted(capsys):
    generate, train, functions = run("frames", [], capsys)["rows"]
    assert generate["frames"] == len(generate["list"]) <= 8
    assert train["list"][0] == "unified/cli.py:main"
    assert train["list"][-1] == "unified/flow/matching.py:FlowMatching.loss"
    assert train["frames"] == len(train["list"]) <= 8
    assert functions["nine_in_ten"] <= functions["longest"] <= 60
