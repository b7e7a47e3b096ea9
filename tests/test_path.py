"""Paths: what holds for every one, and that all that follows a path follows the configured one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path as File

import pytest
import tiny
import torch
import toys
from torch import Tensor

from unified.cola.official import official_configs
from unified.config.plugins import resolve_plugins
from unified.config.schema import DensityConfig
from unified.data.streams import Prepared
from unified.evaluation.flow_loss import encode, target_loss
from unified.evaluation.robustness import noise_robustness
from unified.flow.matching import FlowMatching
from unified.flow.path import Cosine, Path, Straight
from unified.flow.solvers import integrate, renoise, repaint, schedule, to_data
from unified.generation.blocks import Request
from unified.generation.guidance import Settling
from unified.latents.ragged import Latent
from unified.likelihood.cnf import log_density
from unified.pipeline import UnifiedPipeline
from unified.randomness import Chance, generator
from unified.sequence.packing import NoisyPlaces
from unified.training.objectives.joint import JointObjective
from unified.training.stages import Materials, Sources

PATHS: list[Path] = [Straight(), Cosine()]
every_path = pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__.lower())


def pairs(count: int = 7) -> tuple[Tensor, Tensor]:
    """Latents and noise [count, 3] in float64."""
    return tuple(torch.randn(2, count, 3, generator=generator(0), dtype=torch.float64).unbind(0))  # type: ignore[return-value]


def at(t: float) -> Tensor:
    return torch.tensor(t, dtype=torch.float64)


# ---- what a path is -----------------------------------------------------------------------------


@every_path
def test_a_path_leads_from_the_latent_to_the_noise(path: Path) -> None:
    z0, eps = pairs()
    assert path.at(z0, eps, at(0.0)).equal(z0)
    assert path.at(z0, eps, at(1.0)).equal(eps)
    for dtype in (torch.float32, torch.bfloat16):
        ends = path.coefficients(torch.tensor([0.0, 1.0], dtype=dtype))
        assert [end.tolist() for end in ends] == [[1.0, 0.0], [0.0, 1.0]]


@every_path
def test_the_velocity_is_the_derivative_of_the_path(path: Path) -> None:
    (z0, eps), h = pairs(), 1e-6
    for t in torch.linspace(0, 1, 11, dtype=torch.float64):
        slope = (path.at(z0, eps, t + h) - path.at(z0, eps, t - h)) / (2 * h)
        torch.testing.assert_close(path.velocity(z0, eps, t), slope, atol=1e-8, rtol=1e-8)


@every_path
def test_timesteps_broadcast_over_positions(path: Path) -> None:
    z0, eps = pairs()
    t = torch.rand(len(z0), 1, dtype=torch.float64, generator=generator(1))
    for rule in (path.at, path.velocity):
        rows = [rule(z0[i], eps[i], t[i]) for i in range(len(z0))]
        torch.testing.assert_close(rule(z0, eps, t), torch.stack(rows))


def test_the_straight_path_has_the_numbers_of_its_formulas() -> None:
    z0, eps = (x.float() for x in pairs())
    t = torch.rand(len(z0), 1, generator=generator(1))
    assert Straight().at(z0, eps, t).equal((1 - t) * z0 + t * eps)
    assert Straight().velocity(z0, eps, t).equal(eps - z0)


# ---- the way back -------------------------------------------------------------------------------


@every_path
def test_a_known_velocity_leads_back_to_the_latent(path: Path) -> None:
    z0, eps = pairs()

    def missed(steps: int, solver: str) -> float:
        way = to_data(steps, eps)
        end = integrate(lambda z, t: path.velocity(z0, eps, t), eps, way, solver)
        return float((end - z0).abs().max())

    if isinstance(path, Straight):
        assert all(missed(n, s) < 1e-12 for n in (1, 3, 16) for s in ("euler", "heun"))
    else:
        assert missed(64, "heun") < 1e-3
        assert 1.8 < missed(64, "euler") / missed(128, "euler") < 2.2
        assert 3.6 < missed(64, "heun") / missed(128, "heun") < 4.4


def exact(path: Path, mean: float, scale: float, z: Tensor, t: Tensor) -> Tensor:
    """``E[dz/dt | z_t = z]`` for latents from N(mean, scale^2): what a perfect prior predicts."""
    (alpha, sigma), (fall, rise) = path.coefficients(t), path.rates(t)
    variance = (alpha * scale) ** 2 + sigma**2
    known = (alpha * fall * scale**2 + sigma * rise) / variance
    return fall * mean + known * (z - alpha * mean)


@every_path
def test_a_perfect_prior_makes_the_distribution_of_the_latents(path: Path) -> None:
    eps = torch.randn(5000, 1, generator=generator(2), dtype=torch.float64)
    made = integrate(lambda z, t: exact(path, 2.0, 0.5, z, t), eps, to_data(64, eps), "heun")
    torch.testing.assert_close(made, 2.0 + 0.5 * eps, atol=5e-3, rtol=0)


@every_path
def test_the_density_is_that_of_the_latents(path: Path) -> None:
    z0 = 2.0 + 0.5 * pairs()[0]
    config = DensityConfig(solver="rk4", num_steps=64, trace="exact")
    found = log_density(lambda z, t: exact(path, 2.0, 0.5, z, t), z0, config)
    wanted = torch.distributions.Normal(2.0, 0.5).log_prob(z0).sum(-1)
    torch.testing.assert_close(found.log_prob, wanted.double(), atol=1e-4, rtol=0)


@every_path
def test_renoising_keeps_the_path(path: Path) -> None:
    """z_t taken to a noisier t has that t's mean and variance."""
    rng = generator(0)
    eps, fresh = (torch.randn(200_000, generator=rng, dtype=torch.float64) for _ in range(2))
    t, later = at(0.3), at(0.6)
    z = renoise(path.at(torch.full_like(eps, 2.0), eps, t), fresh, t, later, path)
    alpha, sigma = path.coefficients(later)
    assert float(z.mean()) == pytest.approx(2.0 * float(alpha), abs=0.01)
    assert float(z.std()) == pytest.approx(float(sigma), abs=0.01)
    assert renoise(fresh, eps, t, at(1.0), path).equal(eps)


