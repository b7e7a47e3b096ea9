"""Planning without the machine: the formula against PyTorch's counter, the fake tensors against
real ones, and what the command says."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import scripts
import tiny
import torch
import yaml
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from unified import cli
from unified.config.plugins import resolve_model, resolve_plugins
from unified.config.schema import PriorConfig
from unified.flow.matching import FlowMatching
from unified.latents.ragged import Ragged
from unified.modalities.text.modality import TextConfig
from unified.model.prior import Prior
from unified.planning import flops, imagined
from unified.planning.draft import Draft, make_plan
from unified.planning.figures import PlanRequest
from unified.planning.gpus import GPUS, find_gpu
from unified.planning.memory import forward_only, imagined_step
from unified.planning.typical import Sizes, positions, typical
from unified.randomness import Chance
from unified.sequence.layout import Layout, Segment
from unified.sequence.packing import PackedBatch, Sample, pack
from unified.sequence.visibility import ALL, Visibility
from unified.training.objectives.joint import JointBatch

CHANNELS = {"text": 16, "image": 64}
PRIOR = PriorConfig(
    width=48, heads=2, head_dim=32, rope_dim=24, multi_stream_depth=2, single_stream_depth=3
)
#: everything sees everything, and nothing is padded
OPEN = Layout(
    (Segment("T", "text", noise="segment"), Segment("I", "image", noise="segment")),
    {"T": {"T": ALL, "I": ALL}, "I": {"T": ALL, "I": ALL}},
)
GRIDS = {"T": (40,), "I": (6, 4)}


def counted(run: Callable[[], object]) -> int:
    """PyTorch's count, with attention as matrix products, which it counts in full."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def batch_of(layout: Layout, grids: Any, samples: int = 1, training: bool = True) -> PackedBatch:
    """In rows as training has them: packing knows where everything is seen."""
    given = [Sample("", grids)] * samples
    batch = pack(given, {"": layout}, Visibility({"": layout.sees}), None, 3, training)
    latents = {m: torch.randn(len(where), CHANNELS[m]) for m, where in batch.where.items()}
    return replace(batch, latents=latents)


def at_times(batch: PackedBatch) -> PackedBatch:
    """Every modality at a timestep of its own."""
    for number, where in enumerate(batch.where.values()):
        batch.time_RL.view(-1)[where] = (1 + number) / 4
    return batch


# ---- the formula ---------------------------------------------------------------------------------


def test_the_prior_s_forward_pass_is_what_pytorch_counts():
    prior, batch = Prior(PRIOR, CHANNELS), at_times(batch_of(OPEN, GRIDS, samples=2))
    found = flops.batch_flops(PRIOR, CHANNELS, at_times(batch_of(OPEN, GRIDS)))
    one = counted(lambda: prior(at_times(batch_of(OPEN, GRIDS))))
    assert found == one
    assert found == flops.layout_flops(PRIOR, CHANNELS, OPEN, GRIDS)
    modulation = flops.prior_flops(PRIOR, CHANNELS, {"text": 0, "image": 0}, 0, 2)
    assert counted(lambda: prior(batch)) == 2 * found - modulation  # timesteps are shared


def test_training_the_prior_costs_three_times_as_much():
    """All but the gradients of what comes in: latents and sinusoids."""
    prior, batch = Prior(PRIOR, CHANNELS), at_times(batch_of(OPEN, GRIDS))
    forward = flops.batch_flops(PRIOR, CHANNELS, batch)
    total = counted(lambda: sum(v.sum() for v in prior(batch).values()).backward())
    inputs = sum(CHANNELS[m] * len(where) for m, where in batch.where.items())
    inputs += flops.SINUSOID_WIDTH * 2
    assert total == flops.TRAINING * forward - 2 * PRIOR.width * inputs


def test_a_modality_that_is_absent_costs_nothing():
    text = OPEN.only({"T"})
    batch = at_times(batch_of(text, {"T": (40,)}))
    prior = Prior(PRIOR, CHANNELS)
    assert flops.batch_flops(PRIOR, CHANNELS, batch) == counted(lambda: prior(batch))


