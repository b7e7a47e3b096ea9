"""Things of different sizes in one tensor: what goes in comes out, in its order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from unified.latents.modality import by_shape, decode, encode, modes
from unified.latents.ragged import (
    Latent,
    Latents,
    Posteriors,
    Ragged,
    numbers,
    pad,
    places,
    runs_of,
    unpad,
)
from unified.pipeline import UnifiedPipeline
from unified.randomness import generator

#: lengths of rows: equal ones, ragged ones, some empty, one alone
LENGTHS = [[3, 3, 3], [1, 4, 2, 4], [0, 2, 0], [5], [2, 0]]
#: shapes of items, sorted
SHAPES = [(2,), (2,), (5,), (7,), (7,), (7,)]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator("ragged", seed, *shape), dtype=torch.float64)


# ---- rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("rest", [(), (3,), (2, 3)])
def test_rows_are_filled_up_on_the_right_and_come_back(lengths: list[int], rest: tuple[int, ...]):
    items = [rand(n, *rest, seed=i) for i, n in enumerate(lengths)]
    length_B, longest, values_N = torch.tensor(lengths), max(lengths), torch.cat(items)
    rows_BT = pad(values_N, length_B, longest, fill=-7.0)
    assert rows_BT.shape == (len(lengths), longest, *rest)
    for row_T, item in zip(rows_BT, items, strict=True):
        assert row_T[: len(item)].equal(item)
        assert (row_T[len(item) :] == -7).all()
    assert unpad(rows_BT, length_B, len(values_N)).equal(values_N)
    place_N = places(length_B, longest, len(values_N))
    assert rows_BT.flatten(0, 1)[place_N].equal(values_N)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_gradients_pass_through_rows_and_not_through_what_fills_them_up(lengths: list[int]):
    length_B, longest = torch.tensor(lengths), max(lengths)
    values_N = rand(sum(lengths), 2).requires_grad_()
    rows_BT = pad(values_N, length_B, longest)
    (gradient,) = torch.autograd.grad(rows_BT.square().sum(), values_N)
    assert gradient.equal(2 * values_N)
    rows_BT = rand(len(lengths), longest, 2).requires_grad_()
    (gradient,) = torch.autograd.grad(unpad(rows_BT, length_B, sum(lengths)).sum(), rows_BT)
    held_BT = torch.arange(longest) < length_B[:, None]
    assert gradient.equal(held_BT[..., None].expand(-1, -1, 2).double())


# ---- observations --------------------------------------------------------------------------------


def test_runs_are_of_items_of_one_shape_that_stand_together():
    assert runs_of(SHAPES) == ((2, (2,)), (1, (5,)), (3, (7,)))
    assert runs_of([]) == ()
    assert numbers(runs_of(SHAPES)) == 30
    assert numbers(((2, (3, 4)), (1, (5, 1)))) == 29


@pytest.mark.parametrize("shapes", [SHAPES, [(3, 2, 2)] * 2 + [(3, 2, 4)], [(4,)], [(4,)] * 3])
def test_items_come_out_as_they_went_in(shapes: list[tuple[int, ...]]):
    items = [rand(*shape, seed=i) for i, shape in enumerate(shapes)]
    ragged = Ragged.of(items)
    assert len(ragged) == len(items)
    assert ragged.runs == runs_of(shapes)
    assert ragged.length_B.tolist() == [shape[0] for shape in shapes]
    assert ragged.longest == max(shape[0] for shape in shapes)
    for one, two in zip(ragged.items(), items, strict=True):
        assert one.equal(two)
    groups = list(ragged.groups())
    assert [(len(group), tuple(group.shape[1:])) for group in groups] == list(ragged.runs)
    assert torch.cat([group.flatten() for group in groups]).equal(ragged.values)
    again = Ragged.flat(ragged.values, ragged.runs)
    assert again.length_B.equal(ragged.length_B)
    for one, two in zip(again.items(), items, strict=True):
        assert one.equal(two)


def test_observations_become_rows_and_parts():
    items = [torch.arange(n) + 10 * i for i, (n,) in enumerate(SHAPES)]
    ragged = Ragged.of(items)
    rows_BT = ragged.padded(-1)
    assert rows_BT.shape == (6, 7)
    assert unpad(rows_BT, ragged.length_B, len(ragged.values)).equal(ragged.values)
    assert (rows_BT == -1).sum() == 42 - 30
    for size in (1, 2, 4, 6, 9):
        parts = list(ragged.parts(size))
        assert [len(part) for part in parts[:-1]] == [size] * (len(parts) - 1)
        assert 1 <= len(parts[-1]) <= size
        found = [item for part in parts for item in part.items()]
        assert all(one.equal(two) for one, two in zip(found, items, strict=True))


def test_values_that_do_not_fill_their_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\[5\] values are not those of items of the shapes"):
        Ragged(torch.zeros(5), ((2, (3,)),), torch.tensor([3, 3]))
    with pytest.raises(ValueError, match=r"grids \(\(2, \(3,\)\),\) do not hold 5 latents"):
        Latents(torch.zeros(5, 2), ((2, (3,)),))
    with pytest.raises(ValueError, match="do not hold 6 latents"):
        Posteriors(torch.zeros(6, 2), torch.zeros(5, 2), ((2, (3,)),))
    with pytest.raises(ValueError, match=r"grid \(2, 2\) does not hold 3 latents"):
        Latent(torch.zeros(3, 2), (2, 2))


# ---- latents and posteriors ----------------------------------------------------------------------

#: grids of items, sorted
GRIDS = [(2,), (2,), (3,), (2, 2), (3, 2), (3, 2)]


def gaussian(grid: tuple[int, ...], seed: int) -> Posteriors:
    shape = (math.prod(grid), 3)
    return Posteriors(rand(*shape, seed=seed), rand(*shape, seed=seed + 50), ((1, grid),))


def gaussians(seed: int = 0) -> list[Posteriors]:
    return [gaussian(grid, seed + i) for i, grid in enumerate(GRIDS)]


def same(one: Posteriors, two: Posteriors) -> bool:
    tensors = one.mean_NC.equal(two.mean_NC) and one.logvar_NC.equal(two.logvar_NC)
    return tensors and one.runs == two.runs


def test_latents_are_grouped_by_their_grids():
    latents = [Latent(rand(math.prod(g), 2, seed=i), g) for i, g in enumerate(GRIDS)]
    together = Latents.of(latents)
    assert together.runs == ((2, (2,)), (1, (3,)), (1, (2, 2)), (2, (3, 2)))
    found = [Latent(z, grid) for z_bLC, grid in together.groups() for z in z_bLC]
    for one, two in zip(found, latents, strict=True):
        assert one.grid == two.grid
        assert one.values.equal(two.values)


def test_posteriors_come_apart_as_they_came_together():
    each = gaussians()
    together = Posteriors.cat(each)
    assert len(together) == len(each)
    assert all(same(one, two) for one, two in zip(together.items(), each, strict=True))
    assert [p.grid for p in together.items()] == GRIDS
    nested = Posteriors.cat([Posteriors.cat(each[:2]), Posteriors.cat(each[2:])])
    assert nested.mean_NC.equal(together.mean_NC)
    assert all(same(one, two) for one, two in zip(nested.items(), each, strict=True))
    merged = Posteriors(together.mean_NC, together.logvar_NC, runs_of(GRIDS))
    assert all(same(one, two) for one, two in zip(merged.items(), each, strict=True))
    assert together.mode.values.equal(together.mean_NC)
    with pytest.raises(ValueError, match="too many values to unpack"):
        _ = together.grid  # there are several


def test_what_is_said_of_posteriors_is_the_sum_over_their_items():
    each, others = gaussians(), gaussians(seed=100)
    together, other = Posteriors.cat(each), Posteriors.cat(others)
    values_NC = rand(len(together.mean_NC), 3, seed=9)
    apart = values_NC.split([math.prod(grid) for grid in GRIDS])
    sums = {
        "kl": (together.kl(), sum(p.kl() for p in each)),
        "to another": (
            together.kl(other),
            sum(p.kl(q) for p, q in zip(each, others, strict=True)),
        ),
        "entropy": (together.entropy(), sum(p.entropy() for p in each)),
        "density": (
            together.log_prob(values_NC),
            sum(p.log_prob(z) for p, z in zip(each, apart, strict=True)),
        ),
    }
    for whole, added in sums.values():
        torch.testing.assert_close(whole, added)
    density_N = together.log_density(values_NC)
    assert density_N.shape == (len(values_NC),)
    several_KN = together.log_density(torch.stack([values_NC, 0 * values_NC]))
    torch.testing.assert_close(several_KN[0], density_N)


def test_posteriors_are_the_gaussians_of_torch():
    p, q = (Posteriors.cat(gaussians(seed)) for seed in (0, 100))
    theirs, other = (
        torch.distributions.Normal(x.mean_NC, (0.5 * x.logvar_NC).exp()) for x in (p, q)
    )
    standard = torch.distributions.Normal(torch.zeros_like(p.mean_NC), 1.0)
    divergence = torch.distributions.kl_divergence
    torch.testing.assert_close(p.kl(), divergence(theirs, standard).sum())
    torch.testing.assert_close(p.kl(q), divergence(theirs, other).sum())
    torch.testing.assert_close(p.kl(p), torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(p.entropy(), theirs.entropy().sum())
    values_NC = rand(*p.mean_NC.shape, seed=3)
    torch.testing.assert_close(p.log_prob(values_NC), theirs.log_prob(values_NC).sum())
    drawn = p.sample(values_NC)
    assert drawn.runs == p.runs
    torch.testing.assert_close((drawn.values - theirs.mean) / theirs.stddev, values_NC)


# ---- lists through an autoencoder ----------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> UnifiedPipeline:
    pipeline = tiny.pipeline()
    for part in pipeline.modules.values():
        tiny.randomise(part.eval())
    return pipeline


#: of texts, and of images, in no order
SIZES: dict[str, list[Any]] = {
    "text": [7, 3, 12, 3, 1, 7, 5],
    "image": [(16, 16), (8, 16), (16, 16), (16, 8), (8, 8), (8, 16)],
}


def observations(name: str) -> list[Tensor]:
    """Random ones of these sizes."""
    if name == "text":
        drawn = enumerate(SIZES[name])
        return [torch.randint(3, 250, (n,), generator=generator("o", i)) for i, n in drawn]
    return [
        torch.randint(256, (3, *size), generator=generator("o", i), dtype=torch.uint8)
        for i, size in enumerate(SIZES[name])
    ]


def sizes_of(calls: Sequence[Any]) -> list[int]:
    return [sum(count for count, _ in given.runs) for given in calls]


def test_of_one_shape_items_stay_in_their_order():
    assert by_shape([(3,), (1,), (3,), (2,), (1,)]) == [1, 4, 3, 0, 2]
    assert by_shape([]) == []


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("at_once", [None, 1, 2, 4])
def test_a_list_is_encoded_in_its_order(
    model: UnifiedPipeline, name: str, at_once: int | None, monkeypatch: pytest.MonkeyPatch
):
    """However many go through the network together; what is stored does not go through it."""
    modality: Any = model.modalities[name]
    shown = observations(name)
    alone = [modality.encode(modality.collate([o])) for o in shown]
    stored = alone[2]
    given = [stored if i == 2 else o for i, o in enumerate(shown)]
    calls, network = [], modality.encode
    monkeypatch.setattr(modality, "encode", lambda batch: calls.append(batch) or network(batch))
    found = encode(modality, given, at_once)
    assert [p.grid for p in found] == [modality.grid(o) for o in shown]
    assert same(found[2], stored)
    for one, two in zip(found, alone, strict=True):
        assert len(one) == 1
        torch.testing.assert_close(one.mean_NC, two.mean_NC, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(one.logvar_NC, two.logvar_NC, atol=1e-5, rtol=1e-4)
    size, rest = at_once or len(shown), len(shown) - 1
    assert sizes_of(calls) == [min(size, rest - start) for start in range(0, rest, size)]
    assert encode(modality, []) == []
    monkeypatch.setattr(modality, "encode", None)
    assert encode(modality, [stored]) == [stored]


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("at_once", [None, 1, 2, 4])
def test_a_list_is_decoded_in_its_order(
    model: UnifiedPipeline, name: str, at_once: int | None, monkeypatch: pytest.MonkeyPatch
):
    modality: Any = model.modalities[name]
    latents = modes(encode(modality, observations(name)))
    assert [z.grid for z in latents] == [modality.grid(o) for o in observations(name)]
    alone = [modality.decode(Latents.of([z])).items()[0] for z in latents]
    calls, network = [], modality.decode
    monkeypatch.setattr(modality, "decode", lambda batch: calls.append(batch) or network(batch))
    found = decode(modality, latents, at_once)
    for one, two, observation in zip(found, alone, observations(name), strict=True):
        assert one.shape == two.shape == observation.shape
        assert one.device.type == "cpu"
        near = 1 if name == "image" else 0  # of 256 shades
        torch.testing.assert_close(one, two, atol=near, rtol=0)
    size, count = at_once or len(latents), len(latents)
    assert sizes_of(calls) == [min(size, count - start) for start in range(0, count, size)]
    assert decode(modality, []) == []