@every_path
def test_partial_repaint_puts_what_is_known_on_the_path(path: Path) -> None:
    known, start = pairs(2)
    drawn = [torch.randn(2, 3, generator=generator(3, i), dtype=torch.float64) for i in range(4)]
    where = torch.tensor([[True], [False]])

    def still(z: Tensor, t: Tensor) -> Tensor:
        return torch.zeros_like(z)

    noises: Iterator[Tensor] = iter(drawn)
    z = repaint(still, start, known, where, noises, to_data(4, start), "euler", 1.0, 1, path)
    wanted = torch.where(where, path.at(known, drawn[3], at(0.25)), start)
    torch.testing.assert_close(z, wanted, atol=1e-6, rtol=0)


@every_path
def test_a_settled_block_misses_its_end_by_less_than_was_asked(path: Path) -> None:
    """The estimate is of how the velocity changes, whatever the path."""
    z, share = torch.full((2, 3), 1.3, dtype=torch.float64), 0.02

    class Field:
        lengths = (2,)

        def __call__(self, z: Tensor, t: Tensor) -> Tensor:
            return exact(path, 2.0, 0.5, z, t)

    field = Field()
    settling = Settling(field, share)  # type: ignore[arg-type]
    for t, t_next in pairwise(schedule(256, z)):
        before = z
        z = z + (t_next - t) * settling(z, t)
        if not settling.going:
            break
    assert not settling.going, "nothing settled"
    assert float(t) > 2 / 256
    true = before
    for s in torch.linspace(float(t), 0, 2001, dtype=torch.float64)[:-1]:
        true = true - t / 2000 * field(true, s)
    v = field(before, t)
    assert float((before - t * v - true).norm()) < 1.1 * share * float(v.norm())


# ---- the configured one -------------------------------------------------------------------------


