"""Generation: the cache equals the full forward, samples do not know their batch."""

from __future__ import annotations

import gc
import math
from dataclasses import replace
from functools import partial

import pytest
import recording
import torch
import toys
from torch._dynamo.testing import CompileCounter

from unified.config.schema import GenerationConfig
from unified.flow.solvers import integrate, to_data
from unified.generation.blocks import Request, Session
from unified.latents.modality import Latent
from unified.model.cache import KVCache
from unified.model.kernels.graphs import Recording
from unified.randomness import generator
from unified.sequence.layout import Layout, Segment
from unified.sequence.packing import Sample, pack
from unified.sequence.visibility import UP_TO, Coordinates, Visibility

BLOCK = 2


def latent(modality: str, *grid: int, seed: int = 0) -> Latent:
    g = generator(seed, modality, *grid)
    shape = (math.prod(grid), toys.CHANNELS[modality])
    return Latent(torch.randn(shape, generator=g, dtype=torch.float64), grid)


REQUESTS = {
    "continuation": (
        "C",
        [
            Request({"C": latent("text", 5)}, (8,), 1),
            Request({}, (4,), 2),
            Request({"C": latent("text", 2, seed=1)}, (6,), 3),
        ],
    ),
    "captioning": (
        "C",
        [
            Request({"P": latent("text", 3), "I": latent("image", 2, 2)}, (6,), 1),
            Request(
                {"P": latent("text", 1), "I": latent("image", 1, 3), "C": latent("text", 3)},
                (8,),
                2,
            ),
        ],
    ),
    "text_to_image": (
        "I",
        [
            Request({"C": latent("text", 4)}, (2, 3), 1),
            Request({"C": latent("text", 2)}, (2, 2), 2),
        ],
    ),
}


def full_forward(
    model, layouts, task: str, target: str, request: Request, settings: GenerationConfig
):
    """The target by whole-sequence forwards: no cache, every position present in each."""
    layout = layouts[task]
    text = target == "C"
    noisy = "N" if text else target
    width, total = toys.CHANNELS[layout[target].modality], math.prod(request.grid)
    empty = torch.zeros(0, width, dtype=torch.float64)
    done = request.given[target].values if target in request.given else empty
    known = len(done) - len(done) // BLOCK * BLOCK
    committed = len(done) - known if text else 0
    while committed < total:
        size = BLOCK if text else total
        seed = generator(request.seed, task, target, committed)
        z = torch.randn(size, width, generator=seed).double()
        z[:known] = done[committed:] if known else z[:0]
        pinned = torch.arange(size) < known

        def field(x, t, pinned=pinned, history=done[:committed], z=z):
            x = torch.where(pinned[:, None], z, x)
            here = (model, layout, task, target, noisy, request, history, x, t, pinned)
            v_c, v_u = velocity(*here, False), velocity(*here, True)
            return (v_u + settings.guidance_scale * (v_c - v_u)) * ~pinned[:, None]

        z = integrate(field, z, to_data(settings.num_steps, z), settings.solver)
        done, known, committed = torch.cat([done[:committed], z]), 0, committed + size
    return done


def velocity(model, layout, task, target, noisy, request, done, x, t, pinned, unconditional):
    """One uncached forward over [given | clean target so far | noisy target] as one sample."""
    segments = tuple(s for s in layout.segments if s.kind in request.given or s.kind == target)
    length = len(done) + len(x)
    grids = {k: z.grid for k, z in request.given.items() if k != target}
    values = {k: z.values for k, z in request.given.items() if k != target}
    modality = layout[target].modality
    if noisy != target:
        segments += (Segment(noisy, modality, copies=target, block=BLOCK),)
        grids[target], values[target] = (length,), torch.cat([done, x])
    else:
        grids[target], values[target] = request.grid, x
    rule = Visibility({task: layout.sees})
    batch = pack([Sample(task, grids)], {task: Layout(segments, {})}, rule, None, toys.AXES)
    batch = batch.with_latents([values])
    span = next(s for s in batch.spans if s.segment.kind == noisy)
    here = slice(span.stop - len(x), span.stop)
    where = batch.where[modality][here]
    time = batch.time_RL.double()
    time.view(-1)[where] = torch.where(pinned, 0.0, t)
    kind = batch.coordinates.kind.clone()
    if unconditional:
        kind.view(-1)[where] = rule.kind_index["U"]
    batch = replace(batch, time_RL=time, coordinates=replace(batch.coordinates, kind=kind))
    return model(batch)[modality][here]


