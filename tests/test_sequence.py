"""Layouts, positions, block clocks and packing."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import toys

from unified.model.layers import rotary_turns, rotate
from unified.sequence.layout import Layout, Segment, grid_positions, place
from unified.sequence.packing import Sample, pack
from unified.sequence.visibility import ALL


def test_positions_of_text_image_and_twin():
    layout = toys.layouts()["captioning"]
    placed = place(layout, {"P": (3,), "I": (2, 2), "C": (4,)}, axes=3)
    by_kind = {p.segment.kind: p for p in placed}
    assert by_kind["P"].positions.tolist() == [[0] * 3, [1] * 3, [2] * 3]
    assert by_kind["I"].positions.tolist() == [[3, 3, 3], [3, 3, 4], [3, 4, 3], [3, 4, 4]]
    assert by_kind["C"].positions[0].tolist() == [5, 5, 5]
    assert torch.equal(by_kind["C"].positions, by_kind["N"].positions)
    assert by_kind["P"].blocks.tolist() == [0] * 3
    assert by_kind["I"].blocks.tolist() == [1] * 4
    assert by_kind["C"].blocks.tolist() == by_kind["N"].blocks.tolist() == [2, 2, 3, 3]


def test_every_resolution_starts_where_the_last_segment_ended():
    for grid in ((1, 1), (2, 5), (4, 4)):
        position = grid_positions(grid, 7, 3)
        assert position.shape == (math.prod(grid), 3)
        assert int(position.min()) == 7
        assert int(position.max()) == 7 + max(grid) - 1
    with pytest.raises(ValueError, match="a grid of 2 dimensions needs as many axes"):
        grid_positions((2, 2), 0, 1)


def test_text_rotates_as_in_one_dimension():
    x = torch.randn(6, 2, 8, dtype=torch.float64)
    one = rotate(x, rotary_turns(torch.arange(6)[:, None], 6, 8))
    three = rotate(x, rotary_turns(grid_positions((6,), 0, 3), 6, 8))
    assert torch.equal(one, three)
    # pair j of position 2 turns by 2 theta^(-2j / 6); channels 6 and 7 stay
    a, b = x[2, 0, 2], x[2, 0, 3]
    angle = torch.tensor(2 * 10_000 ** (-2 / 6), dtype=torch.float64)
    torch.testing.assert_close(one[2, 0, 2], a * angle.cos() - b * angle.sin())
    torch.testing.assert_close(one[2, 0, 3], a * angle.sin() + b * angle.cos())
    assert torch.equal(one[..., 6:], x[..., 6:])


def test_packing_holds_each_sample_once_and_rows_stay_short():
    layouts, of = toys.layouts(), toys.samples(30)
    batch = toys.batch(of, layouts, row_length=40)
    lengths = [sum(math.prod(g) for g in s.grids.values()) + math.prod(s.grids["C"]) for s in of]
    counted = torch.bincount(batch.coordinates.sample[batch.coordinates.sample >= 0])
    assert counted.tolist() == lengths
    assert batch.shape[1] <= 40
    assert (batch.coordinates.sample >= 0).double().mean() > 0.8
    for sample in range(len(of)):
        rows = (batch.coordinates.sample == sample).any(1)
        assert int(rows.sum()) == 1


def test_latents_arrive_where_their_coordinates_say():
    layouts, of = toys.layouts(), toys.samples(8)
    batch = toys.batch(of, layouts)
    values = toys.latents(of, layouts)
    found = toys.parts(batch)
    for part in found:
        segment = layouts[of[part.sample].task][part.kind]
        assert part.modality == segment.modality
        here = batch.latents[part.modality][part.at]
        assert torch.equal(here, values[part.sample][segment.copies or segment.kind])
    there = [(i, s.kind) for i, sample in enumerate(of) for s in layouts[sample.task].segments]
    assert sorted(part[:2] for part in found) == sorted(there)
    placed = torch.cat(list(batch.where.values())).sort().values
    assert placed.equal((batch.coordinates.sample.flatten() >= 0).nonzero()[:, 0])


def test_a_sample_longer_than_a_row_is_a_sentence():
    layouts = toys.layouts()
    rule = toys.visibility(layouts)
    with pytest.raises(ValueError, match="a sample of 40 latents does not fit a row of 16"):
        pack([Sample("continuation", {"C": (20,)})], layouts, rule, 16, 3)


def test_a_layout_that_does_not_match_its_table_is_a_sentence():
    with pytest.raises(ValueError, match="copies X"):
        Layout((Segment("N", "text", copies="X"),), {})
    with pytest.raises(ValueError, match="do not match"):
        Layout((Segment("C", "text"),), {"Z": {}})


def on_the_source() -> Layout:
    """A source, an instruction, and a target that lies on the source's positions."""
    segments = (
        Segment("S", "image", name="source"),
        Segment("P", "text"),
        Segment("I", "image", noise="segment", positions_of="S"),
        Segment("A", "text", block=2),
    )
    return Layout(segments, {kind: {kind: ALL} for kind in "SPIA"})


