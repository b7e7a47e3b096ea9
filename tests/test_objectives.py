"""What a stage minimises, term by term: eq. 3.16 of the autoencoders and eq. 3.18 of the whole.

Every option of training has a test that would fail if the option did nothing:

    FlowConfig   timesteps, round_timesteps, clean_prefix_rate, grad_through_noisy,
                 grad_through_target                                              here
                 path                                                             test_path.py
    LossConfig   vae, fm, mask, beta, ref, modality                               here
                 kl_warmup_steps, critics                       test_image_training.py
    StageConfig  name, objective, modality, sources, crop, row_length, loss, posterior,
                 optimizer (vae_lr_ratio)                                         here
                 optimizer (all else), interval, accumulate, batch_size           test_training.py
                 too_long                                                         test_data.py
                 pad_rows                                               test_compiled_step.py
                 steps                                                            test_run.py
                 alignment                                                        test_alignment.py
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from unified.config.plugins import resolve_plugins
from unified.config.schema import FlowConfig, LossConfig, StageConfig
from unified.data.streams import Prepared
from unified.flow.matching import Draws, FlowMatching
from unified.flow.path import Straight
from unified.latents.modality import encode
from unified.latents.ragged import Posteriors
from unified.pipeline import UnifiedPipeline
from unified.randomness import Chance
from unified.sequence.packing import SEGMENTS, NoiseGroups, NoisyPlaces
from unified.sequence.visibility import UNCONDITIONAL
from unified.training.objectives.autoencoder import AutoencoderObjective
from unified.training.objectives.joint import JointBatch, JointObjective
from unified.training.run import train
from unified.training.stages import Materials, Sources
from unified.training.work import total

VAES = ("text", "image")
LEARNING = {"vae_lr_ratio": 0.5}


def joint(
    stage: Mapping[str, Any] | None = None, changes: Mapping[str, Any] | None = None
) -> tuple[JointObjective, UnifiedPipeline]:
    """The objective of a joint stage as a run makes it, in float64, and its pipeline."""
    settings = tiny.config(stages=[tiny.joint(**(stage or {}))], **(changes or {}))
    pipeline = tiny.pipeline(settings)
    for module in pipeline.modules.values():
        module.double()
    objective = Materials(
        settings, settings.stages[0], pipeline, Sources(settings), resolve_plugins(settings)
    ).objective()
    assert isinstance(objective, JointObjective)
    return objective.double(), pipeline


def autoencoder(modality: str, **stage: Any) -> AutoencoderObjective:
    settings = tiny.config(stages=[tiny.autoencoder(modality, **stage)])
    pipeline = tiny.pipeline(settings)
    objective = Materials(
        settings, settings.stages[0], pipeline, Sources(settings), resolve_plugins(settings)
    ).objective()
    assert isinstance(objective, AutoencoderObjective)
    return objective.double()


def posteriors(objective: JointObjective, batch: JointBatch, m: str) -> list[Posteriors]:
    """Of everything that modality `m` encodes, one by one, in the order of the batch's items."""
    return batch.items[m].posteriors(objective.modality(m)).items()


def normal(posterior: Posteriors) -> Normal:
    return Normal(posterior.mean_NC, torch.exp(0.5 * posterior.logvar_NC))


def gradients(module: nn.Module) -> bool:
    return any(p.grad is not None and bool(p.grad.any()) for p in module.parameters())


def loss(objective: JointObjective, batch: JointBatch) -> Tensor:
    """The loss of eq. 3.18 as the loop adds it up."""
    sums, weights = objective(batch), objective.weights(0)
    return torch.stack([weights[k] * s / batch.counts[k] for k, s in sums.items()]).sum()


@torch.no_grad()
def seen_in(objective: JointObjective, batch: JointBatch, name: str) -> tuple[Any, Any]:
    """What the objective asks of its flow's method `name`, and what it is told."""
    seen: list[tuple[Any, Any]] = []
    method = getattr(objective.flow, name)

    def watched(*given: Any) -> Any:
        seen.append((given, method(*given)))
        return seen[-1][1]

    setattr(objective.flow, name, watched)
    objective(batch)
    delattr(objective.flow, name)
    return seen[0]


