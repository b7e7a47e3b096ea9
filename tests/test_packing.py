"""Packing: which row a sample gets, which latent each position takes, whose chance it has; and that
nothing of a sample depends on what else is in its batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace

import pytest
import tiny
import torch
import toys
from torch import Tensor

from unified.config.schema import PriorConfig, StageConfig
from unified.data.streams import Prepared
from unified.flow.matching import Target
from unified.latents.modality import encode
from unified.latents.tensors import tensors_of
from unified.model.attention import Seen
from unified.model.prior import Prior
from unified.randomness import generator
from unified.sequence import packing
from unified.sequence.layout import Layout, Segment
from unified.sequence.packing import SEGMENTS, NoiseGroups, NoisyPlaces, PackedBatch, Packer, Sample
from unified.sequence.visibility import ALL, UNCONDITIONAL
from unified.training.objectives.joint import JointObjective

#: everything sees everything
OPEN = Layout(
    (Segment("T", "text", "segment"), Segment("I", "image", "segment")),
    {"T": {"T": ALL, "I": ALL}, "I": {"T": ALL, "I": ALL}},
)


def packer(of: Mapping[str, Layout], row_length: int | None = 64, training: bool = False) -> Packer:
    return Packer(of, toys.visibility(of), toys.AXES, row_length, training)


def texts(lengths: Sequence[int]) -> list[Sample]:
    """Samples of so many positions, an even number: half of them clean, half noisy."""
    return [Sample("continuation", {"C": (length // 2,)}) for length in lengths]


# ---- rows ----------------------------------------------------------------------------------------


def rows_by_hand(lengths: Sequence[int], room: int) -> list[list[int]]:
    """The samples of each row: the longest first, each into the fullest row that has room."""
    rows: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        used = [sum(lengths[k] for k in row) for row in rows]
        fits = [r for r, n in enumerate(used) if n + lengths[i] <= room]
        if not fits:
            rows.append([i])
            continue
        rows[max(fits, key=lambda r: (used[r], -r))].append(i)
    return rows


@pytest.mark.parametrize("seed", range(5))
def test_each_sample_goes_into_the_fullest_row_that_has_room(seed: int):
    rng = generator("rows", seed)
    lengths = (2 * torch.randint(1, 20, (40,), generator=rng)).tolist()
    batch = packer(toys.layouts())(texts(lengths))
    wanted = rows_by_hand(lengths, 64)
    assert len(batch.coordinates.sample) == len(wanted)
    for found_L, row in zip(batch.coordinates.sample, wanted, strict=True):
        held = [i for i in row for _ in range(lengths[i])]
        assert found_L.tolist() == held + [-1] * (batch.shape[1] - len(held))
    assert batch.shape[1] == max(sum(lengths[i] for i in row) for row in wanted)
    assert batch.positions == (sum(lengths), batch.time_RL.numel())


def test_without_a_row_length_each_sample_has_a_row():
    batch = packer(toys.layouts(), None)(texts([4, 12, 8]))
    assert batch.shape == (3, 12)
    assert (batch.coordinates.sample >= 0).sum(1).tolist() == [4, 12, 8]
    for i, row_L in enumerate(batch.coordinates.sample):
        assert set(row_L.tolist()) <= {i, -1}


def test_a_shape_is_laid_out_once(monkeypatch: pytest.MonkeyPatch):
    """However many samples have it, in whatever batches; and it is that of each alone."""
    placed, place = [], packing.place

    def counted(*given):
        placed.append(given)
        return place(*given)

    monkeypatch.setattr(packing, "place", counted)
    layouts, of = toys.layouts(), toys.samples(30)
    pack = packer(layouts)
    pack(of), pack(of[::-1]), pack(of[:3])
    assert len(placed) == len({s.shape for s in of}) < len(of)
    moved = [replace(of[0], clock=3), replace(of[0], start=5)]
    pack(moved)
    assert len(placed) == len({s.shape for s in of}) + 2


def test_clock_and_start_move_blocks_and_positions_and_nothing_else():
    layouts, (sample, *_) = toys.layouts(), toys.samples(1)
    pack = packer(layouts, None)
    here, later = pack([sample]), pack([replace(sample, clock=3, start=5)])
    assert later.coordinates.block.equal(here.coordinates.block + 3)
    assert later.pos_RLA.equal(here.pos_RLA + 5)
    assert later.groups.equal(here.groups)
    for m, columns in here.noisy.items():
        assert later.noisy[m].equal(columns)
        assert later.take[m].equal(here.take[m])


# ---- latents -------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_the_order_of_latents_changes_what_is_taken_and_nothing_else(training: bool):
    layouts, of = toys.layouts(), toys.samples(12)
    values = toys.latents(of, layouts)
    order: dict[str, list[tuple[int, str]]] = {}
    for i in torch.randperm(len(of), generator=generator("order")).tolist():
        for kind in reversed(of[i].grids):
            order.setdefault(layouts[of[i].task][kind].modality, []).append((i, kind))
    pack = packer(layouts, training=training)
    plain, other = pack(of), pack(of, order)
    for name in (f.name for f in fields(PackedBatch) if f.name != "take"):
        for one, two in zip(*(tensors_of(getattr(b, name)) for b in (plain, other)), strict=True):
            assert one.equal(two)
    assert any(not plain.take[m].equal(other.take[m]) for m in plain.take)
    given = {m: torch.cat([values[i][kind] for i, kind in some]) for m, some in order.items()}
    there = toys.batch(of, layouts, training=training)
    for m, z_NC in other.with_latents(given).latents.items():
        assert z_NC.equal(there.latents[m])


@pytest.mark.parametrize("training", [False, True])
def test_a_twin_takes_what_it_copies(training: bool):
    layouts, of = toys.layouts(), toys.samples(12)
    batch = toys.batch(of, layouts, training=training)
    found = {part[:2]: part for part in toys.parts(batch)}
    twins = 0
    for (sample, kind), part in found.items():
        copied = layouts[of[sample].task][kind].copies
        original = found.get((sample, copied))
        if original is None:
            continue
        taken, copies = (batch.take[p.modality][p.at] for p in (original, part))
        assert copies[: len(taken)].equal(taken)  # training may leave out the last clean block
        assert training or len(taken) == len(copies)
        twins += 1
    assert twins


def test_a_batch_of_no_samples_has_no_positions():
    batch = packer(toys.layouts())([])
    assert batch.positions == (0.0, 0.0)
    assert not batch.where
    assert batch.groups.shape[1] == batch.chances.shape[1] == 0


# ---- what is corrupted ---------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_noise_groups_are_the_blocks_of_noisy_texts_and_whole_noisy_images(training: bool):
    layouts = toys.layouts(unconditional_rate=0.25)
    old = layouts["text_to_image"]
    heavy = [replace(s, weight=2.5 if s.kind == "I" else 0.5) for s in old.segments]
    layouts["text_to_image"] = replace(old, segments=tuple(heavy), unconditional_rate=0.5)
    of, slots = toys.samples(15), [7 * i + 3 for i in range(15)]
    batch = toys.batch(of, layouts, slots=slots, training=training)
    names = packer(layouts).names
    groups, seen = NoiseGroups(*batch.groups), 0
    for part in toys.parts(batch):
        layout, m = layouts[of[part.sample].task], part.modality
        segment, group_RL = layout[part.kind], batch.group_RL.flatten()
        group_N = group_RL[batch.where[m][part.at]]
        if segment.noise == "clean":
            assert not group_N.any()
            continue
        own = part.block - part.block[0] if segment.noise == "block" else 0 * part.block
        assert (group_N - group_N[0]).equal(own)
        item = SEGMENTS * slots[part.sample] + layout.segments.index(segment)
        for number in range(int(own.max()) + 1):
            g = int(group_N[0]) + number - 1
            found = (groups.item[g], groups.number[g], groups.size[g])
            assert [int(x) for x in found] == [item, number, int((own == number).sum())]
            assert names[groups.modality[g]] == m
            assert bool(groups.blockwise[g]) == (segment.noise == "block")
            assert batch.chances[:, g].tolist() == [layout.unconditional_rate, segment.weight]
            seen += 1
        noisy = NoisyPlaces(*batch.noisy[m])
        mine = torch.isin(noisy.at, part.at)
        assert noisy.at[mine].equal(part.at)
        assert (noisy.item[mine] == item).all()
        assert noisy.place[mine].equal(torch.arange(len(part.at)))
        assert noisy.group[mine].equal(group_N)
        within = [i for n in own.unique(return_counts=True)[1].tolist() for i in range(n)]
        assert noisy.within[mine].tolist() == within
    assert seen == batch.groups.shape[1] == int(batch.group_RL.max())
    assert batch.step_RL.equal(batch.group_RL)


# ---- what attention may leave out ----------------------------------------------------------------


def open_batch(
    layout: Layout = OPEN, row_length: int | None = None, other: int = 5, training: bool = True
) -> PackedBatch:
    """Two samples, whose texts have 5 and `other` latents."""
    of = [Sample("t", {"T": (n,), "I": (2, 2)}) for n in (5, other)]
    return toys.batch(of, {"t": layout}, row_length, training=training)


def test_a_batch_is_open_where_every_position_sees_all_of_its_row():
    batch = open_batch()
    assert batch.open
    assert batch.rules.dense(batch.coordinates).all()
    hidden = {"T": {"T": ALL}, "I": {"T": ALL, "I": ALL}}
    for closed in (
        open_batch(other=4),  # padding
        open_batch(row_length=18),  # two in a row
        open_batch(replace(OPEN, sees=hidden)),
    ):
        assert not closed.open
        assert not closed.rules.dense(closed.coordinates).all()
    # what is relabelled U sees its own block alone; and outside of training packing does not look
    assert not open_batch(replace(OPEN, unconditional_rate=0.1)).open
    assert not open_batch(training=False).open


def test_what_is_left_out_in_training_does_not_close_a_batch():
    """A clean text of one block, which no noisy position sees, is not there."""
    twin = Layout(
        (Segment("C", "text", block=4), Segment("N", "text", "block", "C", 4)),
        toys.layouts()["continuation"].sees,
    )
    batch = toys.batch([Sample("t", {"C": (4,)})] * 2, {"t": twin}, None, training=True)
    assert batch.shape == (2, 4)
    assert batch.open
    assert batch.rules.dense(batch.coordinates).all()
    assert not toys.batch([Sample("t", {"C": (8,)})], {"t": twin}, None, training=True).open


def test_an_open_batch_needs_no_mask_and_gives_the_same():
    model, (noisy, _) = toys.prior(), toys.corrupt(open_batch(), toys.flow({"t": OPEN}))
    assert model.geometry(noisy).seen == Seen()
    masked = replace(noisy, open=False)
    assert model.geometry(masked).seen != Seen()
    for m, v in model(masked).items():
        torch.testing.assert_close(model(noisy)[m], v)


def test_a_modality_is_alone_where_its_latents_are_all_positions_in_their_order():
    layouts, rows = toys.layouts(), [8, 8, 8]
    whole = toys.batch(texts(rows), layouts, None)
    assert whole.alone == "text"
    assert whole.where["text"].equal(torch.arange(24))
    assert toys.batch(texts([8, 4]), layouts, None).alone is None  # padding
    # the second sample stands before the first
    assert toys.batch(texts([4, 8]), layouts, 12).alone is None
    assert toys.batch(texts([8, 4]), layouts, 12).alone == "text"
    both = [Sample("text_to_image", {"C": (4,), "I": (2, 2)})]
    assert toys.batch(both, layouts, None).alone is None
    config = PriorConfig(width=16, heads=2, head_dim=8, rope_dim=6)
    model = Prior(config, {"text": toys.CHANNELS["text"]}).double()
    tiny.randomise(model)
    assert model.geometry(whole).where == {"text": slice(None)}
    v = model(replace(whole, alone=None))["text"]
    torch.testing.assert_close(model(whole)["text"], v)


# ---- a sample and its batch ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def stage() -> tuple[JointObjective, list[Prepared]]:
    """A joint stage over a tiny model, and examples of it; of some, latents are stored."""
    tasks = {n: t | {"unconditional_rate": 0.4} for n, t in tiny.TASKS.items()}
    pipeline = tiny.pipeline(tiny.config(tasks=tasks, flow={"clean_prefix_rate": 0.5}))
    for module in pipeline.modules.values():
        tiny.randomise(module)
    layouts = {name: task.layout for name, task in pipeline.tasks.items()}
    settings = StageConfig.model_validate(tiny.joint(row_length=256))
    flow = pipeline.config.flow
    made = JointObjective(pipeline.prior, pipeline.modalities, layouts, settings, flow, 0)
    examples = [replace(e, slot=e.slot + 2) for e in tiny.examples(pipeline, 9)]
    for i in (1, 2, 6):
        layout, given = layouts[examples[i].stream], examples[i].observations
        stored = {
            kind: encode(pipeline.modalities[layout[kind].modality], [o])[0]
            for kind, o in given.items()
        }
        examples[i] = replace(examples[i], observations=stored)
    return made, examples


@torch.no_grad()
def corrupted(of: JointObjective, examples: Sequence[Prepared], step: int) -> list[list[Tensor]]:
    """What the prior is shown and asked of each example: latents, velocities and their weights,
    positions, kinds, blocks and timesteps."""
    found: list[tuple[PackedBatch, dict[str, Target]]] = []
    with pytest.MonkeyPatch.context() as patch:
        corrupt = of.flow.corrupt
        patch.setattr(of.flow, "corrupt", lambda *x: found.append(corrupt(*x)) or found[-1])
        of(of.collate(examples, step))
    ((batch, targets),) = found
    everything: list[list[Tensor]] = [[] for _ in examples]
    for m, z_NC in batch.latents.items():
        target = targets[m]
        velocity_NC = torch.zeros_like(z_NC).index_copy(0, target.at_M, target.velocity_MC)
        weight_N = torch.zeros(len(z_NC)).index_copy(0, target.at_M, target.weight_M)
        at = (batch.coordinates.kind, batch.coordinates.block, batch.time_RL)
        told = [t.flatten()[batch.where[m]] for t in (batch.coordinates.sample, *at)]
        position_NA = batch.pos_RLA.flatten(0, 1)[batch.where[m]]
        for i, own in enumerate(everything):
            mine = told[0] == i
            own += [x[mine] for x in (z_NC, velocity_NC, weight_N, position_NA, *told[1:])]
    return everything


def test_nothing_of_an_example_depends_on_its_batch(stage: tuple[JointObjective, list[Prepared]]):
    """Its latents, noise, timesteps, relabelling and clean beginnings are those it has alone, in
    whatever rows, whether the others are there or not, and in any order."""
    of, examples = stage
    order = [4, 8, 0, 2, 6, 1, 7, 3, 5]
    together = corrupted(of, examples, 3)
    turned = corrupted(of, [examples[i] for i in order], 3)
    for i, wanted in enumerate(together):
        (alone,) = corrupted(of, [examples[i]], 3)
        for other in (alone, turned[order.index(i)]):
            kept = [x for x in wanted if len(x)]  # alone, a batch may lack a modality
            for one, two in zip(kept, (x for x in other if len(x)), strict=True):
                torch.testing.assert_close(one, two, atol=2e-5, rtol=1e-5)
                assert one.dtype.is_floating_point or one.equal(two)
    relabelled = of.visibility.kind_index[UNCONDITIONAL]
    kinds = torch.cat([x[4] for x in together])
    assert (kinds == relabelled).any()
    assert (kinds != relabelled).any()


def test_another_slot_or_step_has_other_chance(stage: tuple[JointObjective, list[Prepared]]):
    of, (example, *_) = stage
    (here,) = corrupted(of, [example], 3)
    (again,) = corrupted(of, [example], 3)
    assert all(one.equal(two) for one, two in zip(here, again, strict=True))
    for other, step in ((replace(example, slot=77), 3), (example, 4)):
        (found,) = corrupted(of, [other], step)
        noisy = (here[2] > 0) & (found[2] > 0)
        assert noisy.any()
        assert not (here[0] == found[0]).all(1).any()
        assert not (here[1] == found[1]).all(1)[noisy].any()
