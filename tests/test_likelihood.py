"""Likelihoods where the answer is known: a linear flow, an enumerable model; and a real one."""

from __future__ import annotations

import json
import math
from importlib import import_module
from itertools import pairwise
from typing import Any

import pytest
import scripts
import tiny
import torch
from torch import Tensor

from unified.likelihood import DensityConfig, estimate, log_density
from unified.likelihood.cnf import probes
from unified.likelihood.score import Scorer
from unified.pipeline import UnifiedPipeline
from unified.randomness import generator

toy = scripts.load("likelihood")
MEAN, FACTOR, linear = toy.MEAN, toy.FACTOR, toy.velocity


def gaussian(z: Tensor) -> Tensor:
    return torch.distributions.MultivariateNormal(MEAN, toy.COVARIANCE).log_prob(z)


def points(count: int = 4) -> Tensor:
    rng = generator(3)
    return MEAN + torch.randn(count, 3, generator=rng, dtype=torch.float64) @ FACTOR.T


@pytest.mark.parametrize(
    ("solver", "steps", "within"),
    [("euler", 400, 2e-2), ("heun", 100, 1e-3), ("rk4", 40, 1e-5), ("dopri5", 1, 1e-5)],
)
def test_a_linear_flow_has_the_gaussian_density(solver: Any, steps: int, within: float) -> None:
    config = DensityConfig(solver=solver, num_steps=steps, trace="exact", tolerance=1e-7)
    found = log_density(linear, points(), config)
    assert found.log_prob.dtype == torch.float64
    torch.testing.assert_close(found.log_prob, gaussian(points()), rtol=0, atol=within)


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_hutchinson_is_unbiased(kind: Any) -> None:
    z = points(1).expand(400, -1)
    config = DensityConfig(num_steps=20, probes=kind)
    found = log_density(linear, z, config, generator(0)).log_prob - gaussian(z)
    assert float(found.std()) > 0.01
    assert abs(float(found.mean())) < 4 * float(found.std()) / math.sqrt(len(found))


def test_probes_are_fixed_per_solve_and_averaged() -> None:
    z = points(1).expand(300, -1)
    spread = [
        float(
            log_density(
                linear, z, DensityConfig(num_probes=n, num_steps=8), generator(1)
            ).log_prob.std()
        )
        for n in (1, 16)
    ]
    assert spread[1] < 0.4 * spread[0]
    drawn = probes(z, DensityConfig(num_probes=2), generator(0))
    assert drawn.shape == (2, 300, 3)
    assert set(drawn.unique().tolist()) == {-1.0, 1.0}