def draws_of(objective: JointObjective, batch: JointBatch) -> Draws:
    """What chance decides while the objective looks at a batch."""
    draws: Draws = seen_in(objective, batch, "draw")[1]
    return draws


def owner(item: int) -> tuple[int, int]:
    """(slot of the example, number of the segment) of what has the chance of `item`."""
    return divmod(item, SEGMENTS)


# ---- the terms -----------------------------------------------------------------------------------


@pytest.mark.parametrize("m", VAES)
def test_beta_weighs_minus_the_entropy_and_not_the_kl(m: str) -> None:
    objective, pipeline = joint({"optimizer": LEARNING})
    batch = objective.collate(tiny.examples(pipeline), 0)
    with torch.no_grad():
        found, sums = posteriors(objective, batch, m), objective(batch)
    expected = -sum(normal(p).entropy().sum() for p in found)
    torch.testing.assert_close(sums[f"{m}/entropy"], expected)
    assert f"{m}/kl" not in sums.keys() | batch.counts.keys() | objective.weights(0).keys()
    # a Monte Carlo estimate of E[log q], and what a KL to N(0, 1) would have been
    estimate = sum(
        normal(p).log_prob(normal(p).sample(torch.Size([2000]))).sum() / 2000 for p in found
    )
    assert float(sums[f"{m}/entropy"]) == pytest.approx(float(estimate), rel=0.02)
    assert abs(sums[f"{m}/entropy"] - sum(p.kl() for p in found)) > 1


@torch.no_grad()
def test_the_flow_term_is_the_squared_error_of_the_velocity() -> None:
    """A new prior predicts zero, so the error is that of the target, eps - z_0, alone."""
    objective, pipeline = joint({"posterior": "mean"})
    examples = tiny.examples(pipeline)
    batch = objective.collate(examples, 0)
    means = [
        {
            kind: encode(pipeline.modalities[task.layout[kind].modality], [o])[0].mean_NC
            for kind, o in example.observations.items()
        }
        for example in examples
        for task in [pipeline.tasks[example.stream]]
    ]
    sums, expected = objective(batch), dict.fromkeys(VAES, 0.0)
    draws = draws_of(objective, batch)
    for m in VAES:
        noisy = NoisyPlaces(*batch.rows.noisy[m])
        places = zip(noisy.item.tolist(), noisy.place.tolist(), draws.noise[m], strict=True)
        for item, place, noise_C in places:
            slot, number = owner(item)
            segment = pipeline.tasks[examples[slot].stream].layout.segments[number]
            z_LC = means[slot][segment.copies or segment.kind]
            error = (noise_C - z_LC[place]) ** 2
            expected[m] += float(error.mean() * segment.weight)
    assert {m: float(sums[f"flow/{m}"]) for m in VAES} == pytest.approx(expected)


def test_reconstruction_and_masking_are_the_modalitys_own() -> None:
    objective, pipeline = joint({"optimizer": LEARNING, "posterior": "mean"})
    batch = objective.collate(tiny.examples(pipeline), 0)
    sums = objective(batch)
    for m in VAES:
        items, modality = batch.items[m], objective.modality(m)
        observations = items.whole("a test has observations")
        own = modality.reconstruction(observations, items.posteriors(modality).mode)
        own |= modality.masking(observations, items.chance(Chance(0, "joint", 0)))
        torch.testing.assert_close({k: sums[f"{m}/{k}"] for k in own}, own)
    assert {"text/mask", "image/gradient"} <= sums.keys()
    assert (
        sums.keys()
        == batch.counts.keys()
        == objective.weights(0).keys()
        - {
            "text/ref",
            "image/ref",
        }
    )


def test_weights_are_those_of_the_configuration() -> None:
    weighed = {"vae": 2, "fm": 3, "mask": 0.5, "beta": 0.25, "ref": 7, "modality": {"image": 4}}
    objective, _ = joint({"optimizer": LEARNING, "loss": weighed})
    text, image = ({"reconstruction": 2, "entropy": 0.5, "ref": 7} for _ in VAES)
    expected = {"flow/text": 3, "flow/image": 12}
    expected |= {f"text/{k}": w for k, w in (text | {"mask": 1}).items()}
    expected |= {f"image/{k}": w for k, w in (image | {"gradient": 1}).items()}
    assert objective.weights(0) == pytest.approx(expected)
    own, _ = joint({"optimizer": LEARNING})
    assert own.weights(0)["text/entropy"] == own.modality("text").config.beta
    assert own.weights(0)["text/mask"] == own.modality("text").config.mask_weight


