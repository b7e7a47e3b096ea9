"""Alignment with a frozen encoder (REPA): off by default, exact in its counts, and one-sided."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unified.config.plugins import resolve_plugins
from unified.config.schema import Config
from unified.latents.modality import encode
from unified.pipeline import UnifiedPipeline
from unified.training import checkpoint as checkpoint_files
from unified.training.objectives.alignment import on_grid
from unified.training.objectives.joint import JointObjective
from unified.training.run import train
from unified.training.stages import Materials, Sources
from unified.training.work import add, total

FEATURES = 6


class Patches(nn.Module):
    """Mean colours of square patches through one layer; flat, or on their grid."""

    def __init__(self, patch: int = tiny.CELL, flat: bool = False):
        super().__init__()
        self.patch, self.flat = patch, flat
        self.layer = nn.Linear(3, FEATURES)
        self.dropout = nn.Dropout(0.5)

    def forward(self, observations: list[Tensor]) -> list[Tensor]:
        found = [
            self.dropout(self.layer(F.avg_pool2d(o / 255, self.patch).permute(1, 2, 0)))
            for o in observations
        ]
        return [y.flatten(0, 1) for y in found] if self.flat else found


class Lengths:
    """Features of a text: each token's id, once or twice."""

    def __init__(self, repeat: int = 1):
        self.repeat = repeat

    def __call__(self, observations: list[Tensor]) -> list[Tensor]:
        return [o.repeat_interleave(self.repeat)[:, None].float() for o in observations]


def not_callable() -> int:
    return 3


def few(observations: list[Tensor]) -> list[Tensor]:
    return [torch.zeros(7, FEATURES) for _ in observations]


def make_few() -> Any:
    return few


def alignment(name: str = "Patches", **changes: Any) -> dict[str, Any]:
    return {"encoder": f"{__name__}:{name}", "layer": 2, "hidden": 8, **changes}


def settings(aligned: dict[str, Any] | None, **changes: Any) -> Config:
    """One multi-stream block and two single-stream ones."""
    prior = {**tiny.PRIOR, "multi_stream_depth": 1, "single_stream_depth": 2}
    stage = tiny.joint(**({"alignment": aligned} if aligned else {}), **changes)
    return tiny.config(stages=[stage], prior=prior)


def joint(
    aligned: dict[str, Any] | None, trust: bool = True, **changes: Any
) -> tuple[JointObjective, UnifiedPipeline]:
    """The objective in float64, with open gates, and its pipeline."""
    told = settings(aligned, **changes)
    pipeline = tiny.pipeline(told)
    materials = Materials(
        told, told.stages[0], pipeline, Sources(told), resolve_plugins(told, trust)
    )
    objective = materials.objective().double()
    tiny.randomise(pipeline.prior)
    assert isinstance(objective, JointObjective)
    return objective, pipeline


def gradients(module: nn.Module) -> bool:
    return any(p.grad is not None and bool(p.grad.any()) for p in module.parameters())


def test_without_it_nothing_changes() -> None:
    plain, pipeline = joint(None)
    aligned, _ = joint(alignment())
    assert not any("align" in name for name in plain.state_dict())
    names = {n for n in aligned.state_dict() if not n.startswith("alignment.projection.")}
    assert names == set(plain.state_dict())
    examples = tiny.examples(pipeline)
    before, after = (o(o.collate(examples, 0)) for o in (plain, aligned))
    assert after.keys() - before.keys() == {"align/image"}
    assert all(before[k].equal(after[k]) for k in before)
    assert "align/image" not in plain.weights(0)


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_the_gradient_reaches_the_blocks_up_to_the_layer_and_the_projection(layer: int) -> None:
    objective, pipeline = joint(alignment(layer=layer))
    objective(objective.collate(tiny.examples(pipeline), 0))["align/image"].backward()
    reached = [gradients(block) for block in pipeline.prior.blocks]
    assert reached == [i < layer for i in range(3)]
    assert objective.alignment is not None
    assert gradients(objective.alignment.projection)
    assert not gradients(pipeline.prior.project_out)
    assert not any(p.grad is not None for p in objective.alignment.encoder.parameters())


