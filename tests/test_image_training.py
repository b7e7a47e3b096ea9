"""Critics of an image autoencoder: each term moves its own side, no split changes them, they start
when they should, continue exactly, and leave nothing behind; and what validation measures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import devices
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import get_model

from unified.config.loading import load_config, save_config, shipped
from unified.config.plugins import resolve_model, resolve_plugins
from unified.config.schema import Config, StageConfig
from unified.data.streams import Prepared
from unified.latents.critic import Critic
from unified.latents.measures import psnr, ssim
from unified.latents.ragged import Ragged
from unified.latents.weights import named_tensors, read_file
from unified.modalities.image import pixels
from unified.modalities.image.adversarial import Adversarial, AdversarialConfig
from unified.modalities.image.modality import ImageModality
from unified.modalities.image.perceptual import Perceptual, PerceptualConfig
from unified.training import checkpoint, loop
from unified.training.objectives.autoencoder import AutoencoderObjective
from unified.training.run import train
from unified.training.stages import Materials, Sources

ADVERSARIAL = {"width": 8, "layers": 2, "weight": 0.5}
BACKBONE = "squeezenet1_1"
LAYERS, FIRST = ("features.1", "features.4"), "features.0.weight"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone that has learned nothing, in a file."""
    path = tmp_path_factory.mktemp("backbone") / "squeezenet.safetensors"
    torch.manual_seed(0)
    save_file(get_model(BACKBONE, weights=None).state_dict(), path)
    return path


def perceptual_options(weights: Path, **changes: Any) -> dict[str, Any]:
    return {"backbone": BACKBONE, "weights": str(weights), "layers": LAYERS} | changes


def perceptual(weights: Path, **changes: Any) -> Perceptual:
    return Perceptual(PerceptualConfig(**perceptual_options(weights, **changes)))


def settings(folder: Path | str = "unused", shard: str = "unused.tar", **stage: Any) -> Config:
    """A run of one image autoencoder stage, without tasks."""
    return tiny.config(
        folder,
        shard,
        modalities={"image": tiny.IMAGE},
        tasks={},
        stages=[tiny.autoencoder("image", **stage)],
    )


def objective(**stage: Any) -> AutoencoderObjective:
    """As a run makes it, in float64."""
    made = settings(**stage)
    materials = Materials(
        made, made.stages[0], tiny.pipeline(made), Sources(made), resolve_plugins(made)
    )
    found = materials.objective().double()
    assert isinstance(found, AutoencoderObjective)
    return found


def examples(sizes: tuple[tuple[int, int], ...] = ((16, 16), (16, 16), (8, 16))) -> list[Prepared]:
    rng = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (3, *s), generator=rng, dtype=torch.uint8) for s in sizes]
    return [Prepared("s", str(i), i, {"X": image}) for i, image in enumerate(images)]


def with_gradient(module: nn.Module) -> set[str]:
    """The children that a gradient reached."""
    reached = {n for n, p in module.named_parameters() if p.grad is not None and p.grad.any()}
    return {name.partition(".")[0] for name in reached}


# ---- the adversarial terms -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("term", "side"), [("adversarial", "modality"), ("discriminator", "critics")]
)
def test_each_term_moves_its_own_side_and_no_other(term: str, side: str) -> None:
    judged = objective(loss={"critics": {"adversarial": ADVERSARIAL}})
    judged(judged.collate(examples(), 0))[term].backward()
    assert with_gradient(judged) == {side}


def test_both_terms_are_of_the_same_discriminator() -> None:
    """The hinge losses, written out image by image."""
    judge = Adversarial(AdversarialConfig(**ADVERSARIAL)).double()
    real, fake = (torch.rand(2, 3, 16, 24, dtype=torch.float64) * 2 - 1 for _ in range(2))
    sums = judge([real], [fake])
    on_real, on_fake = (torch.cat([judge.discriminator(x[None]) for x in y]) for y in (real, fake))
    torch.testing.assert_close(sums["adversarial"], -on_fake.sum())
    own = (1 - on_real).clamp_min(0).sum() + (1 + on_fake).clamp_min(0).sum()
    torch.testing.assert_close(sums["discriminator"], own)
    observations = [torch.zeros(3, 16, 24, dtype=torch.uint8)] * 2
    assert judge.counts(Ragged.of(observations)) == {
        "adversarial": on_fake.numel(),
        "discriminator": on_real.numel() + on_fake.numel(),
    }