@pytest.mark.parametrize("task", REQUESTS)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_cached_generation_equals_the_full_forward(task: str, scale: float):
    layouts, model = toys.layouts(BLOCK), toys.prior(multi=1, single=2)
    target, requests = REQUESTS[task]
    settings = toys.settings(num_steps=3, guidance_scale=scale)
    made = toys.generate(model, layouts, task, target, requests, settings)
    with torch.no_grad():
        for request, got in zip(requests, made, strict=True):
            expected = full_forward(model, layouts, task, target, request, settings)
            torch.testing.assert_close(got.values, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("task", REQUESTS)
def test_a_result_does_not_depend_on_its_batch(task: str):
    maker = partial(toys.generate, toys.prior(), toys.layouts(BLOCK))
    target, requests = REQUESTS[task]
    settings = toys.settings(num_steps=4, guidance_scale=2.0, solver="heun")
    together = maker(task, target, requests, settings)
    backwards = maker(task, target, requests[::-1], settings)[::-1]
    for i, request in enumerate(requests):
        alone = maker(task, target, [request], settings)[0]
        for other in (together[i], backwards[i]):
            torch.testing.assert_close(other.values, alone.values, rtol=0, atol=1e-10)


def test_the_known_beginning_is_kept():
    maker = partial(toys.generate, toys.prior(), toys.layouts(BLOCK))
    _, requests = REQUESTS["continuation"]
    for request, made in zip(
        requests, maker("continuation", "C", requests, toys.settings(4)), strict=True
    ):
        given = request.given.get("C", latent("text", 0)).values
        assert torch.equal(made.values[: len(given)], given)
        assert made.grid == request.grid


def test_streaming_yields_growing_blocks_and_stops_each_sample():
    of = (toys.prior(), toys.layouts(BLOCK))
    requests = [Request({}, (8,), 1), Request({}, (8,), 2)]
    asked = ("continuation", "C", requests, toys.settings(2))
    whole = toys.generate(*of, *asked)

    lengths = []
    session = Session(*of, *asked)
    while session.active:
        blocks = session.step()
        session.finish([i for i, z in blocks.items() if i == 0 and len(z) >= 4])
        lengths.append({i: len(z) for i, z in blocks.items()})
        for i, z in blocks.items():
            torch.testing.assert_close(z, whole[i].values[: len(z)], rtol=0, atol=1e-10)
    assert lengths == [{0: 2, 1: 2}, {0: 4, 1: 4}, {1: 6}, {1: 8}]


def test_guidance_one_needs_no_unconditional_pass():
    model = toys.prior()
    widths = []
    model.blocks[0].register_forward_hook(
        lambda _, args, __: widths.append(args[1].geometry.shape[1])
    )
    maker = partial(toys.generate, model, toys.layouts(BLOCK))
    for scale in (1.0, 2.0):
        maker("continuation", "C", [Request({}, (2,), 0)], toys.settings(1, scale))
    assert widths == [BLOCK, 2 * BLOCK]


def test_what_is_missing_is_named():
    maker = partial(toys.generate, toys.prior(), toys.layouts(BLOCK))
    with pytest.raises(ValueError, match="captioning needs I, P to generate C; given: nothing"):
        maker("captioning", "C", [Request({}, (4,), 0)], toys.settings(1))
    with pytest.raises(ValueError, match="this task cannot generate P"):
        maker("captioning", "P", [Request({}, (4,), 0)], toys.settings(1))


# ---- recorded -----------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"unconditional_every": 2}, {"settle": 0.3}])
@pytest.mark.parametrize("task", REQUESTS)
def test_a_recorded_step_gives_what_a_step_gives(task: str, settings: dict, monkeypatch):
    target, requests = REQUESTS[task]
    generator = partial(toys.generate, toys.prior(), toys.layouts(BLOCK))
    settings = toys.settings(8, 2.0, graphs=True, **settings)
    plain = generator(task, target, requests, settings)
    recording.install(monkeypatch)
    recorded = generator(task, target, requests, settings)
    assert recording.Graph.replays > 0
    for one, other in zip(plain, recorded, strict=True):
        assert torch.equal(one.values, other.values)
    monkeypatch.setattr(recording.Graph, "replays", 0)
    generator(task, target, requests, settings.model_copy(update={"graphs": False}))
    assert recording.Graph.replays == 0


def test_what_reads_something_beside_tensors_is_not_replayed_rightly(monkeypatch):
    """The stand-in shows the mistake that a device would make."""
    recording.install(monkeypatch)
    right, wrong = Recording(), Recording()
    for step in range(1, 4):
        x = torch.tensor(float(step))
        assert right(lambda x: (x + x,), x)[0] == 2 * step
        assert wrong(lambda x: (x + float(x),), x)[0] == (2 * step if step < 3 else 5)


def test_a_recording_is_gone_when_it_is_let_go_of(monkeypatch):
    """It is in no cycle, so that no other one is being made when it is deleted."""
    recording.install(monkeypatch)
    target, requests = REQUESTS["continuation"]
    generator = partial(toys.generate, toys.prior(), toys.layouts(BLOCK))
    gc.disable()
    try:
        generator("continuation", target, requests, toys.settings(4, 2.0, graphs=True))
        assert not [x for x in gc.get_objects() if isinstance(x, Recording)]
    finally:
        gc.enable()


# ---- compiled -----------------------------------------------------------------------------------


def both(model, other, task: str, settings: GenerationConfig):
    """What each of two priors makes of the same requests."""
    target, requests = REQUESTS[task]
    made = (
        toys.generate(p, toys.layouts(BLOCK), task, target, requests, settings)
        for p in (model, other)
    )
    return zip(*made, strict=True)


@pytest.mark.parametrize("task", REQUESTS)
def test_a_cache_of_fixed_size_changes_nothing(task: str):
    model, other = toys.prior(), toys.prior()
    other.static = True
    for a, b in both(model, other, task, toys.settings(3, 2.0)):
        torch.testing.assert_close(a.values, b.values, atol=1e-10, rtol=0)


def test_a_cache_keeps_within_its_capacity():
    rule = Visibility({"t": {"C": {"C": UP_TO}}})
    one = torch.ones(1, 3, dtype=torch.int64)
    at = Coordinates(0 * one, 0 * one, one, one)
    cache = KVCache(capacity=5)
    k, v = cache.room(0, (1, 3, 2, 4), torch.float32, torch.device("cpu")).take(
        torch.ones(1, 3, 2, 4), torch.ones(1, 3, 2, 4)
    )
    assert k.shape == v.shape == (1, 8, 2, 4)
    assert cache.keys(at).sample.tolist() == [[-1] * 5 + [0] * 3]
    cache.commit(at)
    assert cache.keys(at).sample.tolist() == [[0] * 3 + [-1] * 2 + [0] * 3]
    assert rule.dense(at, cache.keys(at)).sum(-1).tolist() == [[6] * 3]
    with pytest.raises(ValueError, match="a cache of 5 positions has 3 and cannot hold 3 more"):
        cache.commit(at)


@pytest.mark.parametrize("task", REQUESTS)
def test_compiled_blocks_share_their_graphs(task: str):
    """Layers, steps and blocks of one shape are one graph, without a break; results are equal."""
    torch._dynamo.reset()
    graphs = CompileCounter()
    model, compiled = toys.prior(multi=0, single=3), toys.prior(multi=0, single=3)
    compiled.compile(backend=graphs, fullgraph=True, dynamic=False)
    for a, b in both(model, compiled, task, toys.settings(3, 2.0)):
        torch.testing.assert_close(a.values, b.values, atol=1e-10, rtol=0)
    shapes = set()
    spy = toys.prior(multi=0, single=3)
    spy.static = True
    spy.blocks[0].register_forward_hook(lambda _, args, __: shapes.add(args[1].geometry.shape))
    list(both(model, spy, task, toys.settings(3, 2.0)))
    # a step in which some positions are known looks timesteps up for each of them
    assert graphs.frame_count <= 2 * len(shapes)


def test_compiling_again_replaces_what_was_compiled():
    model, first, second = toys.prior(), CompileCounter(), CompileCounter()
    torch._dynamo.reset()
    model.compile(backend=first)
    model.compile(backend=second)
    target, requests = REQUESTS["continuation"]
    toys.generate(model, toys.layouts(BLOCK), "continuation", target, requests, toys.settings(1))
    assert first.frame_count == 0 < second.frame_count