def test_a_segment_may_lie_on_the_positions_of_another():
    grids = {"S": (2, 2), "P": (2,), "I": (2, 2), "A": (4,)}
    placed = place(on_the_source(), grids, axes=2)
    lines = [line.split() for line in (place.__doc__ or "").splitlines()]
    for row, values in (
        ("position", [",".join(map(str, xy)) for p in placed[:3] for xy in p.positions.tolist()]),
        ("block", [str(b) for p in placed[:3] for b in p.blocks.tolist()]),
    ):
        assert [row, *values] in lines  # the drawing of the docstring
    assert placed[3].positions.tolist() == [[4, 4], [5, 5], [6, 6], [7, 7]]  # after all others
    assert placed[3].blocks.tolist() == [3, 3, 4, 4]
    alone = Layout(tuple(replace(s, positions_of=None) for s in on_the_source().segments), {})
    assert place(alone, grids, axes=2)[2].positions[0].tolist() == [4, 4]


def test_positions_are_shared_by_grids_of_one_size():
    says = r"I lies on the positions of S, .* but I is of 2 x 3 and S of 2 x 2"
    with pytest.raises(ValueError, match=says):
        place(on_the_source(), {"S": (2, 2), "P": (2,), "I": (2, 3)}, axes=2)
    with pytest.raises(ValueError, match="I is of 2 x 3 and S absent"):
        place(on_the_source(), {"P": (2,), "I": (2, 3)}, axes=2)


@pytest.mark.parametrize(
    ("segments", "says"),
    [
        ((Segment("I", "image", positions_of="S"),), "should be a segment before it"),
        (
            (Segment("I", "image", positions_of="S"), Segment("S", "image")),
            "I lies on the positions of S, which should be a segment before it",
        ),
        (
            (Segment("S", "image"), Segment("N", "image", copies="S", positions_of="S")),
            "a twin has those of what it copies",
        ),
        ((Segment("S", "image", name="a"), Segment("P", "text", name="a")), "share the name a"),
        ((Segment("S", "image", name="P"), Segment("P", "text")), "share the name P"),
    ],
)
def test_segments_that_do_not_match_are_a_sentence(segments, says):
    with pytest.raises(ValueError, match=says):
        Layout(segments, {})


def test_a_segment_is_found_by_its_name_or_its_letter():
    layout = on_the_source()
    assert layout.find("source") is layout.find("S") is layout["S"]
    assert layout.find("P").title == "P"
    with pytest.raises(ValueError, match=r"no segment 'sauce' to give .*; did you mean source"):
        layout.find("sauce")


def test_training_leaves_out_what_no_loss_depends_on():
    layouts = toys.layouts()
    sizes = {"continuation": {"C": (6,)}, "captioning": {"P": (3,), "I": (2, 2), "C": (4,)}}
    sizes["text_to_image"] = {"C": (4,), "I": (2, 3)}

    def lengths(task: str) -> dict[str, int]:
        batch = toys.batch([Sample(task, sizes[task])], layouts, None, training=True)
        return {part.kind: len(part.at) for part in toys.parts(batch)}

    assert lengths("continuation") == {"C": 4, "N": 6}
    assert lengths("captioning") == {"P": 3, "I": 4, "C": 2, "N": 4}
    assert lengths("text_to_image") == {"C": 4, "I": 6, "N": 4}  # the image sees all of C


def test_the_loss_is_the_same_without_them():
    layouts, of = toys.layouts(unconditional_rate=0.3), toys.samples(12)
    model, flow, losses, gradients = toys.prior(), toys.flow(layouts), [], []
    for training in (False, True):
        noisy, targets = toys.corrupt(toys.batch(of, layouts, training=training), flow)
        found = flow.loss(model(noisy), targets)
        losses.append({term: float(value.detach()) for term, value in found.items()})
        gradients.append(torch.autograd.grad(sum(found.values()), model.parameters()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-10)
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)