def test_the_two_sides_pull_against_each_other() -> None:
    """A step down one side's gradient raises what the other wants to lower."""
    torch.manual_seed(0)
    judge = Adversarial(AdversarialConfig(**ADVERSARIAL)).double()
    real = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    fake = torch.rand(2, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    before = judge([real], [fake])
    before["adversarial"].backward()
    assert fake.grad is not None
    after = judge([real], [(fake - 0.01 * fake.grad).detach()])
    assert after["adversarial"] < before["adversarial"]
    assert after["discriminator"] > before["discriminator"]


@pytest.mark.parametrize("sizes", [(1, 2), (1, 1, 1)])
@torch.no_grad()
def test_no_split_changes_the_terms(weights: Path, sizes: tuple[int, ...]) -> None:
    critics = {"adversarial": ADVERSARIAL, "perceptual": perceptual_options(weights)}
    judged = objective(loss={"critics": critics})
    given = examples(((32, 32), (32, 32), (24, 32)))
    whole, parts, start = judged.collate(given, 0), [], 0
    for size in sizes:
        parts.append(judged.collate(given[start : start + size], 0))
        start += size
    sums = [judged(part) for part in parts]
    for term, value in judged(whole).items():
        assert sum(p.counts[term] for p in parts) == whole.counts[term]
        assert sum(float(s[term]) for s in sums) == pytest.approx(float(value), rel=1e-9), term
    assert whole.counts["perceptual"] == 3


def test_a_critic_joins_in_at_its_step() -> None:
    judged = objective(loss={"critics": {"adversarial": {**ADVERSARIAL, "start": 3}}})
    terms = {"adversarial", "discriminator"}
    for step in range(5):
        batch = judged.collate(examples(), step)
        sums = judged(batch)
        assert sums.keys() == batch.counts.keys()
        assert (terms <= sums.keys()) == (step >= 3)
        assert terms <= judged.weights(step).keys()
    assert judged.weights(0)["adversarial"] == 0.5
    assert judged.weights(0)["discriminator"] == 1


def test_an_image_without_a_patch_is_told() -> None:
    judge = Adversarial(AdversarialConfig(width=8, layers=5))
    with pytest.raises(ValueError, match=r"16 x 16 pixels has no patch .* use fewer layers"):
        judge.counts(Ragged.of([torch.zeros(3, 16, 16)]))


def test_the_discriminator_is_a_function_of_the_seed_and_learns() -> None:
    one, two = (objective(loss={"critics": {"adversarial": ADVERSARIAL}}) for _ in range(2))
    first = dict(one.critic("adversarial").named_parameters())
    for name, parameter in two.critic("adversarial").named_parameters():
        assert parameter.equal(first[name])
    learning = {id(p) for p in one.groups()["main"]}
    assert {id(p) for p in first.values()} <= learning
    assert len(learning) == len(list(one.parameters()))


# ---- the perceptual term -------------------------------------------------------------------------


def test_the_distance_is_nothing_to_itself_and_grows_with_the_difference(weights: Path) -> None:
    judge = perceptual(weights)
    rng = torch.Generator().manual_seed(0)
    x, noise = (torch.rand(1, 3, 32, 48, generator=rng) * 2 - 1 for _ in range(2))
    distances = [float(judge([x], [x + s * noise])["perceptual"]) for s in (0, 0.1, 0.3)]
    assert distances[0] == 0
    assert distances[0] < distances[1] < distances[2]


def test_the_distance_by_its_definition(weights: Path) -> None:
    judge = perceptual(weights).double()
    x, y = (torch.rand(3, 32, 32, dtype=torch.float64) * 2 - 1 for _ in range(2))
    model = get_model(BACKBONE, weights=None).double().eval()
    model.load_state_dict({n: t.double() for n, t in read_file(weights).items()})
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = torch.tensor(0.0)
    for depth in (2, 5):
        found = []
        for image in (x, y):
            colours = ((image + 1) / 2 - mean[:, None, None]) / std[:, None, None]
            f = model.features[:depth](colours.double()[None])
            found.append(f / f.norm(dim=1, keepdim=True).clamp_min(1e-6))
        expected = expected + (found[0] - found[1]).detach().square().sum(1).mean()
    assert float(judge([x[None]], [y[None]])["perceptual"]) == pytest.approx(
        float(expected), rel=1e-5
    )


def test_the_backbone_neither_learns_nor_trains(weights: Path) -> None:
    critics = {"perceptual": perceptual_options(weights)}
    judged = objective(loss={"critics": critics})
    judged.train()
    assert not any(module.training for module in judged.critic("perceptual").modules())
    judged(judged.collate(examples(((32, 32),)), 0))["perceptual"].backward()
    assert with_gradient(judged) == {"modality"}
    learning = {id(p) for p in judged.groups()["main"]}
    assert not learning & {id(p) for p in judged.critic("perceptual").parameters()}


@pytest.mark.parametrize("part", ["whole", "needed"])
def test_a_pth_file_serves_as_well(weights: Path, tmp_path: Path, part: str) -> None:
    tensors = read_file(weights)
    judge = perceptual(weights)
    kept = tensors if part == "whole" else named_tensors(judge.backbone)
    torch.save(dict(kept), tmp_path / "b.pth")
    again = perceptual(tmp_path / "b.pth")
    assert named_tensors(again).keys() == named_tensors(judge).keys()
    assert all(t.equal(named_tensors(judge)[n]) for n, t in named_tensors(again).items())


def test_counters_of_training_steps_may_be_missing(tmp_path: Path) -> None:
    tensors = get_model("shufflenet_v2_x0_5", weights=None).state_dict()
    old = {n: t for n, t in tensors.items() if not n.endswith("num_batches_tracked")}
    assert len(old) < len(tensors)
    torch.save(old, tmp_path / "old.pth")
    options = {"backbone": "shufflenet_v2_x0_5", "layers": ("conv1", "stage2")}
    judge = perceptual(tmp_path / "old.pth", **options)
    x = torch.rand(1, 3, 32, 32)
    assert float(judge([x], [x])["perceptual"]) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "nowhere.pth"}, "no weights file nowhere.pth for the perceptual term"),
        ({"backbone": "squeezenet1_2"}, "no backbone 'squeezenet1_2'; did you mean squeezenet1_1"),
        ({"backbone": "densenet121", "layers": None}, "layers must name the layers of densenet121"),
        ({"layers": ("features.99",)}, "squeezenet1_1 has no layer 'features.99'; did you mean"),
        ({"backbone": "squeezenet1_0"}, "has tensor features.11.expand1x1.bias, unknown here"),
    ],
)
def test_what_does_not_fit_is_named(weights: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Perceptual(PerceptualConfig(**perceptual_options(weights) | changes))


def test_files_of_something_else_are_refused(weights: Path, tmp_path: Path) -> None:
    bad: dict[str, Any] = {
        "object.pth": Path("a pickled object"),
        "list.pth": [torch.zeros(1)],
        "more.pth": {**read_file(weights), "surplus": torch.zeros(1)},
        "less.pth": {n: t for n, t in read_file(weights).items() if n != FIRST},
        "other.pth": {**read_file(weights), FIRST: torch.zeros(3)},
    }
    says = {"object": "cannot be read", "list": "state dict", "more": "has tensor surplus, unknown"}
    says |= {"less": f"lacks tensor {FIRST}", "other": f"tensor {FIRST} in .* has shape"}
    for name, content in bad.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match=says[name.partition(".")[0]]):
            perceptual(tmp_path / name)
    (tmp_path / "cut.safetensors").write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        perceptual(tmp_path / "cut.safetensors")