BENT = """
import torch
from unified.flow.path import Path


class Bent(Path):
    def coefficients(self, t):
        return 1 - t**2, t

    def rates(self, t):
        return -2 * t, torch.ones_like(t)


class Unfinished(Path):
    def coefficients(self, t):
        return 1 - t, t


class Short(Bent):
    def coefficients(self, t):
        return 1 - 0.9 * t**2, t


class Wrong(Bent):
    def rates(self, t):
        return -t, torch.ones_like(t)


class Endless(Bent):
    def coefficients(self, t):
        return 1 - t**2, t.sqrt()

    def rates(self, t):
        return -2 * t, 0.5 / t.sqrt()


class Early(Bent):
    def coefficients(self, t):
        return 1 - 3 * t**2 + 2 * t**4, t

    def rates(self, t):
        return -6 * t + 8 * t**3, torch.ones_like(t)
"""


@pytest.fixture
def bent(tmp_path: File, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "bent_path.py").write_text(BENT)
    monkeypatch.syspath_prepend(tmp_path)
    return "bent_path:Bent"


def test_a_path_of_one_s_own_is_one_class_and_needs_trust(bent: str) -> None:
    config = tiny.config(flow={"path": bent})
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        resolve_plugins(config)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        FlowMatching(config.flow, toys.layouts())
    z0, eps = pairs()
    z_t = resolve_plugins(config, trust_remote_code=True).path.at(z0, eps, at(0.5))
    torch.testing.assert_close(z_t, 0.75 * z0 + 0.5 * eps)