@torch.no_grad()
def test_the_reported_total_is_what_is_differentiated() -> None:
    objective, pipeline = joint({"optimizer": LEARNING, "loss": {"vae": 2, "fm": 3}})
    batch = objective.collate(tiny.examples(pipeline), 0)
    sums = {k: float(v) for k, v in objective(batch).items()}
    means = {k: sums[k] / n for k, n in batch.counts.items()}
    assert total(means, objective.weights(0)) == pytest.approx(float(loss(objective, batch)))


@pytest.mark.parametrize("m", VAES)
@torch.no_grad()
def test_drift_from_the_reference_is_zero_at_first_and_then_positive(m: str) -> None:
    objective, pipeline = joint({"optimizer": LEARNING, "loss": {"ref": 1}})
    batch = objective.collate(tiny.examples(pipeline), 0)
    assert float(objective(batch)[f"{m}/ref"]) == 0
    before = posteriors(objective, batch, m)
    for parameter in objective.modality(m).parameters():
        parameter += 0.02 * torch.randn_like(parameter)
    drift = objective(batch)[f"{m}/ref"]
    pairs = zip(posteriors(objective, batch, m), before, strict=True)
    expected = sum(kl_divergence(normal(p), normal(q)).sum() for p, q in pairs)
    torch.testing.assert_close(drift, expected)
    assert float(drift) > 0
    assert not any(p.requires_grad for p in objective.references.parameters())
    trained = {id(p) for group in objective.groups().values() for p in group}
    assert not trained & {id(p) for p in objective.references.parameters()}
    assert not joint({"optimizer": LEARNING})[0].references


@pytest.mark.parametrize("m", VAES)
@torch.no_grad()
def test_the_autoencoder_stage_has_the_kl_to_the_base_prior(m: str) -> None:
    objective = autoencoder(m, loss={"beta": 0.25, "mask": 0.5})
    pipeline = tiny.pipeline()
    item = {"text": tiny.CAPTIONS[0], "image": tiny.square(tiny.CAPTIONS[0])}[m]
    observation = pipeline.modalities[m].observe(item, ends=True)
    batch = objective.collate([Prepared("s", "0", 3, {"X": observation})], 5)
    sums, (posterior,) = objective(batch), encode(objective.modality, [observation])
    expected = kl_divergence(normal(posterior), Normal(0.0, 1.0)).sum()
    torch.testing.assert_close(sums["kl"], expected)
    assert sums.keys() == batch.counts.keys() == objective.weights(0).keys()
    assert objective.weights(0)["kl"] == 0.25
    assert objective.weights(0).get("mask") == (0.5 if m == "text" else None)
    # posterior samples, drawn for (seed, stage, step, slot)
    latents = posterior.sample(noise_of(Chance(0, f"{m}_vae", 5), 3, 0, posterior))
    observations = batch.items.whole("a test has observations")
    own = objective.modality.reconstruction(observations, latents)["reconstruction"]
    torch.testing.assert_close(sums["reconstruction"], own)


def noise_of(chance: Chance, slot: int, segment: int, posterior: Posteriors) -> Tensor:
    """The noise of the posterior of one item, which depends on nothing else."""
    length, channels = posterior.mean_NC.shape
    item = torch.full((length,), SEGMENTS * slot + segment)
    return chance.normal("posterior", item, torch.arange(length), channels)


# ---- who learns ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_the_autoencoders_learn_where_their_rate_is_above_zero(ratio: float) -> None:
    objective, pipeline = joint({"optimizer": {"vae_lr_ratio": ratio}})
    batch = objective.collate(tiny.examples(pipeline), 0)
    loss(objective, batch).backward()
    for m in VAES:
        reached = [p.grad is not None for p in objective.modality(m).parameters()]
        assert all(reached) if ratio else not any(reached)
        assert (f"{m}/reconstruction" in batch.counts) == bool(ratio)
    vaes = sum(len(list(objective.modality(m).parameters())) for m in VAES)
    assert len(objective.groups()["vae"]) == (vaes if ratio else 0)
    assert len(objective.groups()["main"]) == len(list(pipeline.prior.parameters()))