# ---- the KL, and the objective of validation -----------------------------------------------------


def test_the_kl_comes_in_linearly() -> None:
    judged = objective(loss={"beta": 0.2, "kl_warmup_steps": 4})
    weights = [judged.weights(step)["kl"] for step in range(6)]
    assert weights == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.2, 0.2])
    assert objective(loss={"beta": 0.2}).weights(0)["kl"] == 0.2


def test_validation_means_the_same_at_every_step(weights: Path) -> None:
    critics = {"adversarial": ADVERSARIAL, "perceptual": perceptual_options(weights)}
    judged = objective(loss={"beta": 0.2, "kl_warmup_steps": 4, "critics": critics})
    held_out = judged.for_validation()
    terms = {"reconstruction", "gradient", "kl", "perceptual"}
    assert held_out.weights(0).keys() == terms
    assert held_out.weights(0) == held_out.weights(9)
    assert held_out.collate(examples(((32, 32),)), 0).counts.keys() == terms
    ours = {id(p) for p in judged.parameters()}
    assert {id(p) for p in held_out.parameters()} <= ours


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (
            {"critics": {"adverserial": {}}},
            "'adverserial', which ImageModality lacks; did you mean",
        ),
        (
            {"critics": {"adversarial": {"begin": 3}}},
            "own.yaml: unknown key stages.0.loss.critics.adversarial.begin",
        ),
        ({"critics": {"perceptual": {}}}, "stages.0.loss.critics.perceptual.weights is missing"),
        ({"critics": {"adversarial": {"width": 12}}}, "adversarial.width"),
    ],
)
def test_wrong_critics_are_named_before_anything_is_trained(
    stage: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_plugins(settings(loss=stage), source="own.yaml")


@pytest.mark.parametrize("loss", [{"kl_warmup_steps": 3}, {"critics": {"adversarial": {}}}])
def test_a_joint_stage_has_neither(loss: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="belongs to an autoencoder stage, and this one is joint"):
        StageConfig.model_validate(tiny.joint(loss=loss))


def test_a_text_stage_has_no_critics() -> None:
    stage = tiny.autoencoder("text", loss={"critics": {"adversarial": {}}})
    with pytest.raises(ValueError, match="which TextModality lacks; known: none"):
        resolve_plugins(tiny.config(stages=[stage]))


# ---- whole runs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.write_shard(tmp_path_factory.mktemp("data") / "s.tar", tiny.squares())


def judged_run(folder: Path, shard: str, weights: Path, **changes: Any) -> Config:
    critics = {
        "adversarial": {**ADVERSARIAL, "start": 2},
        "perceptual": perceptual_options(weights, layers=("features.1",)),
    }
    loss = {"kl_warmup_steps": 3, "critics": critics}
    made = settings(folder, shard, steps=5, loss=loss, **changes)
    made.data.sources["s"].val = [shard]
    made.training.save_every = made.training.validate_every = 3
    made.training.sample_every = 5
    return made


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, shard: str, weights: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "straight"
    train(judged_run(folder, shard, weights))
    return folder


def checkpointed(folder: Path, name: str) -> dict[str, Tensor]:
    return checkpoint.read(folder / "checkpoints" / "image_vae-5", name)


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_killed_run_continues_exactly(
    tmp_path: Path, shard: str, weights: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = loop.Loop.step

    def dying(self: loop.Loop, at: int, work: Any) -> Any:
        if at == 4:
            raise KeyboardInterrupt
        return step(self, at, work)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "step", dying)
        with pytest.raises(KeyboardInterrupt):
            train(judged_run(tmp_path, shard, weights))
    train(judged_run(tmp_path, shard, weights))
    for name in ("model", "ema", "optimizer"):
        one, two = checkpointed(finished, name), checkpointed(tmp_path, name)
        assert one.keys() == two.keys()
        if torch.accelerator.is_available():  # whose convolutions add in any order
            assert all(torch.allclose(one[n], two[n], atol=1e-4, rtol=1e-3) for n in one)
        else:
            assert all(one[n].equal(two[n]) for n in one)


def test_accumulation_changes_nothing(
    tmp_path: Path, shard: str, weights: Path, finished: Path
) -> None:
    train(judged_run(tmp_path, shard, weights, accumulate=2))
    one, two = checkpointed(finished, "model"), checkpointed(tmp_path, "model")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_two_processes_change_nothing(
    tmp_path: Path, shard: str, weights: Path, finished: Path
) -> None:
    devices.need(2)
    save_config(judged_run(tmp_path / "run", shard, weights), tmp_path / "run.yaml")
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "unified.cli"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-m", *command, "train", str(tmp_path / "run.yaml")],
        check=True,
        env=environment,
    )
    one, two = checkpointed(finished, "model"), checkpointed(tmp_path / "run", "model")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-5)
    assert lines(tmp_path / "run")[-1]["val/psnr"] == pytest.approx(
        lines(finished)[-1]["val/psnr"], rel=1e-4
    )