@pytest.mark.usefixtures("bent")
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("cosin", "unknown path 'cosin'; did you mean cosine?"),
        ("bent_path:Short", "has alpha 0.1 and sigma 1 at t = 1, where a path has 0 and 1"),
        ("bent_path:Wrong", "rates are not the derivatives of its coefficients: at t = 0.05"),
        ("bent_path:Endless", "rates are not finite at t = 0"),
        ("bent_path:Early", "alpha is 0 or less at t = 0.75, where it still has to be above 0"),
        ("bent_path:Unfinished", "cannot be made: .*rates"),
        ("bent_path:torch", "should be a class derived from unified.flow.path:Path"),
    ],
)
def test_what_is_no_path_is_said_in_a_sentence(name: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        resolve_plugins(tiny.config(flow={"path": name}), trust_remote_code=True)
    assert "\n" not in str(caught.value)


def joint(**flow: object) -> tuple[JointObjective, list[Prepared]]:
    """The objective of a joint stage as a run makes it, and some examples."""
    stage = tiny.joint(posterior="mean", row_length=128)
    config = tiny.config(flow={"clean_prefix_rate": 0.0, **flow}, stages=[stage])
    pipeline = tiny.pipeline(config)
    sources, plugins = Sources(config), resolve_plugins(config)
    made = Materials(config, config.stages[0], pipeline, sources, plugins).objective()
    assert isinstance(made, JointObjective)
    return made, tiny.examples(pipeline)


def test_training_follows_the_configured_path() -> None:
    (objective, examples), path = joint(path="cosine"), Cosine()
    rows = objective.collate(examples, 0).rows.under(objective.visibility)
    channels = objective.prior.channels
    z0 = {m: torch.randn(len(rows.where[m]), c) for m, c in channels.items()}
    rows = rows.with_latents(z0)
    draws = objective.flow.draw(rows, Chance(0, "toy", 0), channels)
    noisy, targets = objective.flow.corrupt(rows, draws)
    t_T = torch.cat([torch.zeros(1), draws.t_G])
    for m, z_NC in rows.latents.items():
        of, eps = NoisyPlaces(*rows.noisy[m]), draws.noise[m]
        t = t_T[of.group][:, None]
        wanted = z_NC.index_copy(0, of.at, path.at(z_NC[of.at], eps, t))
        assert noisy.latents[m].equal(wanted)
        assert targets[m].velocity_MC.equal(path.velocity(z_NC[of.at], eps, t))
        assert not noisy.latents[m].equal(z_NC)


def test_a_prior_learns_on_the_cosine_path() -> None:
    objective, examples = joint(path="cosine")
    optimizer = torch.optim.AdamW(objective.prior.parameters(), lr=3e-3)
    losses = []
    for step in range(40):
        batch = objective.collate(examples, step % 2)
        loss = torch.stack(list(objective(batch).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])


@pytest.fixture(scope="module")
def models() -> dict[str, UnifiedPipeline]:
    """The same random weights on two paths."""
    found = {
        name: tiny.pipeline(tiny.config(flow={"path": name})) for name in ("straight", "cosine")
    }
    for pipeline in found.values():
        for module in pipeline.modules.values():
            tiny.randomise(module)
    return found


def test_a_folder_keeps_its_path_and_generates_with_it(
    models: dict[str, UnifiedPipeline], tmp_path: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only repaint asks for the path: all else integrates what the prior says."""
    models["cosine"].save_pretrained(tmp_path / "model")
    read = UnifiedPipeline.from_pretrained(tmp_path / "model")
    asked: list[float] = []
    followed = Cosine.at

    def at_(path: Cosine, z0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        asked.append(float(t))
        return followed(path, z0, eps, t)

    monkeypatch.setattr(Cosine, "at", at_)
    for strategy, times in (("clean", []), ("partial", [1.0, 0.5])):
        read.continue_text(["red square on"], 4, seed=3, num_steps=2, first_block=strategy)
        assert asked == times


def test_repaint_depends_on_the_path_and_a_prompt_held_clean_does_not() -> None:
    def made(path: Path, strategy: str) -> Tensor:
        requests = [Request({"C": Latent(pairs()[0][:6], (6,))}, (12,), 1)]
        asked = ("continuation", "C", requests, toys.settings(4, 2.0, first_block=strategy))
        (latent,) = toys.generate(toys.prior(), toys.layouts(4), *asked, path)
        return latent.values

    assert made(Straight(), "clean").equal(made(Cosine(), "clean"))
    assert not made(Straight(), "partial").allclose(made(Cosine(), "partial"))


def test_a_path_to_code_in_a_folder_is_followed_with_trust_alone(bent: str, tmp_path: File) -> None:
    config = tiny.config(flow={"path": bent})
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        tiny.pipeline(config)
    model = UnifiedPipeline.build(config, {"text": tiny.CAPTIONS}, trust_remote_code=True)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        UnifiedPipeline.from_pretrained(tmp_path / "model")
    read = UnifiedPipeline.from_pretrained(tmp_path / "model", trust_remote_code=True)
    assert type(read.path).__name__ == "Bent"


def test_evaluation_and_inspection_follow_the_path(models: dict[str, UnifiedPipeline]) -> None:
    few = [e for e in tiny.examples(models["straight"], 6) if e.stream == "captioning"]
    encoded = encode(models["straight"], few)
    straight, cosine = (target_loss(m, "captioning", encoded, draws=1) for m in models.values())
    assert not straight.zero_ED.allclose(cosine.zero_ED)
    text = models["straight"].modalities["text"]
    shown = [text.observe(caption, ends=True) for caption in tiny.CAPTIONS[:2]]
    decoded: dict[str, list[Tensor]] = {}
    decode = text.decode
    for name, model in models.items():
        text.decode = lambda z, n=name: decoded.setdefault(n, []).append(z.values) or decode(z)  # type: ignore[method-assign, misc]
        noise_robustness(text, shown, (500,), path=model.path)
    del text.decode
    half = math.sqrt(0.5) / 0.5
    for a, b in zip(decoded["straight"], decoded["cosine"], strict=True):
        torch.testing.assert_close(half * a, b)


def test_an_official_checkpoint_has_the_straight_path() -> None:
    settings = tiny.config(
        flow={"path": "cosine"},
        modalities={"text": tiny.TEXT},
        tasks={"continuation": tiny.TASKS["continuation"]},
    )
    with pytest.raises(ValueError, match=r"has the straight path, .* flow\.path is 'cosine'"):
        official_configs(tiny.pipeline(settings))