@pytest.mark.parametrize("name", ["continuation", "captioning", "text_to_image"])
def test_visible_pairs_are_those_of_the_grid(name):
    layout = resolve_model(tiny.config()).tasks[name].layout
    lengths = {s.kind: 5 if s.block is None else 12 for s in layout.filled}
    batch = batch_of(layout, {kind: (n,) for kind, n in lengths.items()}, 3, training=False)
    _, _, visible = layout.grid(lengths)
    assert flops.visible_pairs(batch) == 3 * sum(map(sum, visible))


def test_visible_pairs_of_a_corrupted_batch_are_those_of_its_mask():
    """Also where noisy blocks were relabelled U, samples share a row, and rows have padding."""
    tasks = resolve_model(tiny.config()).tasks
    layouts = {name: task.layout for name, task in tasks.items()}
    grids = {"P": (3,), "I": (2, 2), "C": (8,)}
    samples = [
        Sample(name, {s.kind: grids[s.kind] for s in layouts[name].filled})
        for name in (*tasks, *tasks)
    ]
    visibility = Visibility({name: layout.sees for name, layout in layouts.items()})
    batch = pack(samples, layouts, visibility, 48, 3)
    flow = FlowMatching(tiny.config().flow, layouts)
    channels = dict.fromkeys(batch.where, 4)
    latents = {m: torch.zeros(len(where), 4) for m, where in batch.where.items()}
    batch = flow.keep_beginnings(replace(batch, latents=latents), Chance(0))
    noisy, _ = flow.corrupt(batch, flow.draw(batch, Chance(0), channels))
    assert flops.visible_pairs(noisy) == int(noisy.visibility.dense(noisy.coordinates).sum())
    assert flops.timesteps(batch) == len(noisy.time_RL.unique())


# ---- fake tensors --------------------------------------------------------------------------------


def modality(name: str, **options: Any) -> Any:
    part = {"text": tiny.TEXT, "image": tiny.IMAGE}[name]
    config = tiny.config(modalities={name: part | options}, tasks={})
    cls, settings = resolve_model(config).modalities[name]
    with torch.device("meta"):
        return cls.build(settings, None)


def test_the_text_vae_s_flops_are_those_of_its_matrices():
    text = modality("text")
    config: TextConfig = text.config
    imagined.imagine(text)
    blank = imagined.observation(text, (24,))
    assert tuple(blank.shape) == (24,)
    dim, ffn, length = config.dim, config.ffn_dim, len(blank)
    block = 4 * dim * dim + dim * ffn + ffn // 2 * dim
    weights = config.patch_size * dim * dim + block + dim * 2 * config.latent_dim
    attention = 4 * dim * length * (length + 1) // 2
    found = imagined.forward_flops(lambda: text.encode(Ragged.of([blank])))
    assert found == 2 * length * weights + attention


def test_the_image_vae_s_flops_are_what_pytorch_counts():
    real = tiny.pipeline().modalities["image"]
    fake = modality("image")
    imagined.imagine(fake)
    blank = imagined.observation(fake, (2, 2))
    assert tuple(blank.shape) == (3, tiny.SIDE, tiny.SIDE)
    expected = counted(lambda: real.encode(Ragged.of([blank])))
    assert imagined.forward_flops(lambda: fake.encode(Ragged.of([blank]))) == expected > 0