@pytest.mark.parametrize("target", [False, True])
@pytest.mark.parametrize("noisy", [False, True])
def test_the_flow_loss_reaches_the_encoders_as_configured(noisy: bool, target: bool) -> None:
    flow = {"grad_through_noisy": noisy, "grad_through_target": target}
    objective, pipeline = joint({"optimizer": LEARNING}, {"flow": flow})
    tiny.randomise(pipeline.prior)
    sums = objective(objective.collate(tiny.examples(pipeline), 0))
    (sums["flow/text"] + sums["flow/image"]).backward()
    for m in VAES:
        assert gradients(objective.modality(m)) == (noisy or target)


def test_only_one_way_at_a_time_through_the_flow_loss() -> None:
    """The two ways add up to both: each is on alone, and neither stands for the other."""

    def gradient(noisy: bool, target: bool) -> Tensor:
        flow = {"grad_through_noisy": noisy, "grad_through_target": target}
        objective, pipeline = joint({"optimizer": LEARNING}, {"flow": flow})
        tiny.randomise(pipeline.prior)
        objective(objective.collate(tiny.examples(pipeline), 0))["flow/text"].backward()
        found = objective.modality("text").network.encoder.final_layer.weight.grad
        assert found is not None
        return found

    one, other, both = gradient(True, False), gradient(False, True), gradient(True, True)
    assert not torch.allclose(one, other)
    torch.testing.assert_close(one + other, both)


def test_a_frozen_modality_stays_frozen(tmp_path: Any) -> None:
    shard = tiny.write_shard(tmp_path / "s.tar", tiny.squares())
    modalities = {"text": tiny.TEXT, "image": {**tiny.IMAGE, "frozen": True}}
    stage = {"optimizer": {"lr": 0.01, "warmup_steps": 0, "vae_lr_ratio": 1}, "loss": {"ref": 1}}
    objective, _ = joint(stage, {"modalities": modalities})
    assert not any(k.startswith("image/") for k in objective.weights(0))
    assert list(objective.references) == ["text"]
    settings = tiny.config(
        tmp_path / "run", shard, modalities=modalities, stages=[tiny.joint(**stage)]
    )
    final = UnifiedPipeline.from_pretrained(train(settings))
    start = UnifiedPipeline.from_pretrained(tmp_path / "run" / "initial")

    def moved(m: str) -> bool:
        pairs = zip(start.modalities[m].parameters(), final.modalities[m].parameters(), strict=True)
        return any(not a.equal(b) for a, b in pairs)

    assert moved("text")
    assert not moved("image")


# ---- what is drawn -------------------------------------------------------------------------------


def test_the_prior_learns_from_samples_or_from_means() -> None:
    """What reaches the flow loss is exactly the mean, or exactly mean + std * noise."""
    for posterior in ("mean", "sample"):
        objective, pipeline = joint({"posterior": posterior})
        batch = objective.collate(tiny.examples(pipeline, 1), 7)
        (rows, _), _ = seen_in(objective, batch, "corrupt")
        (q,) = posteriors(objective, batch, "text")
        kinds = [s.kind for s in pipeline.tasks["continuation"].layout.segments]
        drawn = q.sample(noise_of(Chance(0, "joint", 7), 0, kinds.index("C"), q)).values
        expected = q.mean_NC if posterior == "mean" else drawn
        take = rows.take["text"]
        torch.testing.assert_close(rows.latents["text"], expected[take])
        assert take.unique().equal(torch.arange(len(expected)))
        assert not torch.allclose(q.mean_NC, drawn)


def test_draws_belong_to_seed_stage_step_and_slot() -> None:
    def noise(name: str = "joint", step: int = 0, seed: int = 0, slot: int = 0) -> Tensor:
        objective, pipeline = joint({"name": name}, {"run": {"seed": seed}})
        examples = [replace(e, slot=e.slot + slot) for e in tiny.examples(pipeline)]
        return draws_of(objective, objective.collate(examples, step)).noise["text"]

    assert noise().equal(noise())
    for other in (noise("other"), noise(step=1), noise(seed=1), noise(slot=6)):
        assert not noise().equal(other)


