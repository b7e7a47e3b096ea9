"""The draws of training, the loss, and the way back."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import toys

from unified.config.schema import TimestepConfig
from unified.flow.matching import FlowMatching
from unified.flow.solvers import SOLVERS, Adaptive, integrate, to_data, to_noise
from unified.flow.timesteps import draw_timesteps
from unified.flow.timesteps import round_timesteps as rounded
from unified.randomness import generator


def drawn(rate: float = 0.0, count: int = 12, **options: object):
    layouts, of = toys.layouts(unconditional_rate=rate), toys.samples(count)
    batch, flow = toys.batch(of, layouts), toys.flow(layouts, **options)
    generators = [generator(0, i) for i in range(count)]
    return batch, flow, flow.draw(batch, [s.task for s in of], toys.CHANNELS, generators)


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
    g = torch.Generator().manual_seed(0)
    t = draw_timesteps(20_000, TimestepConfig(loc=1.0, scale=0.5), g)
    logit = torch.logit(t.double())
    assert abs(float(logit.mean()) - 1.0) < 0.02
    assert abs(float(logit.std()) - 0.5) < 0.02
    u = draw_timesteps(20_000, TimestepConfig(distribution="uniform"), g)
    assert abs(float(u.mean()) - 0.5) < 0.01
    fixed = draw_timesteps(5, TimestepConfig(loc=1.0, scale=0.0), g)
    torch.testing.assert_close(fixed, torch.sigmoid(torch.ones(5)))


def test_rounding_is_in_thousandths():
    t = torch.tensor([0.9375, 0.12345])
    assert rounded(t, "none").equal(t)
    torch.testing.assert_close(rounded(t, "integer"), torch.tensor([0.938, 0.123]))
    torch.testing.assert_close(rounded(t, "bfloat16"), torch.tensor([0.936, 0.1235]))


def test_one_timestep_per_text_block_and_per_image():
    batch, _, draws = drawn(clean_prefix_rate=0.0)
    for span in batch.spans:
        d, here = draws[span.segment.modality], slice(span.start, span.stop)
        time = d.time_N[here]
        if span.segment.noise == "clean":
            assert not time.any()
            assert not d.noisy_N[here].any()
        elif span.segment.noise == "segment":
            assert len(time.unique()) == 1
        else:
            assert [len(time[span.block == b].unique()) for b in span.block.unique()] == [1] * len(
                span.block.unique()
            )
            assert len(time.unique()) == len(span.block.unique())


def test_clean_left_parts_are_clean_and_do_not_count():
    batch, flow, draws = drawn(clean_prefix_rate=1.0)
    noisy, _ = flow.corrupt(batch, draws)
    found = 0
    for span in batch.spans:
        if span.segment.noise != "block":
            continue
        d, here = draws["text"], slice(span.start, span.stop)
        for b in span.block.unique():
            inside = span.block == b
            known = ~d.noisy_N[here][inside]
            length = int(known.sum())
            assert 1 <= length <= len(known) - 1
            assert known[:length].all()
            assert not d.time_N[here][inside][known].any()
            found += length
        same = noisy.latents["text"][here] == batch.latents["text"][here]
        assert same[~d.noisy_N[here]].all()
        assert not same[d.noisy_N[here]].any()
    assert found
    assert FlowMatching.counts(draws)["flow/text"] == float(draws["text"].noisy_N.sum())


def test_draws_do_not_depend_on_the_batch():
    """A sample alone and the same sample among others, in any order, get the same chance."""
    layouts, of = toys.layouts(unconditional_rate=0.5), toys.samples(9)
    flow = toys.flow(layouts, clean_prefix_rate=0.5)

    def draw(order: list[int]) -> dict[int, list[torch.Tensor]]:
        some = [of[i] for i in order]
        batch = toys.batch(some, layouts)
        draws = flow.draw(
            batch, [s.task for s in some], toys.CHANNELS, [generator(0, i) for i in order]
        )
        by_sample: dict[int, list[torch.Tensor]] = {}
        for span in batch.spans:
            parts = [t[span.start : span.stop] for t in draws[span.segment.modality].tensors]
            by_sample.setdefault(order[span.sample], []).extend(parts)
        return by_sample

    together = draw(list(range(9))[::-1])
    for i in range(9):
        for a, b in zip(draw([i])[i], together[i], strict=True):
            assert torch.equal(a, b)


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
        batch = toys.batch(of, layouts).with_latents(values)
        draws = flow.draw(
            batch, [s.task for s in of], toys.CHANNELS, [generator(1, i) for i in range(len(of))]
        )
        noisy, targets = flow.corrupt(batch, draws)
        for m in noisy.latents:
            assert noisy.latents[m].requires_grad == noisy_on
            assert targets[m].requires_grad == target_on
        loss = sum(FlowMatching.loss(model(noisy), targets, draws).values())
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
    batch = toys.batch(of, layouts).with_latents(values)
    flow = toys.flow(layouts)
    draws = flow.draw(
        batch, [s.task for s in of], toys.CHANNELS, [generator(2, i) for i in range(len(of))]
    )
    noisy, targets = flow.corrupt(batch, draws)
    sum(FlowMatching.loss(toys.prior()(noisy), targets, draws).values()).backward()
    for one in values:
        assert one["C"].grad is not None
        assert one["C"].grad.any()
        for kind in ("P", "I"):
            assert one[kind].grad is None or not one[kind].grad.any()