def test_conditions_stay_and_do_not_count() -> None:
    """With one coordinate held, the density is that of the others alone."""
    free = torch.tensor([True, True, False]).expand(2, -1)
    z = points(2)

    def split(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([linear(torch.cat([x[:, :2], 0 * x[:, 2:]], 1), t)[:, :2], x[:, 2:]], 1)

    found = log_density(split, z, DensityConfig(trace="exact"), free_GD=free)
    other = torch.cat([z[:, :2], z[:, 2:] + 5], 1)
    moved = log_density(split, other, DensityConfig(trace="exact"), free_GD=free)
    torch.testing.assert_close(found.log_prob, moved.log_prob)
    torch.testing.assert_close(found.z1[:, 2], z[:, 2])


# ---- a model whose likelihood can be enumerated --------------------------------------------------

#: three symbols; p(z) = N(0, 1) is the density of a flow that stands still, p(x | z) a softmax
WEIGHTS = torch.tensor([[1.5, -0.5, -1.0]], dtype=torch.float64)


def still(z: Tensor, t: Tensor) -> Tensor:
    """N(0, 1) at every t: the velocity of data that are noise already."""
    return z * (2 * t - 1) / (t**2 + (1 - t) ** 2)


def exact_log_likelihood(x: int) -> float:
    """log of the integral of p(x | z) N(z), by quadrature."""
    z = torch.linspace(-12, 12, 20001, dtype=torch.float64)[:, None]
    log_p = (z @ WEIGHTS).log_softmax(-1)[:, x] - 0.5 * z[:, 0] ** 2 - 0.5 * math.log(2 * math.pi)
    return float(torch.logsumexp(log_p, 0) + math.log(24 / 20000))


def log_weights(x: int, count: int, config: DensityConfig, seed: int = 0) -> Tensor:
    """log w of `count` samples of a posterior that is wrong on purpose."""
    rng = generator(seed)
    mean, std = (-0.6, 0.9, 0.7)[x], 1.4
    z = mean + std * torch.randn(count, 1, generator=rng, dtype=torch.float64)
    log_q = -0.5 * ((z - mean) / std) ** 2 - math.log(std) - 0.5 * math.log(2 * math.pi)
    prior = log_density(still, z, config, rng).log_prob
    return (z @ WEIGHTS).log_softmax(-1)[:, x] + prior - log_q[:, 0]


@pytest.mark.parametrize("x", [0, 1, 2])
def test_the_bounds_rise_to_the_exact_likelihood(x: int) -> None:
    """In expectation ELBO <= IWAE-4 <= IWAE-32 <= exact, each step beyond its standard error."""
    config = DensityConfig(trace="exact", num_steps=8)
    log_w = log_weights(x, 32 * 1000, config)
    exact = exact_log_likelihood(x)
    levels = []
    for k in (1, 4, 32):
        found = torch.tensor([estimate(g, "iwae").value for g in log_w.split(k)[:8000]])
        levels.append((float(found.mean()), float(found.std()) / math.sqrt(len(found))))
    elbo = estimate(log_w, "elbo")
    assert abs(levels[0][0] - elbo.value) < 4 * (levels[0][1] + elbo.standard_error)
    for (low, error), (high, other) in pairwise(levels):
        assert high - low > 2 * (error + other)
    assert levels[-1][0] < exact + 3 * levels[-1][1]
    assert exact - levels[-1][0] < 0.3 * (exact - levels[0][0])
    everything = estimate(log_w, "iwae")
    assert abs(everything.value - exact) < 4 * everything.standard_error


def test_hutchinson_raises_iwae_above_the_truth_and_not_elbo() -> None:
    """Its noise in log w is averaged after the exponential: by 0.17 nats here at K = 64."""
    truth = toy.exact()
    plain, noisy = (
        toy.log_weights(16_384, DensityConfig(num_steps=12, **options))
        for options in ({"trace": "exact"}, {"probes": "rademacher"})
    )
    bounds = {n: toy.averaged(w, 64, "iwae") for n, w in (("plain", plain), ("noisy", noisy))}
    assert abs(bounds["plain"][0] - truth) < 4 * bounds["plain"][1]
    assert bounds["noisy"][0] > truth + 5 * bounds["noisy"][1]
    assert bounds["noisy"][0] - bounds["plain"][0] == pytest.approx(0.165, abs=0.04)
    means = [toy.averaged(w, 64, "elbo") for w in (plain, noisy)]
    assert abs(means[0][0] - means[1][0]) < 4 * means[1][1]
    assert means[1][0] < truth - 0.3


@pytest.mark.parametrize(
    ("weights", "estimator", "says"),
    [
        (torch.zeros(0), "elbo", "at least 1 posterior sample, found 0"),
        (torch.tensor([math.nan]), "elbo", "not a number"),
        (torch.zeros(2), "best", "choose elbo or iwae"),
    ],
)
def test_estimates_that_cannot_be_made(weights: Tensor, estimator: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        estimate(weights, estimator)


# ---- a text model -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> UnifiedPipeline:
    pipeline = tiny.pipeline()
    tiny.randomise(pipeline.prior)
    return pipeline


def scorer(model: UnifiedPipeline, **config: Any) -> Scorer:
    layout = model.tasks["continuation"].layout
    settings = DensityConfig(**{"num_steps": 2, **config})
    return Scorer(model.prior, model.modalities["text"], layout, "C", settings)


def ids(model: UnifiedPipeline, text: str) -> Tensor:
    return model.modalities["text"].beginning(text)


def test_blocks_add_up_and_the_conditional_is_joint_minus_prefix(model: UnifiedPipeline) -> None:
    (found,) = model.score(["green square"], ["a big"], num_samples=3, num_steps=2)
    assert found.prefix is not None
    assert found.conditional == pytest.approx(found.joint.value - found.prefix.value)
    assert sum(b["score"] for b in found.blocks) == pytest.approx(found.response.value, rel=1e-5)
    assert all(math.isfinite(v) for b in found.blocks for v in b.values())


def test_a_score_is_a_function_of_its_seed_and_text(model: UnifiedPipeline) -> None:
    both = model.score(["red", "blue"], ["a", "the"], num_samples=2, num_steps=2, seed=4)
    (alone,) = model.score(["blue"], ["the"], num_samples=2, num_steps=2, seed=4)
    assert both[1] == alone
    (other,) = model.score(["blue"], ["the"], num_samples=2, num_steps=2, seed=5)
    assert other.response.value != alone.response.value


def test_a_later_block_does_not_change_the_ones_before(model: UnifiedPipeline) -> None:
    """The factorisation is block-causal: cutting the text off leaves earlier terms as they were."""
    text = ids(model, "a big green square and a small one, more or less, beside it")[:16]
    ahead = scorer(model, trace="exact").terms(text, 0, 2, 0)
    cut = scorer(model, trace="exact").terms(text[:8], 0, 2, 0)
    assert ahead.prior.shape == (2, 4)
    for name in ("prior", "posterior", "decoder"):
        torch.testing.assert_close(getattr(ahead, name)[:, :2], getattr(cut, name))
    other = text.clone()
    other[:4] = text[4:8]  # another beginning
    changed = scorer(model, trace="exact").terms(other, 0, 2, 0)
    assert not torch.allclose(changed.prior[:, 2], ahead.prior[:, 2])


def test_a_prompt_inside_a_block_is_a_condition(model: UnifiedPipeline) -> None:
    """Its latents stay clean while the others flow, and only the others' density counts."""
    text = ids(model, "a big green square and a small red one beside it")
    block = model.tasks["continuation"].config.block
    text = text[: 3 * block]
    whole, part = (scorer(model, trace="exact").terms(text, n, 1, 0) for n in (0, block + 1))
    assert part.prior.shape[1] == whole.prior.shape[1] - 1
    torch.testing.assert_close(part.prior[:, 1], whole.prior[:, 2])
    torch.testing.assert_close(part.decoder[:, 1], whole.decoder[:, 2])
    assert not torch.allclose(part.decoder[:, 0], whole.decoder[:, 1])
    assert not torch.allclose(part.posterior[:, 0], whole.posterior[:, 1])
    # by hand: one Euler step of the free latents, which see the held one at t = 0
    one = scorer(model, trace="exact", solver="euler", num_steps=1)
    held = one.terms(text, block + 1, 1, 0).prior[0, 0]
    field, z = captured(one, text, block + 1)
    v = field(z, torch.tensor(0.0))
    jacobian = torch.autograd.functional.jacobian(lambda x: field(x, torch.tensor(0.0))[1], z)
    free = slice(model.modalities["text"].channels, None)
    trace = jacobian[:, 1].diagonal(0, 0, 1)[free].sum()
    end = (z + v)[1, free]
    by_hand = trace - 0.5 * (end**2 + math.log(2 * math.pi)).sum()
    torch.testing.assert_close(held, by_hand, atol=1e-3, rtol=1e-4)


def captured(of: Scorer, text: Tensor, known: int) -> tuple[Any, Tensor]:
    """The field and the latents [B, D] that `of` integrates for one sample of `text`."""
    module: Any = import_module("unified.likelihood.score")
    seen: list[Any] = []
    real = module.log_density

    def recorded(field: Any, z: Tensor, *rest: Any) -> Any:
        seen.extend((field, z))
        return real(field, z, *rest)

    module.log_density = recorded
    try:
        of.terms(text, known, 1, 0)
    finally:
        module.log_density = real
    field, z = seen
    return field, z.detach()


def test_a_text_is_closed_as_training_closes_it(model: UnifiedPipeline) -> None:
    """An end mark and pads fill the last block; the mark counts if the response ends there."""
    text: Any = model.modalities["text"]
    response = ids(model, "a big green")
    assert len(response) % 4
    seen: list[Tensor] = []
    encode, text.encode = text.encode, lambda o: seen.extend(o.items()) or encode(o)
    try:
        (closed,), (going,) = (
            model.score(["a big green"], num_samples=1, num_steps=2, ends=e) for e in (True, False)
        )
    finally:
        text.encode = encode
    for filled in seen:
        rest = filled[len(response) :].tolist()
        assert rest == [text.tokenizer.eos_id] + [text.tokenizer.pad_id] * (len(rest) - 1)
    assert (closed.tokens, going.tokens) == (len(response) + 1, len(response))
    assert sum(b["decoder"] for b in closed.blocks) < sum(b["decoder"] for b in going.blocks)
    for name in ("prior", "posterior"):
        assert [b[name] for b in closed.blocks] == [b[name] for b in going.blocks]


def test_hutchinson_agrees_with_the_exact_trace(model: UnifiedPipeline) -> None:
    text = ids(model, "a big")
    exact = scorer(model, trace="exact").terms(text, 0, 1, 0).prior
    many = scorer(model, num_probes=256).terms(text, 0, 1, 0).prior
    torch.testing.assert_close(many, exact, rtol=0.05, atol=0.3)


def test_the_jacobian_of_the_normalisation_counts(model: UnifiedPipeline) -> None:
    """In the encoder's own space: the density of normalised latents, plus log |dz / d encoder|."""
    text: Any = model.modalities["text"]
    plain_config = text.config
    shown = ids(model, "a big green square")[:8]
    base = scorer(model, trace="exact").terms(shown, 0, 2, 0)
    text.config = plain_config.model_copy(update={"scaling_factor": 2.0})
    try:
        of = scorer(model, trace="exact")
        scaled = of.terms(shown, 0, 2, 0)
        field, z = captured(of, shown, 0)
        normalised = log_density(field, z, of.config).log_prob
        one = of.terms(shown, 0, 1, 0)
    finally:
        text.config = plain_config
    torch.testing.assert_close(scaled.posterior, base.posterior, rtol=1e-4, atol=1e-3)
    shift = 4 * text.channels * math.log(2.0)  # latents of a block, channels
    torch.testing.assert_close(one.prior[0], normalised + shift, rtol=1e-4, atol=1e-3)
    assert not torch.allclose(scaled.prior, base.prior)


def test_what_json_does_not_have_is_null(model: UnifiedPipeline) -> None:
    (found,) = model.score(["red"], num_samples=1, num_steps=2)
    assert math.isnan(found.response.standard_error)
    told = json.dumps(found.as_json(), allow_nan=False)
    assert json.loads(told)["response"]["standard_error"] is None


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"num_samples": 0}, "at least 1 posterior sample"),
        ({"num_steps": 0}, "num_steps is 0"),
        ({"trace": "guess"}, "trace is 'guess'"),
        ({"estimator": "best"}, "choose elbo or iwae"),
    ],
)
def test_settings_that_make_no_sense(
    model: UnifiedPipeline, arguments: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        model.score(["red"], ["a"], **arguments)
    with pytest.raises(ValueError, match="prompt is empty"):
        model.score([""], ["a"])