def drawn(changes: Mapping[str, Any], count: int = 60) -> tuple[list[Prepared], JointBatch, Draws]:
    """Examples, what they are collated to, and what chance makes of them."""
    objective, pipeline = joint(None, changes)
    examples = tiny.examples(pipeline, count)
    batch = objective.collate(examples, 0)
    return examples, batch, draws_of(objective, batch)


def times(batch: JointBatch, draws: Draws, m: str) -> Tensor:
    """The timestep of each noisy position of modality `m`."""
    return draws.t_G[NoisyPlaces(*batch.rows.noisy[m]).group - 1]


def test_the_unconditional_rate_is_the_tasks_own() -> None:
    rates = {"continuation": 0.0, "captioning": 1.0, "text_to_image": 0.3}
    tasks = {n: {**t, "unconditional_rate": rates[n]} for n, t in tiny.TASKS.items()}
    examples, batch, draws = drawn({"tasks": tasks}, 900)
    slots = [owner(item)[0] for item in NoiseGroups(*batch.rows.groups).item.tolist()]
    streams = [examples[slot].stream for slot in slots]
    for task, rate in rates.items():
        hidden = draws.unconditional_G[torch.tensor([stream == task for stream in streams])]
        assert len(hidden) >= 300
        found = float(hidden.double().mean())
        assert found == pytest.approx(rate, abs=0.06 * (0 < rate < 1))


@pytest.mark.parametrize("rate", [0.5, 1.0])
def test_relabelled_positions_become_u_in_what_the_prior_reads(rate: float) -> None:
    tasks = {n: {**t, "unconditional_rate": rate} for n, t in tiny.TASKS.items()}
    flow = {"clean_prefix_rate": 0.0}
    objective, pipeline = joint(None, {"tasks": tasks, "flow": flow})
    batch = objective.collate(tiny.examples(pipeline), 0)
    seen: list[Any] = []
    pipeline.prior.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    draws = draws_of(objective, batch)
    kinds = seen[0].coordinates.kind
    unconditional = objective.visibility.kind_index[UNCONDITIONAL]
    marked = {m: kinds.view(-1)[seen[0].where[m]] == unconditional for m in VAES}
    for m in VAES:
        noisy = NoisyPlaces(*batch.rows.noisy[m])
        expected = torch.zeros_like(marked[m])
        expected[noisy.at] = draws.unconditional_G[noisy.group - 1]
        assert marked[m].equal(expected)
    assert marked["text"].any()
    assert marked["image"].any()
    assert bool(draws.unconditional_G.all()) == (rate == 1)


def test_timesteps_are_drawn_per_modality() -> None:
    timesteps = {
        "text": {"loc": 1.5, "scale": 0.0},
        "image": {"distribution": "uniform"},
    }
    flow = {"timesteps": timesteps, "clean_prefix_rate": 0.0}
    _, batch, draws = drawn({"flow": flow})
    time = times(batch, draws, "text")
    torch.testing.assert_close(time, torch.full_like(time, 1 / (1 + math.exp(-1.5))))
    time = times(batch, draws, "image")
    assert float(time.min()) < 0.25 < 0.75 < float(time.max())
    _, batch, draws = drawn({"flow": {"timesteps": {"image": {"loc": -4.0, "scale": 0.1}}}})
    assert float(times(batch, draws, "image").max()) < 0.05


def test_a_noise_group_has_one_timestep() -> None:
    """A block of text, or a whole image: its positions share one, and others have others. The prior
    reads it at each of them, and 0 at all that is clean."""
    objective, pipeline = joint(None, {"flow": {"clean_prefix_rate": 0.0}})
    batch = objective.collate(tiny.examples(pipeline), 0)
    seen: list[Any] = []
    pipeline.prior.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    draws = draws_of(objective, batch)
    groups = NoiseGroups(*batch.rows.groups)
    assert len(draws.t_G.unique()) == len(groups.item)
    assert set(groups.size.tolist()) == {4}  # blocks of 4 tokens, images of 2 x 2 cells
    for m in VAES:
        noisy = NoisyPlaces(*batch.rows.noisy[m])
        expected = torch.zeros(len(batch.rows.where[m]))
        expected[noisy.at] = times(batch, draws, m)
        found = seen[0].time_RL.view(-1)[seen[0].where[m]]
        torch.testing.assert_close(found, expected.to(found))