def test_the_encoder_is_frozen_evaluated_and_not_stored() -> None:
    objective, _ = joint(alignment())
    assert objective.alignment is not None
    encoder = objective.alignment.encoder
    objective.train()
    assert not encoder.training
    assert not any(p.requires_grad for p in encoder.parameters())
    trained = {id(p) for group in objective.groups().values() for p in group}
    assert {id(p) for p in objective.alignment.projection.parameters()} <= trained
    assert not {id(p) for p in encoder.parameters()} & {id(p) for p in objective.parameters()}


@pytest.mark.parametrize("modality", ["image", "text"])
def test_the_count_is_of_the_noisy_positions(modality: str) -> None:
    name = {"image": "Patches", "text": "Lengths"}[modality]
    objective, pipeline = joint(alignment(name, modality=modality))
    batch = objective.collate(tiny.examples(pipeline), 0)
    assert batch.counts[f"align/{modality}"] == batch.counts[f"flow/{modality}"] > 0
    (term,) = objective(batch).keys() - {"flow/image", "flow/text"}
    assert term == f"align/{modality}"


def test_a_part_without_noisy_positions_has_no_term() -> None:
    objective, pipeline = joint(alignment())
    captioning = [e for e in tiny.examples(pipeline) if e.stream == "captioning"]
    batch = objective.collate(captioning, 0)
    assert "align/image" not in batch.counts
    # the projection still takes part, as it does on other processes
    found = objective(batch)["align/image"]
    assert float(found.detach()) == 0
    found.backward()
    gradients = [p.grad for p in objective.alignment.parameters()]  # type: ignore[union-attr]
    assert all(g is not None and not g.any() for g in gradients)


@torch.no_grad()
def test_no_split_changes_the_loss() -> None:
    objective, pipeline = joint(alignment())
    examples = tiny.examples(pipeline)

    def loss(*parts: list[Any]) -> float:
        batches = [objective.collate(part, 0) for part in parts]
        counts = add((b.counts for b in batches), list(objective.weights(0)))
        sums = add((objective(b) for b in batches), list(objective.weights(0)))
        return total({k: sums[k] / n for k, n in counts.items() if n}, objective.weights(0))

    assert loss(examples[:2], examples[2:]) == pytest.approx(loss(examples))


@pytest.mark.parametrize("layer", [1, 3])
def test_recomputed_blocks_give_the_same_gradient(layer: int) -> None:
    def gradient(recompute: bool) -> list[Tensor | None]:
        objective, pipeline = joint(alignment(layer=layer))
        for block in pipeline.prior.blocks if recompute else ():
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        sums = objective(objective.collate(tiny.examples(pipeline), 0))
        torch.stack(list(sums.values())).sum().backward()
        return [p.grad for p in objective.parameters()]

    torch.testing.assert_close(gradient(True), gradient(False))


# ---- features ------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_perfect_alignment_is_minus_one() -> None:
    objective, pipeline = joint(alignment())
    batch = objective.collate(tiny.examples(pipeline), 0)
    aligned, seen = objective.alignment, []
    assert aligned is not None
    aligned.projection.register_forward_hook(lambda module, x, y: seen.append(y))
    assert float(objective(batch)["align/image"]) > -batch.counts["align/image"]
    aligned._unregistered = (lambda observations: seen[0].split(4),)
    assert float(objective(batch)["align/image"]) == pytest.approx(-batch.counts["align/image"])


@torch.no_grad()
def test_features_stand_at_the_positions_of_their_image() -> None:
    """The prior's features replaced by those of the encoder, placed by hand."""
    objective, pipeline = joint(alignment())
    examples = tiny.examples(pipeline, 9, ((16, 16), (8, 16), (16, 8)))
    batch = objective.collate(examples, 0)
    assert len({o.shape for e in examples for o in e.observations.values() if o.ndim == 3}) == 3
    aligned = objective.alignment
    assert aligned is not None
    images = [e.observations["I"] for e in examples if "I" in e.observations]
    # the images of a batch, one after the other, are its positions of images
    rows = torch.cat([aligned.encoder([image])[0].flatten(0, 1) for image in images])
    assert len(rows) == len(batch.rows.where["image"])
    aligned.projection = nn.Identity()
    tap = aligned.tap()
    tap.streams = {"image": rows}
    found = aligned.loss(tap, batch.rows, batch.items, batch.aligned)
    assert float(found["align/image"]) == pytest.approx(-batch.counts["align/image"])


