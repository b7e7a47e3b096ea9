"""The draws of training, the loss, and the way back."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import toys

from unified.config.schema import FlowConfig
from unified.flow.matching import FlowMatching
from unified.flow.solvers import SOLVERS, Adaptive, integrate, to_data, to_noise
from unified.flow.timesteps import round_timesteps as rounded
from unified.randomness import Chance, generator
from unified.sequence.packing import NoisyPlaces, PackedBatch, Sample


def corrupted(rate: float = 0.0, count: int = 12, **options: object):
    """Samples, their batch, and what training makes of it."""
    layouts, of = toys.layouts(unconditional_rate=rate), toys.samples(count)
    batch = toys.batch(of, layouts)
    return (
        {p[:3]: layouts[of[p.sample].task][p.kind].noise for p in toys.parts(batch)},
        batch,
        *toys.corrupt(batch, toys.flow(layouts, **options)),
    )


def times(batch: PackedBatch, part: toys.Part) -> torch.Tensor:
    """The timesteps of a part of a batch."""
    return batch.time_RL.flatten()[batch.where[part.modality][part.at]]


def test_heun_is_second_order_and_euler_first():
    """dz/dt = z from t = 1 to 0 takes z to z / e."""
    z = torch.ones(1, dtype=torch.float64)
    exact = torch.exp(-z)

    def error(steps: int, solver: str) -> float:
        return float((integrate(lambda z, t: z, z, to_data(steps, z), solver) - exact).abs())

    assert 1.8 < error(32, "euler") / error(64, "euler") < 2.2
    assert 3.6 < error(32, "heun") / error(64, "heun") < 4.4


def test_one_set_of_solvers_takes_the_steps_of_the_textbook():
    """Bit for bit in the arithmetic of generation, at timesteps that are exactly the schedule's."""
    z0, asked = torch.randn(5, 4, generator=generator(0)), []

    def field(z, t):
        asked.append(t)
        return z.sin() * (1 + t)

    steps = to_data(6, z0, shift=3.0)
    euler, heun, ab2, before = z0, z0, z0, None
    for t, t_next, h in steps:
        euler = euler + h * field(euler, t)
        first = field(heun, t)
        heun = heun + h * 0.5 * (first + field(heun + h * first, t_next))
        v = field(ab2, t)
        ab2 = ab2 + h * (v if before is None else v + 0.5 * h / before[1] * (v - before[0]))
        before = v, h
    asked.clear()
    for solver, wanted in {"euler": euler, "heun": heun, "ab2": ab2}.items():
        assert torch.equal(integrate(field, z0, steps, solver), wanted)
    times = {float(t) for step in steps for t in step[:2]}
    assert {float(t) for t in asked} <= times


@pytest.mark.parametrize("solver", ["euler", "heun", "ab2", "rk4", "dopri5"])
def test_every_solver_goes_either_way(solver: str):
    """dz/dt = z: from t = 0 to 1 times e, and back."""
    z = torch.ones(3, 2, dtype=torch.float64)
    there = integrate(lambda z, t: z, z, to_noise(200, z), solver)
    back = integrate(lambda z, t: z, there, to_data(200, z), solver)
    torch.testing.assert_close(there, z * torch.e, atol=1e-2, rtol=0)
    torch.testing.assert_close(back, z, atol=1e-2, rtol=0)
    if SOLVERS[solver].error:
        exact = integrate(lambda z, t: z, z, Adaptive(1e-9, z), solver)
        torch.testing.assert_close(exact, z * torch.e, atol=1e-8, rtol=0)


def test_unknown_solver_and_no_steps_are_sentences():
    with pytest.raises(ValueError, match="unknown solver 'rk9'"):
        integrate(lambda z, t: z, torch.ones(1), [], "rk9")
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        to_data(0, torch.ones(1))


def test_timestep_distributions():
    """Of the blocks of a long text."""
    layouts = toys.layouts(block=1)

    def drawn(count: int, **options: object) -> torch.Tensor:
        batch = toys.batch([Sample("continuation", {"C": (count,)})], layouts, None)
        flow = toys.flow(layouts, timesteps={"text": options})
        return flow.draw(batch, Chance(0), toys.CHANNELS).t_G

    t = drawn(20_000, loc=1.0, scale=0.5)
    assert len(t.unique()) > 19_000
    logit = torch.logit(t.double())
    assert abs(float(logit.mean()) - 1.0) < 0.02
    assert abs(float(logit.std()) - 0.5) < 0.02
    u = drawn(20_000, distribution="uniform")
    assert abs(float(u.mean()) - 0.5) < 0.01
    assert abs(float(u.std()) - 12**-0.5) < 0.01
    fixed = drawn(5, loc=1.0, scale=0.0)
    torch.testing.assert_close(fixed, torch.sigmoid(torch.ones(5)))