def test_a_location_that_is_not_set_is_the_modalitys_own() -> None:
    for told, location in (({"scale": 0.0}, 1.0), ({"scale": 0.0, "loc": -2.0}, -2.0)):
        flow = {"timesteps": {"text": told, "image": {"scale": 0.0}}, "clean_prefix_rate": 0.0}
        _, batch, draws = drawn({"flow": flow})
        for m, wanted in (("text", location), ("image", 0.0)):
            time = times(batch, draws, m)
            torch.testing.assert_close(time, torch.full_like(time, 1 / (1 + math.exp(-wanted))))


@pytest.mark.parametrize(
    ("rounding", "on_grid"),
    [
        ("none", lambda t: None),
        ("integer", lambda t: t.round()),
        ("bfloat16", lambda t: t.bfloat16().to(t)),
    ],
)
def test_timesteps_are_rounded_as_configured(rounding: str, on_grid: Any) -> None:
    _, batch, draws = drawn({"flow": {"round_timesteps": rounding}})
    thousandths = times(batch, draws, "text") * 1000
    whole = on_grid(thousandths)
    if whole is None:
        assert (thousandths - thousandths.round()).abs().max() > 0.1
        assert not torch.allclose(thousandths, thousandths.bfloat16().to(thousandths), rtol=1e-5)
    else:
        torch.testing.assert_close(thousandths, whole)


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_left_parts_stay_clean_at_their_rate(rate: float) -> None:
    examples, batch, _ = drawn({"flow": {"clean_prefix_rate": rate}})
    noisy, groups = NoisyPlaces(*batch.rows.noisy["text"]), NoiseGroups(*batch.rows.groups)
    text = [g for g, blockwise in enumerate(groups.blockwise.tolist(), 1) if blockwise]
    assert len(text) >= len(examples)
    for group in text:
        places = noisy.within[noisy.group == group].tolist()
        assert places == list(range(places[0], 4))  # the last latents of a block of 4
        assert (places[0] == 0) == (rate == 0)
    assert batch.counts["flow/text"] == len(noisy.at)
    images = sum(e.stream == "text_to_image" for e in examples)
    assert batch.rows.noisy["image"].shape[1] == batch.counts["flow/image"] == 4 * images
    # what stays clean is read at timestep 0
    steps = batch.rows.step_RL.view(-1)[batch.rows.where["text"]]
    assert set((steps > 0).nonzero()[:, 0].tolist()) == set(noisy.at.tolist())


# ---- sums and counts -----------------------------------------------------------------------------


@torch.no_grad()
def flatten_networks(objective: JointObjective) -> None:
    """Standard normal posteriors, uniform logits, grey pixels."""
    text, image = objective.modality("text").network, objective.modality("image").codec.network
    layers = [text.encoder.final_layer, text.decoder.final_layer, image.quant_conv]
    for layer in (*layers, image.decoder.conv_out):
        layer.weight.zero_()
        layer.bias.zero_()


def checkerboard(observation: Tensor) -> Tensor:
    rows, columns = (torch.arange(n) for n in observation.shape[1:])
    board = (rows[:, None] + columns) % 2 * 255
    return board.to(torch.uint8).expand(3, -1, -1).contiguous()


