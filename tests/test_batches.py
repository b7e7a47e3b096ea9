"""What crosses to the device in a step: a few tensors, the same ones however they were made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_alignment import alignment

from unified.config.plugins import resolve_plugins
from unified.data.batches import Items
from unified.data.mixture import Mixture
from unified.data.streams import Prepared
from unified.latents.modality import encode
from unified.latents.ragged import Ragged
from unified.latents.tensors import tensors_of
from unified.pipeline import UnifiedPipeline
from unified.training.objectives.objective import Objective
from unified.training.stages import Materials, Sources

LEARNING = {"optimizer": {"vae_lr_ratio": 0.5}}
SIZES = ((16, 16), (8, 16), (16, 8), (8, 8))
#: tensors that a microbatch may have at most
MOST = 30


def made(stage: Mapping[str, Any], **changes: Any) -> tuple[Materials, Objective]:
    """What a stage is made of, and its objective, in float64 and with an open prior."""
    settings = tiny.config(stages=[stage], **changes)
    pipeline = tiny.pipeline(settings)
    tiny.randomise(pipeline.prior)
    plugins = resolve_plugins(settings, trust_remote_code=True)
    materials = Materials(settings, settings.stages[0], pipeline, Sources(settings), plugins)
    return materials, materials.objective().double()


def of_all_tasks(of: UnifiedPipeline, count: int) -> list[Prepared]:
    return tiny.examples(of, count, SIZES)


def of_one(modality: str) -> Callable[[UnifiedPipeline, int], list[Prepared]]:
    """Examples of an autoencoder stage, of several sizes."""

    def examples(of: UnifiedPipeline, count: int) -> list[Prepared]:
        found = []
        for slot in range(count):
            caption = tiny.CAPTIONS[slot % len(tiny.CAPTIONS)]
            image = tiny.square(caption).resize(SIZES[slot % len(SIZES)])
            item = {"text": caption[slot % 5 :], "image": image}[modality]
            observation = of.modalities[modality].observe(item)
            found.append(Prepared("s", f"{slot}", slot, {"X": observation}))
        return found

    return examples


def stored(of: UnifiedPipeline, count: int) -> list[Prepared]:
    """Examples of which only the latents are left, but for every fifth."""
    examples = of_all_tasks(of, count)
    for example in examples:
        layout, observations = of.tasks[example.stream].layout, dict[str, Any](example.observations)
        for kind in observations if example.slot % 5 else ():
            modality = of.modalities[layout[kind].modality]
            with torch.no_grad():
                (observations[kind],) = encode(modality, [observations[kind]])
        example.observations.update(observations)  # type: ignore[attr-defined]
    return examples


#: what a stage is -> its configuration, and how its examples are made
STAGES: dict[str, tuple[dict[str, Any], Callable[[UnifiedPipeline, int], list[Prepared]]]] = {
    "joint": (tiny.joint(), of_all_tasks),
    "joint, packed": (tiny.joint(row_length=96), of_all_tasks),
    "joint, all learn": (tiny.joint(**LEARNING, loss={"ref": 0.1}), of_all_tasks),
    "joint, aligned": (tiny.joint(alignment=alignment(layer=1)), of_all_tasks),
    "joint, stored": (tiny.joint(), stored),
    "text": (tiny.autoencoder("text"), of_one("text")),
    "image": (tiny.autoencoder("image"), of_one("image")),
}
stages = pytest.mark.parametrize("name", STAGES)


# ---- how many ------------------------------------------------------------------------------------


@stages
def test_a_batch_is_a_few_tensors_whatever_its_size(name: str) -> None:
    stage, examples = STAGES[name]
    materials, objective = made(stage, flow={"clean_prefix_rate": 0.3})
    counts = [
        len(tensors_of(objective.collate(examples(materials.pipeline, size), 0)))
        for size in (12, 60, 240)
    ]
    assert max(counts) <= MOST
    assert len(set(counts)) == 1


def test_tensors_are_found_wherever_they_are() -> None:
    ragged = Ragged.of([torch.zeros(2), torch.zeros(3)])
    items = Items(ragged, None, ((2, (1,)),), torch.zeros(2), torch.zeros(2, 2))
    assert len(tensors_of(ragged)) == 2
    assert len(tensors_of({"a": items, "b": (items, [1, "c"], torch.zeros(1))})) == 9


# ---- the order of examples, and the rest of the batch --------------------------------------------


@stages
@torch.no_grad()
def test_the_order_of_the_examples_changes_no_sum_and_no_count(name: str) -> None:
    """But for the place of each in the rows."""
    stage, make = STAGES[name]
    materials, objective = made(stage, flow={"clean_prefix_rate": 0.3})
    examples = make(materials.pipeline, 12)
    batch = objective.collate(examples, 3)
    expected = objective(batch)
    for order in ([*range(11, -1, -1)], torch.randperm(12).tolist()):
        other = objective.collate([examples[i] for i in order], 3)
        assert other.counts == batch.counts
        assert other.positions == batch.positions
        assert shapes(other) == shapes(batch)
        for term, value in objective(other).items():
            torch.testing.assert_close(value, expected[term], rtol=1e-9, atol=1e-9)


def shapes(batch: object) -> list[torch.Size]:
    return sorted(t.shape for t in tensors_of(batch))


@stages
@torch.no_grad()
def test_an_example_is_the_same_beside_any_others(name: str) -> None:
    """Sums of two halves are those of the whole: chance belongs to the example."""
    stage, make = STAGES[name]
    materials, objective = made(stage, flow={"clean_prefix_rate": 0.3})
    examples = make(materials.pipeline, 12)
    whole = objective(objective.collate(examples, 3))
    halves = [objective(objective.collate(examples[i::2], 3)) for i in (0, 1)]
    for term, value in whole.items():
        both = sum(float(half.get(term, 0)) for half in halves)
        assert both == pytest.approx(float(value), rel=1e-9, abs=1e-9), term


# ---- workers -------------------------------------------------------------------------------------


def text_shard(folder: Path, bad: int) -> str:
    """Captions and squares of several sizes; the first `bad` images are none."""
    members = tiny.squares(tiny.CAPTIONS * 4)
    for i in range(len(members) // 2):
        name, _ = members[2 * i]
        image = tiny.square(tiny.CAPTIONS[i % len(tiny.CAPTIONS)]).resize(SIZES[i % len(SIZES)])
        members[2 * i] = (name, b"no image" if i < bad else tiny.as_png(image))
    return tiny.write_shard(folder / f"{bad}.tar", members)


def equal(one: object, other: object) -> bool:
    pairs = zip(tensors_of(one), tensors_of(other), strict=True)
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    "stage",
    [
        tiny.joint(accumulate=2, batch_size=8, row_length=128),
        tiny.joint(alignment=alignment(layer=1)),
        tiny.autoencoder("image", accumulate=2),
    ],
    ids=["joint", "aligned", "image"],
)
@pytest.mark.parametrize("bad", [0, 2])
def test_workers_collate_what_one_process_would(
    tmp_path: Path, stage: dict[str, Any], bad: int
) -> None:
    """A bad example too: then the step is put together where it was replaced."""
    data = {"sources": {"s": {"train": [text_shard(tmp_path, bad)]}}, "max_bad_share": 0.4}
    materials, objective = made(stage, data=data)

    def mixture(workers: int) -> Mixture:
        size = materials.stage.batch_size
        return materials.mixture(size, "joint", workers=workers, collate=objective.collate)

    here, there = mixture(0), [mixture(workers) for workers in (1, 2)]
    met = []
    for step in range(6):
        parts = here.batch(step)
        met.append(here.bad)
        assert len(parts) == materials.stage.accumulate
        for other in there:
            found = other.batch(step)
            assert len(found) == len(parts)
            assert all(equal(a, b) for a, b in zip(parts, found, strict=True))
            assert [p.counts for p in found] == [p.counts for p in parts]
            assert (other.bad, other.truncated) == (here.bad, here.truncated)
    assert (here.bad > 0) == (bad > 0)
    for other in there:
        other.close()


def test_a_bad_example_is_replaced_in_the_main_process_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps without one arrive collated; one with a bad example is collated here."""
    data = {"sources": {"s": {"train": [text_shard(tmp_path, 2)]}}, "max_bad_share": 0.4}
    materials, objective = made(tiny.joint(batch_size=4), data=data)
    here: list[int] = []

    def collate(examples: Sequence[Prepared], step: int) -> Any:
        here.append(step)
        return objective.collate(examples, step)

    mixture = materials.mixture(4, "joint", workers=1, collate=collate)
    replaced = []
    for step in range(20):
        before = mixture.bad
        mixture.batch(step)
        replaced += [step] * (mixture.bad > before)
    mixture.close()
    assert replaced
    assert len(replaced) < 20
    assert here == replaced