class Chain(nn.Module):
    """Five linear layers, each of which keeps its input for the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.sin(layer(x))
        return x


def test_the_ledger_knows_what_is_alive_and_the_most_there_was():
    chain, x = Chain(), torch.randn(3, 8)
    imagined.imagine(chain)
    ledger = imagined.Ledger()
    ledger.ignore([x, *chain.parameters()])
    with ledger:
        y = chain(x)
        assert ledger.alive == 10 * x.nbytes
        del y  # and the graph with it
        assert ledger.alive == 0
        with torch.no_grad():
            chain(x)
    assert ledger.peak == 10 * x.nbytes


def draft(**changes: Any) -> Draft:
    config = tiny.config(**changes)
    return Draft(
        config, config.stages[-1], PlanRequest(GPUS["h100"]), "fp32", resolve_plugins(config)
    )


def collated(of: Draft, task: str) -> JointBatch:
    """A microbatch of one task, run once: what a first pass makes and keeps is no activation."""
    batch = of.objective.collate(of.microbatch(task), 0)
    forward_only(of.objective, batch, "fp32")
    return batch


def test_checkpointing_keeps_a_block_s_input_and_no_more():
    deep = {"prior": tiny.PRIOR | {"single_stream_depth": 6}}
    of = draft(**deep)
    batch = collated(of, "captioning")
    whole = imagined_step(of.objective, batch, "fp32")
    imagined.recompute(of.prior)
    less = imagined_step(of.objective, batch, "fp32")
    rows, length = batch.rows.shape
    inputs = rows * length * of.config.prior.width * 4
    shallow = draft(prior=tiny.PRIOR | {"single_stream_depth": 5})
    imagined.recompute(shallow.prior)
    batch = collated(shallow, "captioning")
    assert less.saved - imagined_step(shallow.objective, batch, "fp32").saved == inputs
    assert less.saved < whole.saved
    assert less.peak < whole.peak


def test_the_cpu_keeps_a_mask_for_every_block():
    of = draft(prior=tiny.PRIOR | {"single_stream_depth": 3})
    batch = collated(of, "continuation")
    without, kept = (
        imagined_step(of.objective, batch, "fp32", keeps_mask=k) for k in (False, True)
    )
    rows, length = batch.rows.shape
    assert kept.saved - without.saved == 3 * rows * length**2 * 4


@pytest.mark.slow
def test_the_memory_model_is_within_15_percent_of_what_training_takes():
    (row,) = scripts.load("memory_model").in_processes(["small"], [])
    assert row["ratio"] == pytest.approx(1, abs=0.15)


# ---- examples ------------------------------------------------------------------------------------


def grids_of(name: str, row_length: int = 256, **asked: Any) -> Any:
    task, modalities = resolve_model(tiny.config()).tasks[name], tiny.pipeline().modalities
    return task, typical(task, modalities, Sizes(**asked), row_length, name)


def test_a_text_has_its_task_s_limit_or_what_was_asked_for_or_what_fits():
    assert grids_of("continuation", text_tokens=8)[1] == {"C": (128,)}
    asked = grids_of("captioning", text_tokens=7)[1]
    assert asked == {"P": (5,), "I": (2, 2), "C": (8,)}  # 19 characters; whole blocks of 4
    task, fitted = grids_of("captioning", row_length=64)
    assert fitted["C"] == (24,)
    assert positions(task, fitted) == 5 + 4 + 2 * 24


def test_any_modality_has_a_size_by_its_name():
    assert grids_of("captioning", named={"image": 8, "text": 7}, row_length=64)[1]["I"] == (1, 1)
    by_name, by_unit = (grids_of("captioning", **asked)[1] for asked in (
        {"named": {"text": 7}}, {"text_tokens": 7},
    ))  # fmt: skip
    assert by_name == by_unit
    with pytest.raises(ValueError, match=r"--size names the modality 'txt', .* did you mean text"):
        grids_of("captioning", named={"txt": 7})
    with pytest.raises(ValueError, match="--size text should be 1 or more, found 0"):
        grids_of("captioning", named={"text": 0})


def test_an_edited_picture_is_planned_with_its_source():
    settings = tiny.config(tasks={"editing": {"type": "editing", "source": "s"}})
    plan = make_plan(settings, PlanRequest(GPUS["h100"], sizes=Sizes(image_size=8, text_tokens=6)))
    assert plan.examples["editing"].grids == {"S": (1, 1), "P": (6,), "I": (1, 1)}
    assert plan.examples["editing"].positions == 8
    assert plan.throughput["image"].items == pytest.approx(2 * plan.examples_per_second)
    assert plan.throughput["image"].tokens is None


def test_an_example_that_cannot_fit_is_an_error():
    with pytest.raises(
        ValueError, match=r"captioning has 137 latents \(P 5 \+ I 4 \+ C 64 \+ N 64"
    ):
        grids_of("captioning", row_length=100, text_tokens=64)
    with pytest.raises(ValueError, match=r"choose shorter texts .* or smaller images"):
        grids_of("captioning", row_length=10)


# ---- the plan ------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main(["plan", *map(str, arguments)])
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(tiny.tree()))
    return path


def test_the_command_prints_what_its_json_says(own, capsys):
    options = (own, "--gpus", "2", "--gpu", "a100-80", "--mfu", "0.5", "--precision", "bf16")
    told = json.loads(run(capsys, *options, "--json"))
    text = run(capsys, *options)
    assert told["microbatch"] == 3
    assert told["parameters"]["total"] == sum(
        m["parameters"] for m in told["parameters"]["modules"].values()
    )
    assert f"{told['parameters']['total']:,}" in text
    assert f"{told['positions_per_s']:,.0f} /s" in text
    assert told["steps"] == 2
    assert told["seconds"] == pytest.approx(2 * told["step_flops"] / (2 * 312e12 * 0.5))
    assert told["eflops"] == pytest.approx(2 * told["step_flops"] / 1e18)
    for memory in told["memory_bytes"].values():
        assert sum(v for part, v in memory.items() if part != "total") == memory["total"]


def test_a_step_is_its_batch_of_average_examples():
    plan = make_plan(tiny.config(), PlanRequest(GPUS["h100"]))
    shares = [e.share for e in plan.examples.values()]
    assert math.isclose(sum(shares), 1)
    mean = sum(e.share * e.flops for e in plan.examples.values())
    assert plan.step_flops == pytest.approx(plan.stage.batch_size * mean)
    assert all(e.prior_backward == 2 * e.prior_forward for e in plan.examples.values())
    assert all(e.autoencoder_backward == 0 for e in plan.examples.values())  # they are frozen
    assert plan.heaviest in plan.examples


def test_autoencoders_that_learn_cost_more_of_everything():
    def of(**changes: Any) -> Any:
        tasks, stages = {"captioning": tiny.TASKS["captioning"]}, [tiny.joint(**changes)]
        return make_plan(tiny.config(tasks=tasks, stages=stages), PlanRequest(GPUS["h100"]))

    frozen, learning = of(), of(optimizer={"vae_lr_ratio": 1.0})
    anchored = of(optimizer={"vae_lr_ratio": 1.0}, loss={"ref": 0.1})
    half = {"optimizer": {"vae_lr_ratio": 1.0}, "interval": {"train": 1, "freeze": 1}}
    assert frozen.step_flops < learning.step_flops < anchored.step_flops
    assert frozen.step_flops < of(**half).step_flops < learning.step_flops
    a, b, c = (p.memory[False, False] for p in (frozen, learning, anchored))
    assert a.weights == b.weights < c.weights
    assert a.optimizer < b.optimizer == c.optimizer


def test_sharding_divides_what_learns():
    plan = make_plan(tiny.config(), PlanRequest(GPUS["h100"], gpus=6))
    whole, part = plan.memory[False, False], plan.memory[True, False]
    assert part.optimizer == 2 * part.gradients
    assert 0 <= 6 * part.gradients - whole.gradients < 6 * 4
    assert whole.buckets == whole.gradients
    assert part.buckets == whole.gathered == 0 < part.gathered


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--gpu", "h10"], "unknown GPU 'h10'; did you mean h100?"),
        (["--gpus", "0"], "--gpus should be 1 or more, found 0"),
        (["--gpus", "4"], "batch_size 6 must be a multiple of 4 GPUs times accumulate 1"),
        (["--mfu", "0"], "--mfu is a share of the peak, above 0 and at most 1, found 0"),
        (["--mfu", "40"], "at most 1, found 40"),
        (["--mfu", "nan"], "found nan"),
        (["--steps", "0"], "--steps should be 1 or more, found 0"),
        (["--precision", "fp8"], "--precision should be bf16 or fp32, found 'fp8'"),
        (["--text-tokens", "0"], "--text-tokens should be 1 or more, found 0"),
        (["--image-size", "17"], "both sides must be multiples of 8"),
        (["--stage", "jiont"], "no stage 'jiont'; did you mean joint?"),
        (["--stage", "text_vae"], "trains an autoencoder, and a plan is for a joint stage: joint"),
        (["--gpu", "custom"], "--gpu custom needs --peak-tflops, a number above 0, which is"),
        (["--memory-gb", "3"], "--memory-gb describes a GPU of your own, but h100 is asked for"),
        (["stages=[]"], "the configuration has no joint stage"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(own, capsys, options, says):
    with pytest.raises(SystemExit) as end:
        cli.main(["plan", str(own), *options])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert says in " ".join(error.split())
    assert len(error.splitlines()) == 1


def test_a_gpu_of_one_s_own_is_its_two_numbers():
    found = find_gpu("custom", 100.0, 24.0)
    assert (found.tflops["bf16"], found.memory_gb) == (100.0, 24.0)
