"""The MMDiT: what may leak, what packing may change, what a table decides."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import toys

from unified.config.schema import PriorConfig
from unified.flow.matching import FlowMatching
from unified.model.prior import Prior
from unified.sequence.layout import Layout
from unified.sequence.visibility import closure


def corrupted(of, layouts, row_length=64, values=None, slots=None, **options):
    batch = toys.batch(of, layouts, row_length, values, slots)
    return toys.corrupt(batch, toys.flow(layouts, **options))


def reach(model: Prior, batch) -> dict[tuple[int, int], bool]:
    """(output position, input position) -> whether a gradient passes, over all R * L positions."""
    for z in batch.latents.values():
        z.requires_grad_()
    out = model(batch)
    found = {}
    for m, v in out.items():
        for n in range(len(v)):
            grads = torch.autograd.grad(v[n].sum(), list(batch.latents.values()), retain_graph=True)
            for other, g in zip(batch.latents, grads, strict=True):
                for j in range(len(g)):
                    key = (int(batch.where[m][n]), int(batch.where[other][j]))
                    found[key] = bool(g[j].any())
    return found


def table_closure(batch) -> torch.Tensor:
    """Transitive closure of the mask over positions [R * L, R * L], itself included."""
    _, length = batch.shape
    mask = batch.visibility.dense(batch.coordinates)
    eye = torch.eye(length, dtype=torch.bool)
    reached = mask | eye
    for _ in range(length):
        reached = (reached.double() @ reached.double()) > 0
    return torch.block_diag(*reached.double()).bool()


@pytest.mark.parametrize("seed", range(2))
def test_gradients_pass_exactly_where_the_tables_closure_says(seed: int):
    layouts = toys.layouts()
    of = toys.samples(4, seed)
    noisy, *_ = corrupted(of, layouts)
    model = toys.prior(multi=2, single=2)
    allowed = table_closure(noisy)
    for (i, j), passes in reach(model, noisy).items():
        assert passes == bool(allowed[i, j])


def test_the_answer_never_reaches_instruction_and_image():
    layouts = toys.layouts()
    of = [s for s in toys.samples(20) if s.task == "captioning"][:3]
    noisy, *_ = corrupted(of, layouts)
    kind = noisy.coordinates.kind.view(-1)
    index = noisy.visibility.kind_index
    for (i, j), passes in reach(toys.prior(), noisy).items():
        if kind[i] in (index["P"], index["I"]) and kind[j] in (index["C"], index["N"]):
            assert not passes


def test_changing_one_entry_changes_what_passes():
    layouts = toys.layouts()
    old = layouts["text_to_image"]
    sees = {q: dict(row) for q, row in old.sees.items()}
    del sees["I"]["C"]
    blind = layouts | {"text_to_image": Layout(old.segments, sees)}
    of = [s for s in toys.samples(20) if s.task == "text_to_image"][:1]
    results = []
    for these in (layouts, blind):
        noisy, *_ = corrupted(of, these)
        kind, index = noisy.coordinates.kind.view(-1), noisy.visibility.kind_index
        results.append(
            any(
                passes
                for (i, j), passes in reach(toys.prior(), noisy).items()
                if kind[i] == index["I"] and kind[j] == index["C"]
            )
        )
        assert ("C" in closure(these["text_to_image"].sees, "I")) == results[-1]
    assert results == [True, False]


def test_packed_loss_equals_the_samples_one_by_one():
    layouts, of = toys.layouts(unconditional_rate=0.3), toys.samples(10)
    model = toys.prior()
    noisy, targets = corrupted(of, layouts, clean_prefix_rate=0.3)
    together = FlowMatching.loss(model(noisy), targets)
    alone: dict[str, float] = {}
    values = toys.latents(of, layouts)
    for i, sample in enumerate(of):
        own = {"values": [values[i]], "slots": [i]}
        z, target = corrupted([sample], layouts, clean_prefix_rate=0.3, **own)
        for term, value in FlowMatching.loss(model(z), target).items():
            alone[term] = alone.get(term, 0.0) + float(value)
    for term, value in together.items():
        assert float(value) == pytest.approx(alone[term], rel=1e-10)


def test_order_of_samples_and_row_length_do_not_matter():
    layouts, of = toys.layouts(), toys.samples(9)
    model = toys.prior()
    order = [4, 2, 8, 0, 6, 1, 7, 3, 5]
    values = toys.latents(of, layouts)
    losses = []
    for arrangement, row in ((list(range(9)), 64), (order, 64), (order, 37), (order, None)):
        some = [of[i] for i in arrangement]
        own = [values[i] for i in arrangement]
        noisy, targets = corrupted(some, layouts, row, own, arrangement)
        losses.append(FlowMatching.loss(model(noisy), targets))
    for other in losses[1:]:
        for term, value in losses[0].items():
            torch.testing.assert_close(other[term], value, rtol=1e-10, atol=0)


def test_a_new_prior_predicts_zero_velocity():
    config = PriorConfig(width=16, heads=2, head_dim=8, rope_dim=6, single_stream_depth=2)
    noisy, *_ = corrupted(toys.samples(3), toys.layouts())
    model = Prior(config, toys.CHANNELS).double()
    for v in model(noisy).values():
        assert not v.any()


def test_text_only_is_one_stream_however_the_depth_is_split():
    """With one modality, a multi-stream block and a single-stream block are the same network."""
    layouts = {"continuation": toys.layouts()["continuation"]}
    of = [s for s in toys.samples(20) if s.task == "continuation"][:3]
    batch = toys.batch(of, layouts)
    outs = []
    for multi, single in ((2, 0), (1, 1), (0, 2)):
        config = PriorConfig(
            width=16, heads=2, head_dim=8, rope_dim=6,
            multi_stream_depth=multi, single_stream_depth=single,
        )  # fmt: skip
        model = Prior(config, {"text": 3}).double()
        for n, parameter in enumerate(model.parameters()):
            g = torch.Generator().manual_seed(n)
            parameter.data = torch.randn(parameter.shape, generator=g).double() * 0.2
        outs.append(model(batch)["text"])
    for other in outs[1:]:
        torch.testing.assert_close(other, outs[0], rtol=1e-12, atol=1e-12)


def test_modulation_runs_once_per_distinct_timestep():
    noisy, *_ = corrupted(toys.samples(6), toys.layouts())
    model, seen = toys.prior(), []
    model.timestep.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    model(noisy)
    assert len(seen) == 1
    assert seen[0].unique().equal(noisy.time_RL.unique())
    assert len(seen[0]) == 1 + noisy.groups.shape[1] < noisy.time_RL.numel()
    model(replace(noisy, timesteps=None))  # as in generation, where the distinct ones are looked up
    assert seen[1].equal(noisy.time_RL.unique())


def test_bad_rope_dim_is_a_sentence():
    with pytest.raises(ValueError, match=r"rope_dim must be even .* 12 and head_dim 8"):
        Prior(PriorConfig(width=16, heads=2, head_dim=8, rope_dim=12), toys.CHANNELS)


def test_padding_is_never_read():
    noisy, *_ = corrupted(toys.samples(5), toys.layouts(), row_length=33)
    model = toys.prior()
    expected = model(noisy)
    pad = noisy.coordinates.sample < 0
    assert pad.any()
    _, index_RL = noisy.timesteps
    for other in (
        replace(noisy, time_RL=torch.where(pad, 0.7, noisy.time_RL), timesteps=None),
        replace(noisy, timesteps=(noisy.timesteps[0], torch.where(pad, 1, index_RL))),
    ):
        for m, v in model(other).items():
            torch.testing.assert_close(v, expected[m], rtol=1e-12, atol=1e-12)


def test_recomputed_blocks_keep_less_and_give_the_same_gradient():
    layouts = toys.layouts()
    noisy, targets = corrupted(toys.samples(12), layouts)
    kept, gradients = {}, {}
    for recompute in (False, True):
        model = toys.prior()
        model.recompute = recompute
        bytes_ = 0

        def count(saved: torch.Tensor) -> torch.Tensor:
            nonlocal bytes_
            bytes_ += saved.numel() * saved.element_size()
            return saved

        with torch.autograd.graph.saved_tensors_hooks(count, lambda saved: saved):
            loss = sum(FlowMatching.loss(model(noisy), targets).values())
        kept[recompute] = bytes_
        loss.backward()
        gradients[recompute] = [p.grad for p in model.parameters()]
    assert kept[True] < 0.25 * kept[False]
    for one, two in zip(gradients[False], gradients[True], strict=True):
        assert (one is None) == (two is None)
        assert one is None or one.equal(two)


def test_a_modality_that_is_absent_has_gradients_of_zero():
    layouts = toys.layouts()
    of = [s for s in toys.samples(20) if s.task == "continuation"][:3]
    noisy, targets = corrupted(of, layouts)
    model = toys.prior()
    velocities = model(noisy.with_streams(model.channels))
    assert {m: len(v) for m, v in velocities.items() if not len(v)} == {"image": 0}
    for m, v in model(noisy).items():
        assert v.equal(velocities[m])
    sum(FlowMatching.loss(velocities, targets).values()).backward()
    parameters = dict(model.named_parameters())
    assert all(p.grad is not None for p in parameters.values())
    image = [p.grad for n, p in parameters.items() if ".image." in n]
    assert image
    assert not any(g.any() for g in image)