def test_critics_are_checkpointed_averaged_and_left_behind(finished: Path) -> None:
    parts = {"critics.adversarial", "critics.perceptual", "modality.codec"}
    assert parts <= {".".join(n.split(".")[:2]) for n in checkpointed(finished, "model")}
    averaged = {".".join(n.split(".")[:2]) for n in checkpointed(finished, "ema")}
    assert averaged == {"critics.adversarial", "modality.codec"}
    files = [p for p in (finished / "final").rglob("*.safetensors") if "prior" not in p.parts]
    assert files
    assert not any("critic" in n or "discrim" in n for f in files for n in read_file(f))


def test_what_a_run_reports(finished: Path) -> None:
    training = {int(line["step"]): line for line in lines(finished) if "loss" in line}
    assert all(("loss/adversarial" in line) == (step > 2) for step, line in training.items())
    assert all("loss/perceptual" in line for line in training.values())
    for line in (line for line in lines(finished) if "val/loss" in line):
        assert {"val/psnr", "val/ssim", "val/perceptual"} <= line.keys()
        assert not {"val/adversarial", "val/discriminator"} & line.keys()
        assert 0 < line["val/psnr"] < 99
        assert -1 < line["val/ssim"] < 1
    sheet = Image.open(finished / "samples" / "image_vae-5" / "s-sheet.png")
    assert sheet.size == (4 + 4 * 20, 4 + 2 * 20)
    above = np.asarray(sheet)[4:20, 4:20]
    assert np.array_equal(above, np.asarray(tiny.square(tiny.CAPTIONS[0])))