@torch.no_grad()
def test_counts_are_the_positions_that_the_sums_run_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks for which every position contributes the same known amount."""
    tasks = {**tiny.TASKS, "text_to_image": {**tiny.TASKS["text_to_image"], "caption_weight": 1}}
    objective, pipeline = joint({"optimizer": LEARNING}, {"tasks": tasks})
    flatten_networks(objective)
    given = [
        Prepared(e.stream, e.key, e.slot, {k: checkerboard(o) if k == "I" else o
                                           for k, o in e.observations.items()})
        for e in tiny.examples(pipeline)
    ]  # fmt: skip
    monkeypatch.setattr(Straight, "velocity", lambda path, z0, eps, t: torch.ones_like(z0))
    batch = objective.collate(given, 0)
    entropy = -0.5 * 4 * math.log(2 * math.pi * math.e)
    each = {"flow/text": 1.0, "flow/image": 1.0, "text/entropy": entropy, "image/entropy": entropy}
    each |= dict.fromkeys(("text/reconstruction", "text/mask"), math.log(tiny.TEXT["vocab_size"]))
    each |= {"image/reconstruction": 1.0, "image/gradient": 2.0}
    sums = objective(batch)
    assert sums.keys() == batch.counts.keys() == each.keys()
    assert {k: float(s) / each[k] for k, s in sums.items()} == pytest.approx(batch.counts)


@pytest.mark.parametrize("sizes", [(3, 3), (1, 5), (2, 2, 2)])
@pytest.mark.parametrize("row_length", [40, 256])
@torch.no_grad()
def test_no_split_changes_sums_or_counts(sizes: tuple[int, ...], row_length: int) -> None:
    stage = {"optimizer": LEARNING, "loss": {"ref": 1}, "row_length": 256}
    objective, pipeline = joint(stage)
    for name, module in pipeline.modules.items():
        if name == "prior":
            tiny.randomise(module)
    examples = tiny.examples(pipeline)
    whole = objective.collate(examples, 0)
    objective.collate.packer.row_length = row_length
    parts, start = [], 0
    for size in sizes:
        parts.append(objective.collate(examples[start : start + size], 0))
        start += size
    counts = {k: sum(p.counts.get(k, 0) for p in parts) for k in whole.counts}
    assert counts == dict(whole.counts)
    sums = [objective(p) for p in parts]
    for term, value in objective(whole).items():
        together = sum(float(s[term]) for s in sums if term in s)
        assert together == pytest.approx(float(value), rel=1e-9, abs=1e-9), term


def test_row_length_packs_and_refuses() -> None:
    objective, pipeline = joint({"row_length": 40})
    assert max(objective.collate(tiny.examples(pipeline), 0).rows.shape) <= 40
    short, pipeline = joint({"row_length": 8})
    with pytest.raises(ValueError, match="does not fit a row of 8"):
        short.collate(tiny.examples(pipeline), 0)


def test_pads_of_a_closed_text_are_painted_but_not_read() -> None:
    flow = {"clean_prefix_rate": 0.0}
    objective, pipeline = joint({"optimizer": LEARNING}, {"flow": flow})
    (example,) = tiny.examples(pipeline, 1)
    tokenizer = pipeline.modalities["text"].tokenizer
    tokens = len(tokenizer.encode(tiny.CAPTIONS[0])) + 1  # and the end
    padded = -(-tokens // 4) * 4
    assert example.stream == "continuation"
    assert padded > tokens
    counts = objective.collate([example], 0).counts
    assert counts["flow/text"] == padded
    assert counts["text/reconstruction"] == tokens


# ---- what a stage reads --------------------------------------------------------------------------


def test_an_autoencoder_stage_reads_its_modality_from_its_sources(tmp_path: Any) -> None:
    shards = {
        name: tiny.write_shard(tmp_path / f"{name}.tar", tiny.squares([caption] * 5))
        for name, caption in {"s": tiny.CAPTIONS[0], "t": tiny.CAPTIONS[-1]}.items()
    }
    data = {"sources": {name: {"train": [path]} for name, path in shards.items()}}

    def batch(modality: str, **stage: Any) -> list[Prepared]:
        settings = tiny.config(stages=[tiny.autoencoder(modality, **stage)], data=data)
        stage_, pipeline = settings.stages[0], tiny.pipeline()
        plugins = resolve_plugins(settings)
        materials = Materials(settings, stage_, pipeline, Sources(settings), plugins)
        (examples,) = materials.mixture(40, "x").batch(0)
        return examples

    assert {e.observations["X"].ndim for e in batch("image")} == {3}
    lengths = {len(e.observations["X"]) for e in batch("text")}
    assert max(lengths) > 3
    assert {e.stream for e in batch("text", sources={"t": 1.0})} == {"t"}
    shares = [e.stream for e in batch("text", sources={"s": 4.0, "t": 1.0})]
    assert 24 < shares.count("s") < 40
    assert {len(e.observations["X"]) for e in batch("text", crop=3)} == {3}


def test_the_objective_is_the_stages() -> None:
    assert isinstance(joint()[0].flow, FlowMatching)
    assert isinstance(autoencoder("text"), AutoencoderObjective)


def test_every_training_option_is_accounted_for() -> None:
    options = {n for c in (FlowConfig, LossConfig, StageConfig) for n in c.model_fields}
    assert __doc__ is not None
    assert not {name for name in options if name not in __doc__}