def test_each_modality_has_its_own_timesteps():
    """Told by the configuration, or by the modality itself."""
    layouts, of = toys.layouts(), toys.samples(12)
    told = {"image": {"loc": -2.0, "scale": 0.0}, "text": {"scale": 0.0}}
    flow = FlowMatching(FlowConfig.model_validate({"timesteps": told}), layouts, {"text": 1.0})
    batch = toys.batch(of, layouts)
    noisy, _ = flow.corrupt(batch, flow.draw(batch, Chance(0), toys.CHANNELS))
    found: dict[str, set[float]] = {}
    for part in toys.parts(batch):
        found.setdefault(part.modality, set()).update(times(noisy, part).tolist())
    for m, loc in (("image", -2.0), ("text", 1.0)):
        expected = float(torch.sigmoid(torch.tensor(loc)))
        assert sorted(found[m]) == pytest.approx([0.0, expected])


def test_relabelling_has_its_rate():
    layouts = toys.layouts(block=1, unconditional_rate=0.3)
    batch = toys.batch([Sample("continuation", {"C": (20_000,)})], layouts, None)
    relabelled = toys.flow(layouts).draw(batch, Chance(0), toys.CHANNELS).unconditional_G
    assert float(relabelled.double().mean()) == pytest.approx(0.3, abs=0.01)


def test_rounding_is_in_thousandths():
    t = torch.tensor([0.9375, 0.12345])
    assert rounded(t, "none").equal(t)
    torch.testing.assert_close(rounded(t, "integer"), torch.tensor([0.938, 0.123]))
    torch.testing.assert_close(rounded(t, "bfloat16"), torch.tensor([0.936, 0.1235]))


def test_one_timestep_per_text_block_and_per_image():
    noise, batch, noisy, _ = corrupted(clean_prefix_rate=0.0)
    for part in toys.parts(batch):
        time, how = times(noisy, part), noise[part[:3]]
        blocks = part.block.unique()
        if how == "clean":
            assert not time.any()
        elif how == "segment":
            assert len(time.unique()) == 1
        else:
            assert [len(time[part.block == b].unique()) for b in blocks] == [1] * len(blocks)
            assert len(time.unique()) == len(blocks)
    t_T, index_RL = noisy.timesteps
    assert t_T[index_RL].equal(noisy.time_RL)


def test_corrupted_latents_are_on_the_path_at_their_timesteps():
    """Clean ones stay as they are, and the targets are the path's velocities."""
    _, batch, noisy, targets = corrupted(clean_prefix_rate=0.3)
    for m, target in targets.items():
        z0, z_t = batch.latents[m][target.at_M], noisy.latents[m][target.at_M]
        t = noisy.time_RL.flatten()[batch.where[m][target.at_M]][:, None].double()
        assert t.all()
        torch.testing.assert_close(z_t - t * target.velocity_MC, z0)
        clean = torch.ones(len(batch.latents[m]), dtype=torch.bool)
        clean[target.at_M] = False
        assert noisy.latents[m][clean].equal(batch.latents[m][clean])
        assert not noisy.time_RL.flatten()[batch.where[m][clean]].any()


def test_clean_left_parts_are_clean_and_do_not_count():
    noise, batch, noisy, targets = corrupted(clean_prefix_rate=1.0)
    counted = {m: torch.zeros(len(z), dtype=torch.bool) for m, z in batch.latents.items()}
    for m, target in targets.items():
        counted[m][target.at_M] = True
    found = 0
    for part in toys.parts(batch):
        here = counted[part.modality][part.at]
        if noise[part[:3]] == "block":
            for b in part.block.unique():
                inside = part.block == b
                known = ~here[inside]
                length = int(known.sum())
                assert 1 <= length <= len(known) - 1
                assert known[:length].all()
                assert not times(noisy, part)[inside][known].any()
                found += length
        else:
            assert here.all() == (noise[part[:3]] == "segment")
        same = noisy.latents[part.modality][part.at] == batch.latents[part.modality][part.at]
        assert same[~here].all()
        assert not same[here].any()
    assert found
    counts = FlowMatching.counts(noisy)
    assert counts == {f"flow/{m}": float(c.sum()) for m, c in counted.items()}


def test_every_length_of_a_clean_left_part_is_drawn_alike():
    layouts = toys.layouts(block=4)
    batch = toys.batch([Sample("continuation", {"C": (4000,)})], layouts, None)
    kept = toys.flow(layouts, clean_prefix_rate=0.6).keep_beginnings(batch, Chance(0))
    noisy = NoisyPlaces(*kept.noisy["text"])
    left = 4 - noisy.group.bincount(minlength=1001)[1:]
    shares = left.bincount(minlength=4).double() / 1000
    torch.testing.assert_close(
        shares, torch.tensor([0.4, 0.2, 0.2, 0.2]).double(), atol=0.04, rtol=0
    )
    none = toys.flow(layouts, clean_prefix_rate=0.0)
    assert none.keep_beginnings(batch, Chance(0)).noisy["text"].equal(batch.noisy["text"])