# ---- measures ------------------------------------------------------------------------------------


def test_ssim_has_its_known_properties() -> None:
    rng = torch.Generator().manual_seed(0)
    x, noise = (torch.rand(3, 40, 30, generator=rng, dtype=torch.float64) for _ in range(2))
    smooth = torch.nn.functional.avg_pool2d(x, 5, 1, 2)
    values = [ssim(smooth, smooth + s * (noise - 0.5)) for s in (0, 0.05, 0.2, 0.8)]
    assert values[0] == pytest.approx(1)
    assert values == sorted(values, reverse=True)
    assert ssim(x, noise) == pytest.approx(ssim(noise, x), abs=1e-12)
    assert ssim(x, 1 - x) < 0
    assert ssim(255 * x, 255 * noise, peak=255) == pytest.approx(ssim(x, noise), abs=1e-12)
    grey, white = torch.full((1, 16, 16), 0.5), torch.ones(1, 16, 16)
    assert ssim(grey, white) == pytest.approx((2 * 0.5 + 1e-4) / (1.25 + 1e-4))
    assert ssim(x[:, :8, :8], x[:, :8, :8]) == pytest.approx(1)
    with pytest.raises(ValueError, match="of one shape"):
        ssim(x, smooth[:, 1:])


def test_ssim_by_its_definition_at_one_place() -> None:
    x, y = torch.rand(2, 1, 11, 11, dtype=torch.float64)
    place = torch.arange(11, dtype=torch.float64) - 5
    window = torch.exp(-(place[:, None] ** 2 + place**2) / (2 * 1.5**2))
    window = window / window.sum()
    mx, my = (window * x).sum(), (window * y).sum()
    vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
    cov = (window * (x - mx) * (y - my)).sum()
    expected = (2 * mx * my + 1e-4) * (2 * cov + 9e-4)
    expected = expected / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
    assert ssim(x, y) == pytest.approx(float(expected))


def test_an_image_is_measured_by_psnr_and_ssim() -> None:
    modality = tiny.pipeline(settings()).modalities["image"]
    x = examples()[0].observations["X"]
    y = x.clone()
    y[0, 0, 0] ^= 255
    found = modality.measure(x, y)
    assert tuple(found) == modality.measures
    assert found["psnr"] == psnr(x, y, peak=255)
    assert modality.measure(x, x) == pytest.approx({"psnr": 99, "ssim": 1})


def test_a_sheet_sets_images_of_many_sizes_in_rows_and_columns() -> None:
    sizes, colours = ((8, 8), (16, 12)), ("red", "blue")
    rows = [[Image.new("RGB", size, colour) for size in sizes] for colour in colours]
    sheet = np.asarray(pixels.tiled(rows, gap=2))
    assert sheet.shape == (2 + 2 * 14, 2 + 10 + 18, 3)
    reds, blues = ((sheet == c).all(-1).sum() for c in ((255, 0, 0), (0, 0, 255)))
    assert reds == blues == 8 * 8 + 16 * 12


# ---- shipped configurations ----------------------------------------------------------------------


@pytest.mark.parametrize("size", [256, 384, 640, 1024])
def test_the_shipped_configurations_are_of_their_size(size: int, weights: Path) -> None:
    config = load_config(f"image-vae-{size}")
    (stage,) = config.stages
    assert set(stage.loss.critics) == {"adversarial", "perceptual"}
    stage.loss.critics["perceptual"] = perceptual_options(weights)
    resolve_plugins(config)
    with torch.device("meta"):
        cls, options = resolve_model(config).modalities["image"]
        image = cls.build(options, None)
    assert isinstance(image, ImageModality)
    assert (image.codec.cell, image.channels, image.config.max_size) == (16, 64, size)
    assert image.config.buckets is not None
    assert max(image.config.buckets) == size


def test_the_tiny_configuration_needs_no_files() -> None:
    assert (shipped() / "image-vae-tiny.yaml").is_file()
    config = load_config("image-vae-tiny")
    resolve_plugins(config)
    assert set(config.stages[0].loss.critics) == {"adversarial"}
    assert all(issubclass(critic, Critic) for critic in ImageModality.critics.values())