def test_features_on_another_grid_are_interpolated() -> None:
    """Of two observations of one shape at once, each by itself."""
    ramp = torch.stack([torch.arange(8.0), -torch.arange(8.0)])[:, None, :, None].expand(2, 4, 8, 1)
    coarse = torch.tensor([0.5, 2.5, 4.5, 6.5] * 2)
    torch.testing.assert_close(on_grid(ramp, (2, 4))[..., 0], torch.stack([coarse, -coarse]))
    assert on_grid(ramp, (4, 8)).equal(ramp.flatten(1, 2))
    assert on_grid(ramp.flatten(1, 2), (2, 4)).equal(on_grid(ramp, (2, 4)))
    assert on_grid(torch.ones(1, 3, 5, 2), (7, 2)).equal(torch.ones(1, 14, 2))
    assert on_grid(torch.arange(6.0)[None, :, None], (3,))[0, :, 0].tolist() == [0.5, 2.5, 4.5]


@pytest.mark.parametrize("options", [{"patch": 4}, {"patch": 2, "flat": True}, {"patch": 16}])
def test_an_encoder_has_a_grid_of_its_own(options: dict[str, Any]) -> None:
    objective, pipeline = joint(alignment(options=options))
    batch = objective.collate(tiny.examples(pipeline), 0)
    assert torch.isfinite(objective(batch)["align/image"])


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"layer": 4}, r"stage joint, alignment.layer is 4, but the prior has 3 blocks: 1 to 3"),
        ({"modality": "sound"}, "stage joint, alignment names the modality 'sound'"),
        ({"name": "Patch"}, "has no 'Patch'"),
        ({"encoder": "dino"}, "the encoder 'dino' should be a path to code"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        train(settings(alignment(**changes)), trust_remote_code=True)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("Patches", {"size": 3}, "alignment.options do not fit test_alignment:Patches: .*'size'"),
        ("not_callable", {}, "should give a callable from observations to features, found int"),
        ("make_few", {}, r"features of shape \[7, 6\] for latents on a grid of 2 x 2"),
    ],
)
def test_an_encoder_that_is_none_is_refused(name: str, options: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        joint(alignment(name, options=options))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"weight": -1}, "greater than or equal to 0"),
        ({"layer": 0}, "greater than 0"),
        ({"enc": 1}, "Extra inputs"),
    ],
)
def test_values_out_of_range_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        settings(alignment(**changes))


def test_an_autoencoder_stage_has_nothing_to_align() -> None:
    with pytest.raises(ValueError, match="belongs in a joint stage"):
        tiny.config(stages=[tiny.autoencoder("image", alignment=alignment())])


def test_code_runs_only_where_it_is_trusted() -> None:
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        train(settings(alignment()))
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        joint(alignment(), trust=False)


def test_stored_latents_have_no_pixels_to_look_at() -> None:
    objective, pipeline = joint(alignment())
    examples, image = tiny.examples(pipeline), pipeline.modalities["image"]
    for example in examples:
        for kind in example.observations.keys() & {"I"}:
            (example.observations[kind],) = encode(image, [example.observations[kind]])
    with pytest.raises(ValueError, match="has only their latents"):
        objective.collate(examples, 0)


# ---- a whole run ---------------------------------------------------------------------------------


def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path: Path) -> None:
    shard = tiny.write_shard(tmp_path / "s.tar", tiny.squares())
    stage = tiny.joint(alignment=alignment(layer=1), steps=4)
    config = {"stages": [stage], "training": {**tiny.tree()["training"], "save_every": 2}}

    def end(folder: str, *sittings: int) -> dict[str, Tensor]:
        for steps in sittings:
            training = {**config["training"], "max_steps": steps}
            told = tiny.config(tmp_path / folder, shard, **{**config, "training": training})
            final = train(told, trust_remote_code=True)
        UnifiedPipeline.from_pretrained(final)
        assert "alignment" not in str(list(load_file(final / "prior" / "model.safetensors")))
        return checkpoint_files.read(tmp_path / folder / "checkpoints" / "joint-4", "model")

    whole, stopped = end("whole", 4), end("stopped", 2, 4)
    assert {"alignment.projection.0.weight", "alignment.projection.4.bias"} <= whole.keys()
    assert not any("encoder.layer" in name for name in whole if name.startswith("alignment"))
    assert all(tensor.equal(stopped[name]) for name, tensor in whole.items())
