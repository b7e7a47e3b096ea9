"""What generation can be told: each option does what it says, and differs from its default."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import tiny
import torch
import toys
from torch import Tensor

from unified.config.schema import GenerationConfig
from unified.data.streams import Prepared
from unified.flow.solvers import integrate, renoise, repaint, schedule, to_data
from unified.generation.blocks import Request
from unified.generation.guidance import Settling, guides
from unified.generation.items import Inference, Wish
from unified.latents.modality import Choice, decode, encode
from unified.latents.ragged import Latent
from unified.modalities.text.decoding import choose, probabilities
from unified.model.kernels.linear import product_dtype
from unified.pipeline import UnifiedPipeline
from unified.randomness import derive, generator, noise
from unified.training import samples

BLOCK = 4
PROMPT = Latent(torch.randn(6, 3, generator=generator(0), dtype=torch.float64), (6,))


def first_noise() -> Tensor:
    """Where the first block of a continuation under seed 0 starts."""
    return noise((BLOCK, 3), 0, "continuation", "C", 0).double()


def made(settings: GenerationConfig, given: Latent | None = PROMPT, seed: int = 1) -> Tensor:
    """A continuation of 6 known latents (one whole block and half of the next) to 12."""
    maker = partial(toys.generate, toys.prior(), toys.layouts(BLOCK))
    request = Request({} if given is None else {"C": given}, (12,), seed)
    return maker("continuation", "C", [request], settings)[0].values


# ---- solvers and their steps --------------------------------------------------------------------


def test_the_multistep_solver_is_of_second_order() -> None:
    one = torch.ones(1, dtype=torch.float64)

    def error(steps: int) -> float:
        z = integrate(lambda z, t: z * t, one, to_data(steps, one), "ab2")
        return abs(float(z) - math.exp(-0.5))

    assert 3.5 < error(32) / error(64) < 4.5
    assert error(64) < 1e-4


def test_a_time_shift_spends_steps_on_noise() -> None:
    even, shifted = (schedule(8, torch.zeros(1), s) for s in (1.0, 3.0))
    torch.testing.assert_close(even, torch.linspace(1, 0, 9))
    torch.testing.assert_close(shifted, 3 * even / (1 + 2 * even))
    assert (shifted[1:-1] > even[1:-1]).all()
    assert (float(shifted[0]), float(shifted[-1])) == (1.0, 0.0)


@pytest.mark.parametrize(
    "change",
    [
        {"solver": "heun"},
        {"solver": "ab2"},
        {"time_shift": 3.0},
        {"num_steps": 5},
        {"round_timesteps": "bfloat16"},
        {"guidance_scale": 3.0},
        {"guidance_interval": (0.5, 1.0)},
        {"unconditional_every": 2},
        {"settle": 0.99},
        {"guider": "zero_star"},
        {"guider": "adaptive_projected"},
        {"guider": "tangential"},
        {"first_block": "partial"},
    ],
)
def test_an_option_changes_the_latents(change: dict[str, Any]) -> None:
    base = {"num_steps": 4, "guidance_scale": 2.0}
    plain, other = made(toys.settings(**base)), made(toys.settings(**(base | change)))
    assert other.shape == plain.shape
    assert not torch.allclose(other, plain, atol=1e-6)


# ---- guidance -----------------------------------------------------------------------------------


def test_outside_its_interval_guidance_costs_nothing() -> None:
    """At t = 1, 0.75, 0.5 and 0.25: guided in [0.5, 0.8] only."""
    model, widths = toys.prior(), []
    model.blocks[0].register_forward_hook(
        lambda _, args, __: widths.append(args[1].geometry.shape[1])
    )
    request = Request({}, (BLOCK,), 0)
    settings = toys.settings(4, 2.0, guidance_interval=(0.5, 0.8))
    toys.generate(model, toys.layouts(BLOCK), "continuation", "C", [request], settings)
    assert widths == [BLOCK, 2 * BLOCK, 2 * BLOCK, BLOCK]


def test_cfg_zero_star_scales_the_unconditional_velocity() -> None:
    """Its first step is left out (velocity 0); then ``s u + g (c - s u)``, s = <c, u> / <u, u>."""
    model = toys.prior()
    layouts = toys.layouts(BLOCK)
    seen: list[Tensor] = []
    model.register_forward_hook(lambda *a: seen.append(a[2]["text"].clone()))
    request = Request({}, (BLOCK,), 0)
    settings = toys.settings(num_steps=20, guidance_scale=2.0, guider="zero_star")
    z = toys.generate(model, layouts, "continuation", "C", [request], settings)[0].values
    by_hand = first_noise()
    for step, v in enumerate(seen):
        c, u = v.split(BLOCK)
        s = (c * u).sum() / (u * u).sum()
        guided = torch.zeros_like(c) if step == 0 else s * u + 2.0 * (c - s * u)
        by_hand = by_hand - guided / 20
    torch.testing.assert_close(z, by_hand, atol=1e-6, rtol=0)


@pytest.mark.parametrize("guider", ["zero_star", "adaptive_projected", "tangential"])
def test_a_guider_sees_what_is_unknown_of_one_block(guider: str) -> None:
    """What the prior says at known positions is not trained, and changes nothing."""
    model = toys.prior()
    settings = toys.settings(4, 2.0, guider=guider)
    requests = [Request({"C": PROMPT}, (8,), 1), Request({}, (8,), 2)]
    maker = partial(toys.generate, model, toys.layouts(BLOCK))
    plain = maker("continuation", "C", requests, settings)

    def spoilt(_m: Any, args: Any, out: dict[str, Tensor]) -> dict[str, Tensor]:
        at_rest = args[0].time_RL.view(-1)[args[0].where["text"]] == 0
        return {"text": torch.where(at_rest[:, None], 1e3, out["text"])}

    model.register_forward_hook(spoilt)
    other = maker("continuation", "C", requests, settings)
    for one, two in zip(plain, other, strict=True):
        torch.testing.assert_close(one.values, two.values)


def test_the_step_that_zero_star_leaves_out_is_the_first_of_all() -> None:
    """Also where guidance begins later."""
    base = {"num_steps": 4, "guidance_scale": 2.0, "guidance_interval": (0.0, 0.8)}
    model = toys.prior()
    seen: list[Tensor] = []
    model.register_forward_hook(lambda *a: seen.append(a[2]["text"].clone()))
    made_by = partial(toys.generate, model, toys.layouts(BLOCK))
    z = made_by("continuation", "C", [Request({}, (BLOCK,), 0)],
                    toys.settings(**base, guider="zero_star"))[0].values  # fmt: skip
    by_hand = first_noise()
    for v in seen:
        c, *u = v.split(BLOCK)
        if u:
            s = (c * u[0]).sum() / (u[0] * u[0]).sum()
            c = s * u[0] + 2.0 * (c - s * u[0])
        by_hand = by_hand - c / 4
    torch.testing.assert_close(z, by_hand, atol=1e-6, rtol=0)


@pytest.mark.parametrize("steps", [5, 10])
def test_the_ends_of_the_interval_are_inside(steps: int) -> None:
    settings = toys.settings(steps, 2.0, guidance_interval=(0.2, 0.8))
    times = schedule(steps, torch.zeros(1))
    guided = [round(float(t), 2) for t in times if guides(settings, t)]
    assert (guided[0], guided[-1]) == (0.8, 0.2)


# ---- shortcuts ----------------------------------------------------------------------------------


def passes(
    settings: GenerationConfig, requests: Sequence[Request]
) -> tuple[list[Latent], list[int]]:
    """What is made, and how many positions each pass of the prior has."""
    model, sizes = toys.prior(), []
    model.register_forward_pre_hook(lambda _, args: sizes.append(args[0].time_RL.numel()))
    made_by = partial(toys.generate, model, toys.layouts(BLOCK))
    return made_by("continuation", "C", requests, settings), sizes


@pytest.mark.parametrize(
    ("changes", "copies"),
    [
        ({}, [2, 1, 1, 2, 1, 1]),
        ({"guidance_interval": (0.2, 0.7)}, [1, 1, 2, 1, 1, 1]),
        # the second evaluation of a step has the timestep of the next one's first; t = 0 is the end
        ({"solver": "heun"}, [2, 1, 1, 1, 1, 2, 2, 1, 1, 1, 1, 2]),
    ],
)
def test_the_unconditional_pass_is_made_in_one_of_so_many_guided_steps(
    changes: dict[str, Any], copies: list[int]
) -> None:
    settings = toys.settings(6, 2.0, unconditional_every=3, **changes)
    _, sizes = passes(settings, [Request({}, (BLOCK,), 0)])
    assert sizes == [BLOCK * n for n in copies]


def test_between_unconditional_passes_guidance_adds_what_it_added() -> None:
    """``v_c + (scale - 1) d`` with d = v_c - v_u of the step before, by hand."""
    model, seen = toys.prior(), []
    model.register_forward_hook(lambda *a: seen.append(a[2]["text"].clone()))
    settings = toys.settings(4, 3.0, unconditional_every=2)
    maker = partial(toys.generate, model, toys.layouts(BLOCK))
    z = maker("continuation", "C", [Request({}, (BLOCK,), 0)], settings)[0].values
    by_hand = first_noise()
    for full, held in (seen[:2], seen[2:]):
        v_c, v_u = full.split(BLOCK)
        for v in (v_c, held):
            by_hand = by_hand - (v + 2 * (v_c - v_u)) / 4
    torch.testing.assert_close(z, by_hand, atol=1e-6, rtol=0)


class Scripted:
    """Blocks of one latent whose velocity is looked up by timestep; it records what is asked."""

    def __init__(self, script: dict[str, list[float]], steps: int):
        self.script, self.steps, self.lengths = script, steps, [1] * len(script)
        self.asked: list[str] = []

    def __call__(self, z: Tensor, t: Tensor) -> Tensor:
        self.asked.append("".join(self.script))
        step = round((1 - float(t)) * self.steps)
        return torch.tensor([[float(v[step])] for v in self.script.values()])

    def only(self, rows: Sequence[int]) -> Scripted:
        names = [list(self.script)[row] for row in rows]
        part = Scripted({name: self.script[name] for name in names}, self.steps)
        part.asked = self.asked
        return part


@pytest.mark.parametrize("solver", ["euler", "heun", "ab2"])
def test_a_settled_block_goes_straight_on_and_the_others_without_it(solver: str) -> None:
    """Of three blocks, one settles at the second step, one at the third, and one never does."""
    script = {"a": [2.0, 2, 8, 8, 8], "b": [1.0, 3, 3, 9, 9], "c": [1.0, 2, 4, 8, 16]}
    field: Any = Scripted(script, 4)
    z = integrate(Settling(field, 0.01), torch.zeros(3, 1), to_data(4, torch.zeros(1)), solver)
    held = {"a": [2.0] * 5, "b": [1.0, 3, 3, 3, 3], "c": script["c"]}
    wanted = integrate(Scripted(held, 4), torch.zeros(3, 1), to_data(4, torch.zeros(1)), solver)
    torch.testing.assert_close(z, wanted)
    assert list(dict.fromkeys(field.asked)) == ["abc", "bc", "c"]
    assert len(field.asked) == (8 if solver == "heun" else 4)


def test_when_all_have_settled_there_are_no_more_passes() -> None:
    """A velocity that does not change is followed exactly, at the cost of two passes."""
    field: Any = Scripted({"a": [2.0] * 9, "b": [-1.0] * 9}, 8)
    z = integrate(Settling(field, 0.01), torch.ones(2, 1), to_data(8, torch.ones(1)))
    torch.testing.assert_close(z, torch.tensor([[-1.0], [2.0]]))
    assert field.asked == ["ab", "ab"]


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_block_has_settled_when_a_straight_line_misses_by_little(shift: float) -> None:
    """v = 4 + t: from t on, a straight line misses by t^2 / 2, whatever the steps are."""
    asked: list[float] = []

    class Linear:
        lengths = (1,)

        def __call__(self, z: Tensor, t: Tensor) -> Tensor:
            asked.append(float(t))
            return 4 + t.expand(1, 1)

    field: Any = Linear()
    integrate(Settling(field, 0.02), torch.zeros(1, 1), to_data(20, torch.zeros(1), shift))
    close = [t for t in schedule(20, torch.zeros(1), shift).tolist() if t**2 / 2 < 0.02 * (4 + t)]
    assert asked[-1] == close[0]


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("change", [{"settle": 0.3}, {"settle": 0.3, "unconditional_every": 3}])
def test_a_shortcut_does_not_depend_on_the_batch(solver: str, change: dict[str, Any]) -> None:
    """Blocks settle at steps of their own, also while guidance is held."""
    whole = Latent(torch.cat([PROMPT.values, PROMPT.values[:2]]), (8,))
    requests = [Request(g, (12,), i) for i, g in enumerate(({"C": whole}, {}, {"C": PROMPT}))]
    settings = toys.settings(9, 2.0, solver, **change)
    together, sizes = passes(settings, requests)
    assert len(set(sizes)) > 2
    for request, other in zip(requests, together, strict=True):
        alone = passes(settings, [request])[0][0]
        torch.testing.assert_close(other.values, alone.values, rtol=0, atol=1e-10)


# ---- the first block ----------------------------------------------------------------------------


def noises() -> Iterator[Tensor]:
    rng = generator(2)
    while True:
        yield torch.randn(4, 1, generator=rng, dtype=torch.float64)


WHERE = torch.tensor([[True], [True], [False], [False]])
START = torch.randn(4, 1, generator=generator(3), dtype=torch.float64)
KNOWN = torch.tensor([[1.0], [-2.0], [0.0], [0.0]], dtype=torch.float64)


def pulled(z: Tensor, t: Tensor) -> Tensor:
    """The velocity of data that are all 3."""
    return (z - 3) / t.clamp(min=1e-3)


def test_partial_repaint_guides_in_its_share_of_the_steps() -> None:
    """With a velocity of 0, the known part stays where the last guided step has put it."""
    calls, steps = [], to_data(10, START)

    def still(z: Tensor, t: Tensor) -> Tensor:
        calls.append(float(t))
        return torch.zeros_like(z)

    def run(share: float, times: int = 1) -> Tensor:
        return repaint(still, START, KNOWN, WHERE, noises(), steps, "euler", share, times)

    drawn = [next(n) for n in [noises()] for _ in range(10)]
    assert run(0.0).equal(START)
    for share, step in ((1.0, 9), (0.3, 2)):
        t = 1 - step / 10
        wanted = torch.where(WHERE, (1 - t) * KNOWN + t * drawn[step], START)
        torch.testing.assert_close(run(share), wanted, atol=1e-5, rtol=0)
    calls.clear()
    run(0.3, 3)
    assert len(calls) == 3 * 3 + 7
    free = repaint(pulled, START, KNOWN, WHERE, noises(), steps, "euler", 0.0, 1)
    torch.testing.assert_close(free, torch.full_like(free, 3.0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("solver", ["euler", "ab2"])
def test_a_repainted_result_does_not_depend_on_its_batch(times: int, solver: str) -> None:
    """Beside a prompt of whole blocks, none, and one that ends inside a block."""
    maker = partial(toys.generate, toys.prior(), toys.layouts(BLOCK))
    whole = Latent(torch.cat([PROMPT.values, PROMPT.values[:2]]), (8,))
    requests = [Request(g, (12,), i) for i, g in enumerate(({"C": whole}, {}, {"C": PROMPT}))]
    settings = toys.settings(4, 2.0, solver, first_block="partial", repaint_times=times)
    together = maker("continuation", "C", requests, settings)
    for request, other in zip(requests, together, strict=True):
        alone = maker("continuation", "C", [request], settings)[0]
        torch.testing.assert_close(other.values, alone.values, rtol=0, atol=1e-10)


@pytest.mark.parametrize("strategy", ["clean", "partial"])
def test_noise_that_is_given_is_used(strategy: str) -> None:
    maker = partial(toys.generate, toys.prior(), toys.layouts(BLOCK))
    settings = toys.settings(2, 1.0, first_block=strategy)
    starts = [torch.randn(BLOCK, 3, generator=generator(i), dtype=torch.float64) for i in range(2)]

    def run(shift: float) -> Tensor:
        given = Request({"C": PROMPT}, (12,), 1, [z + shift for z in starts])
        return maker("continuation", "C", [given], settings)[0].values

    assert run(0.0).equal(run(0.0))
    assert not torch.allclose(run(0.0)[6:], run(5.0)[6:])


def test_renoising_keeps_the_path() -> None:
    """z_t = (1 - t) z_0 + t eps taken to a noisier t has that t's mean and variance."""
    rng = generator(0)
    eps, fresh = (torch.randn(200_000, generator=rng, dtype=torch.float64) for _ in range(2))
    t, later = torch.tensor(0.3), torch.tensor(0.6)
    z = renoise((1 - t) * 2.0 + t * eps, fresh, t, later)
    assert float(z.mean()) == pytest.approx(float((1 - later) * 2.0), abs=0.01)
    assert float(z.std()) == pytest.approx(float(later), abs=0.01)