def test_draws_do_not_depend_on_the_batch():
    """A sample alone and the same sample among others, in any order, get the same chance: the same
    parts stay clean, and timesteps, noise and relabelling are the same."""
    layouts, of = toys.layouts(unconditional_rate=0.5), toys.samples(9)
    values = toys.latents(of, layouts)
    flow = toys.flow(layouts, clean_prefix_rate=0.5)

    def draw(order: list[int], **options: int | None) -> dict[int, list[torch.Tensor]]:
        some = [of[i] for i in order]
        batch = toys.batch(some, layouts, values=[values[i] for i in order], slots=order, **options)
        noisy, targets = toys.corrupt(batch, flow)
        by_sample: dict[int, list[torch.Tensor]] = {}
        for part in toys.parts(batch):
            m, where = part.modality, batch.where[part.modality][part.at]
            rows = (
                noisy.time_RL,
                noisy.coordinates.kind,
                noisy.coordinates.block,
                noisy.step_RL > 0,
            )
            target = targets[m]
            velocity_NC = torch.zeros_like(batch.latents[m])
            velocity_NC[target.at_M] = target.velocity_MC
            weight_N = torch.zeros(len(velocity_NC))
            weight_N[target.at_M] = target.weight_M
            found = [noisy.latents[m], velocity_NC, weight_N]
            by_sample.setdefault(order[part.sample], []).extend(
                [
                    *(t[part.at] for t in found),
                    *(t.flatten()[where] for t in rows),
                    noisy.pos_RLA.flatten(0, 1)[where],
                ]
            )
        return by_sample

    together = draw(list(range(9))[::-1])
    assert len(together) == 9
    for options in ({"row_length": 64}, {"row_length": 37}, {"row_length": None}):
        for i in range(9):
            for a, b in zip(draw([i], **options)[i], together[i], strict=True):
                assert torch.equal(a, b)


def test_other_steps_and_other_stages_have_other_chance():
    layouts, of = toys.layouts(unconditional_rate=0.5), toys.samples(9)
    batch, flow = toys.batch(of, layouts), toys.flow(layouts)
    chances = [Chance(0, "one"), Chance(0, "two"), Chance(0, "one", 1), Chance(1, "one")]
    drawn = [flow.draw(batch, chance, toys.CHANNELS) for chance in chances]
    for i, one in enumerate(drawn):
        again = flow.draw(batch, chances[i], toys.CHANNELS)
        assert again.t_G.equal(one.t_G)
        for other in drawn[:i]:
            assert not (one.t_G == other.t_G).any()
            for m in one.noise:
                assert not (one.noise[m] == other.noise[m]).any()


def test_gradients_reach_the_encoders_as_configured():
    """Never through clean history (eq. 3.17); through the noisy block and the target by option."""
    layouts, of = toys.layouts(), toys.samples(6)
    model = toys.prior()
    options = (True, False)
    for noisy_on, target_on in product(options, options):
        flow = toys.flow(
            layouts, grad_through_noisy=noisy_on, grad_through_target=target_on, clean_prefix_rate=0
        )
        values = toys.latents(of, layouts)
        for one in values:
            for z in one.values():
                z.requires_grad_()
        noisy, targets = toys.corrupt(toys.batch(of, layouts, values=values), flow)
        for m in noisy.latents:
            assert noisy.latents[m].requires_grad == noisy_on
            assert targets[m].velocity_MC.requires_grad == target_on
        loss = sum(FlowMatching.loss(model(noisy), targets).values())
        loss.backward()
        reached = any(z.grad is not None and z.grad.any() for one in values for z in one.values())
        assert reached == (noisy_on or target_on)


def test_clean_history_carries_no_gradient():
    """With the only way in being clean context (P, I of captioning), nothing comes back."""
    layouts = toys.layouts()
    of = [s for s in toys.samples(20) if s.task == "captioning"]
    values = toys.latents(of, layouts)
    for one in values:
        for z in one.values():
            z.requires_grad_()
    noisy, targets = toys.corrupt(toys.batch(of, layouts, values=values), toys.flow(layouts))
    sum(FlowMatching.loss(toys.prior()(noisy), targets).values()).backward()
    for one in values:
        assert one["C"].grad is not None
        assert one["C"].grad.any()
        for kind in ("P", "I"):
            assert one[kind].grad is None or not one[kind].grad.any()