def test_clean_repaint_keeps_the_prompt_and_partial_lets_it_move() -> None:
    clean, partial = (made(toys.settings(4, 1.0, first_block=x)) for x in ("clean", "partial"))
    assert clean[:6].equal(PROMPT.values)
    assert partial[:4].equal(PROMPT.values[:4])
    assert not torch.allclose(partial[4:6], PROMPT.values[4:6], atol=1e-3)


@pytest.fixture(scope="module")
def model() -> UnifiedPipeline:
    pipeline = tiny.pipeline()
    for module in pipeline.modules.values():
        tiny.randomise(module)
    return pipeline


def request(model: UnifiedPipeline, prompt: str, **settings: Any) -> Request:
    """What is asked of the prior, to continue `prompt` by 8 tokens."""
    chosen = model.config.generation.model_copy(update=settings)
    runner = Inference(model.modalities, model.tasks, model.prior, "continuation")
    with torch.no_grad():
        return runner._begin([Wish({"C": prompt}, 8)], chosen, [0]).session.requests[0]


def test_padding_fills_the_prompt_up_to_whole_blocks(model: UnifiedPipeline) -> None:
    text: Any = model.modalities["text"]
    prompt = next(p for p in ("a big g", "a big gr") if len(text.beginning(p)) % 4)
    length = len(text.beginning(prompt))
    up = -(-length // 4) * 4

    def sizes(strategy: str) -> tuple[int, int]:
        asked = request(model, prompt, first_block=strategy)
        return len(asked.given["C"].values), asked.grid[0]

    for strategy in ("clean", "partial"):
        assert sizes(strategy) == (length, -(-(length + 8) // 4) * 4)
    for strategy in ("left", "right"):
        assert sizes(strategy) == (up, up + 8)
    (mean,) = encode(text, [text.pad(text.beginning(prompt), 4, "left")])
    filled = request(model, prompt, first_block="left").given["C"].values
    torch.testing.assert_close(filled, mean.mean_NC)


def test_the_prompt_can_be_a_sample_of_its_posterior(model: UnifiedPipeline) -> None:
    text: Any = model.modalities["text"]
    (posterior,) = encode(text, [text.beginning("a big green")])
    mean, one, two = (
        request(model, "a big green", prefix=p).given["C"].values
        for p in ("mean", "sample", "sample")
    )
    torch.testing.assert_close(mean, posterior.mean_NC)
    assert one.equal(two)
    error = (one - mean) / (0.5 * posterior.logvar_NC).exp()
    assert 0.3 < float(error.detach().square().mean()) < 2.5


def test_networks_take_the_precision_and_the_caller_keeps_its_own(model: UnifiedPipeline) -> None:
    seen: list[torch.dtype] = []
    layer = model.prior.blocks[0].register_forward_hook(lambda *_: seen.append(product_dtype(one)))
    one = torch.ones(1)

    def products(**settings: Any) -> set[torch.dtype]:
        seen.clear()
        for _ in model.stream("continuation", [{"C": "a big"}], size=8, seed=0, **settings):
            assert product_dtype(one) == around
        return set(seen)

    try:
        around = torch.float32
        assert products() == {torch.float32}
        assert products(precision="bf16") == {torch.bfloat16}
        with torch.autocast("cpu", torch.bfloat16):
            around = torch.bfloat16
            assert products() == {torch.bfloat16}
            assert products(precision="fp32") == {torch.float32}
    finally:
        layer.remove()


# ---- tokens -------------------------------------------------------------------------------------

LOGITS = torch.tensor([[2.0, 1.0, 0.5, -1.0, -3.0]])
NOTHING = torch.zeros(0, dtype=torch.int64)


def shares(choice: Choice, draws: int = 4000) -> Tensor:
    rng = generator(5)
    rows = LOGITS.expand(draws, -1)
    return torch.bincount(choose(rows, NOTHING, choice, rng), minlength=5) / draws


@pytest.mark.parametrize(
    ("choice", "kept"),
    [
        (Choice(temperature=1.0), 5),
        (Choice(temperature=1.0, top_k=2), 2),
        (Choice(temperature=1.0, top_p=0.5), 1),
        (Choice(temperature=1.0, top_p=0.7), 2),
        (Choice(temperature=0.5, top_k=3), 3),
    ],
)
def test_tokens_are_drawn_from_what_is_kept(choice: Choice, kept: int) -> None:
    wanted = (LOGITS[0, :kept] / choice.temperature).softmax(-1)
    torch.testing.assert_close(probabilities(LOGITS, choice)[0, :kept], wanted)
    found = shares(choice)
    assert int((found[kept:] > 0).sum()) == 0 if kept < 5 else True
    torch.testing.assert_close(found[:kept], wanted, atol=0.03, rtol=0)


def test_a_penalty_makes_what_was_said_less_likely() -> None:
    said = torch.tensor([0, 3, 3])
    assert int(choose(LOGITS, NOTHING, Choice(), None)) == 0
    assert int(choose(LOGITS, said, Choice(repetition_penalty=2.5), None)) == 1
    cold = Choice(temperature=1.0, repetition_penalty=2.0)
    rng = generator(0)
    drawn = choose(LOGITS.expand(4000, -1), said, cold, rng)
    lowered = torch.tensor([1.0, 1.0, 0.5, -2.0, -3.0]).softmax(-1)
    found = torch.bincount(drawn, minlength=5) / 4000
    torch.testing.assert_close(found, lowered, atol=0.03, rtol=0)


def test_texts_differ_by_temperature_and_repeat_by_seed(model: UnifiedPipeline) -> None:
    prompts = ["a big", "a small red", "a"]

    def said(**settings: Any) -> list[str]:
        return model.continue_text(prompts, max_new_tokens=12, **settings)

    warm = said(seed=[1, 2, 3], temperature=1.0)
    assert warm == said(seed=[1, 2, 3], temperature=1.0)
    assert warm != said(seed=[1, 2, 3])
    alone = [model.continue_text([p], max_new_tokens=12, seed=[i + 1], temperature=1.0)[0]
             for i, p in enumerate(prompts)]  # fmt: skip
    assert warm == alone


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"guidance_scale": math.nan}, "guidance_scale is nan"),
        ({"num_steps": 0}, "num_steps is 0"),
        ({"time_shift": 0.0}, "time_shift is 0.0"),
        ({"guidance_interval": (0.8, 0.2)}, "first <= second <= 1, found 0.8, 0.2"),
        ({"guider": "cgf"}, "guider is 'cgf'"),
        ({"first_block": "centre"}, "first_block is 'centre'"),
        ({"repaint_times": 0}, "repaint_times is 0"),
        ({"unconditional_every": 0}, "unconditional_every is 0"),
        ({"settle": 1.0}, "settle is 1.0"),
        ({"settle": 0.1, "first_block": "partial"}, "settle 0.1, but the steps of first_block"),
        ({"unconditional_every": 2, "first_block": "partial"}, "unconditional_every is 2 and"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"temprature": 1.0}, "did you mean temperature"),
    ],
)
def test_settings_that_make_no_sense_are_named(
    model: UnifiedPipeline, settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        model.continue_text(["a"], **settings)


# ---- samples in training -------------------------------------------------------------------------


@pytest.mark.parametrize("told", [{}, {"temperature": 1.5, "top_k": 40}, {"solver": "heun"}])
def test_samples_in_training_are_what_a_user_is_given(
    model: UnifiedPipeline, told: dict[str, Any]
) -> None:
    """The same settings, those of decoding among them, through the same door."""
    settings = model.config.generation.model_copy(update=told)
    task = model.tasks["captioning"]
    items = task.fill({"text": tiny.CAPTIONS[1], "image": tiny.square(tiny.CAPTIONS[1])})
    seen = {kind: task.observe(model.modalities, kind, item) for kind, item in items.items()}
    with torch.no_grad():
        found = samples.generate(model, "captioning", [Prepared("", "", 7, seen)], settings)
    given = {kind: item for kind, item in items.items() if kind != "C"}
    size, seed = len(seen["C"]), [derive("sample", 7)]
    assert found == model.generate("captioning", [given], size, seed, **told)


def test_samples_go_on_from_the_first_half(model: UnifiedPipeline) -> None:
    """Where nothing else is given; the half that was given is a part of what is shown."""
    observation = model.modalities["text"].observe("a big red square a big", block=4)
    example = Prepared("", "", 0, {"C": observation})
    with torch.no_grad():
        (found,) = samples.generate(model, "continuation", [example], model.config.generation)
        (mean,) = encode(model.modalities["text"], [observation])
        half = mean.mean_NC[: len(mean.mean_NC) // 2]
        (back,) = decode(model.modalities["text"], [Latent(half, (len(half),))])
    assert found.startswith(model.modalities["text"].realise(back))
