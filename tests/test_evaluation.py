"""Evaluation: the statistics are what they say, and a condition's use is told from its neglect."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from types import SimpleNamespace

import pytest
import tiny
import torch
import toys
from torch import nn

from unified.config.schema import FlowConfig
from unified.demos.emoji import name_tokens, named, says_style
from unified.evaluation import flow_loss
from unified.evaluation.flow_loss import EncodedItems, encode, target_layout, target_loss
from unified.evaluation.nearest import nearest_centroids, retrieved
from unified.evaluation.pairing import condition_matters, partners, repaired
from unified.evaluation.pca import PCA
from unified.evaluation.reconstruction import reconstruct
from unified.evaluation.statistics import bootstrap, edit_distance, normalised_edit_distance
from unified.flow.path import STRAIGHT
from unified.latents.measures import psnr
from unified.latents.modality import encode as encode_items
from unified.latents.modality import modes
from unified.latents.ragged import Latent
from unified.modalities.text.modality import TextConfig, TextModality
from unified.modalities.text.tokenizer import Tokenizer
from unified.randomness import generator
from unified.tasks.captioning import Captioning, CaptioningConfig
from unified.tasks.continuation import Continuation, ContinuationConfig
from unified.tasks.text_to_image import TextToImage, TextToImageConfig

STYLES = ["3D", "flat"] * 12
SHARED = {"source": "s", "block": 2}
TASKS = {
    "continuation": Continuation(ContinuationConfig(**SHARED)),
    "captioning": Captioning(CaptioningConfig(**SHARED)),
    "text_to_image": TextToImage(TextToImageConfig(**SHARED)),
}


# ---- measures ------------------------------------------------------------------------------------


def test_psnr_of_a_known_error():
    x = torch.zeros(3, 4, 4)
    assert psnr(x, x) == math.inf
    assert psnr(x, x + 0.1) == pytest.approx(20)
    assert psnr(x, x + 25.5, peak=255) == pytest.approx(20)
    with pytest.raises(ValueError, match="one shape"):
        psnr(x, x[0])


def test_edit_distance_is_a_metric():
    words = ["", "cat", "cart", "trace", "kitten", "sitting"]
    assert edit_distance("kitten", "sitting") == 3
    for a in words:
        assert edit_distance(a, a) == 0
        assert edit_distance(a, "") == len(a)
        for b in words:
            assert edit_distance(a, b) == edit_distance(b, a)
            assert 0 <= normalised_edit_distance(a, b) <= 1
            for c in words:
                assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)


def test_bootstrap_covers_the_truth_about_as_often_as_it_says():
    drawn = torch.randn(300, 40, generator=torch.Generator().manual_seed(0))
    covered = sum(0.0 in bootstrap(values, resamples=500) for values in drawn)
    assert 0.88 < covered / len(drawn) < 0.99


def test_values_of_a_group_are_drawn_together():
    """Ten copies of each value say no more than one: the interval is as wide."""
    values = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    many, of = values.repeat_interleave(10), [i // 10 for i in range(400)]
    one, grouped, naive = bootstrap(values), bootstrap(many, groups=of), bootstrap(many)
    assert grouped.mean == pytest.approx(one.mean)
    assert (grouped.low, grouped.high) == pytest.approx((one.low, one.high))
    assert naive.high - naive.low < 0.5 * (one.high - one.low)


def test_bootstrap_moves_and_scales_with_its_values():
    values = torch.randn(30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    one, other = bootstrap(values), bootstrap(3 * values + 2)
    assert one.low < one.mean < one.high
    for name in ("low", "mean", "high"):
        assert getattr(other, name) == pytest.approx(3 * getattr(one, name) + 2)
    flat = bootstrap(torch.full((5,), 0.5))
    assert (flat.low, flat.mean, flat.high) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("values", [torch.zeros(0), torch.tensor([1.0, math.nan])])
def test_bootstrap_refuses_what_has_no_mean(values):
    with pytest.raises(ValueError, match="finite values"):
        bootstrap(values)


# ---- who is nearest ------------------------------------------------------------------------------


def test_retrieval_of_the_reference_itself_and_of_noise():
    rng = torch.Generator().manual_seed(0)
    reference = torch.randn(200, 6, generator=rng)
    groups = ["a", "b"] * 100
    assert all(retrieved(reference, reference, range(200), groups))
    noise = torch.randn(200, 6, generator=rng)
    found = sum(retrieved(noise, reference, range(200), groups))
    assert 5 < found < 40  # 20 expected
    with pytest.raises(ValueError, match="found 3"):
        retrieved(noise, reference[:6], range(6), groups[:6])


def test_centroids_are_told_apart_by_what_differs_and_not_by_what_varies():
    """The labels differ by 1 in a direction of spread 0.1; another direction has spread 10."""
    g = torch.Generator().manual_seed(0)
    labels = ["a", "b"] * 200
    cloud = torch.randn(400, 2, generator=g) * torch.tensor([0.1, 10.0])
    cloud[1::2, 0] += 1
    found = nearest_centroids(cloud, cloud, labels, shrinkage=1e-6)
    assert found == labels
    nearest = torch.cdist(cloud, torch.stack([cloud[::2].mean(0), cloud[1::2].mean(0)])).argmin(1)
    assert [labels[k] for k in nearest.tolist()] != labels


def test_nearest_centroids_of_two_clouds():
    rng = torch.Generator().manual_seed(0)
    labels = ["3D", "flat"] * 20
    centre = torch.tensor([[3.0, 0.0] if label == "3D" else [-3.0, 0.0] for label in labels])
    cloud = centre + torch.randn(40, 2, generator=rng)
    assert nearest_centroids(centre, cloud, labels) == labels


def test_pca_is_exact_for_few_dimensions_and_better_with_more():
    rng = torch.Generator().manual_seed(0)
    items = torch.randn(30, 5, generator=rng) @ torch.randn(5, 50, generator=rng) + 7
    pca = PCA.fit(items, 5)
    torch.testing.assert_close(pca.reconstruct(items, 5), items, atol=1e-3, rtol=1e-3)
    gram = pca.components_KD @ pca.components_KD.T
    torch.testing.assert_close(gram, torch.eye(5), atol=1e-4, rtol=0)
    errors = [float((pca.reconstruct(items, k) - items).square().mean()) for k in range(6)]
    assert errors == sorted(errors, reverse=True)
    best = torch.linalg.svdvals((items - items.mean(0)).double())[2:].square().sum() / items.numel()
    assert errors[2] == pytest.approx(float(best), rel=1e-3)
    with pytest.raises(ValueError, match="more items"):
        PCA.fit(items, 30)


# ---- pairs ---------------------------------------------------------------------------------------


def test_partners_within_a_style_are_a_permutation_without_fixed_points():
    chosen = partners(STYLES, across=False)
    assert sorted(chosen) == list(range(len(STYLES)))
    assert all(i != p and STYLES[i] == STYLES[p] for i, p in enumerate(chosen))
    assert chosen == partners(STYLES, across=False) != partners(STYLES, across=False, seed=1)


def test_partners_across_styles_lend_evenly():
    groups = ["3D"] * 5 + ["flat"] * 11
    chosen = partners(groups, across=True)
    assert all(groups[i] != groups[p] for i, p in enumerate(chosen))
    lent = [chosen.count(i) for i in range(len(groups))]
    assert set(lent[:5]) == {2, 3}
    assert max(lent[5:]) == 1


def test_partners_need_someone_to_pair_with():
    with pytest.raises(ValueError, match="inside"):
        partners(["a", "b", "b"], across=False)
    with pytest.raises(ValueError, match="outside"):
        partners(["a", "a"], across=True)


def test_only_the_condition_changes_hands():
    encoded = items([{"C": says(i, (2,)), "I": says(10 + i, (1, 2))} for i in range(3)])
    swapped = repaired(encoded, [1, 2, 0], "I")
    assert [first(swapped["I"], i) for i in range(3)] == [10, 11, 12]
    assert [first(swapped["C"], i) for i in range(3)] == [1, 2, 0]
    assert [first(encoded["C"], i) for i in range(3)] == [0, 1, 2]


def says(number: float, grid: tuple[int, ...]) -> Latent:
    return Latent(torch.full((math.prod(grid), 3), float(number)), grid)


def first(of: EncodedItems, example: int) -> int:
    return int(of.latents_KC[of.starts[example], 0])


def items(examples: Sequence[Mapping[str, Latent]]) -> dict[str, EncodedItems]:
    """The latents of examples of one task, kind by kind, the last example first."""
    found = {}
    for kind in examples[0]:
        order = [e[kind] for e in reversed(examples)]
        begins = list(accumulate((len(z.values) for z in order), initial=0))[:-1]
        found[kind] = EncodedItems(
            torch.cat([z.values for z in order]), begins[::-1], [e[kind].grid for e in examples]
        )
    return found


# ---- the loss of one target ----------------------------------------------------------------------


class UsesCondition(nn.Module):
    """Takes the mean of all that is clean for the target: right if the condition is its own."""

    def __init__(self, task: str, strength: float):
        super().__init__()
        self.config, self.channels = SimpleNamespace(axes=3), {"text": 3, "image": 3}
        self.task, self.strength = task, nn.Parameter(torch.tensor(strength))

    def forward(self, batch):
        of, time_P = batch.coordinates, batch.time_RL.view(-1)
        sample_P, kind_P = of.sample.view(-1), of.kind.view(-1)
        painting = self.task == "text_to_image"
        kind, given, target = ("C", "text", "image") if painting else ("I", "image", "text")
        where = batch.where[given]
        shown = kind_P[where] == batch.rules.kind_index[kind]
        owner, values = sample_P[where][shown], batch.latents[given][shown]
        count = owner.bincount()[:, None]
        mean = values.new_zeros(len(count), values.shape[1]).index_add(0, owner, values) / count
        at = batch.noisy[target][0]
        place = batch.where[target][at]
        exact = (batch.latents[target][at] - mean[sample_P[place]]) / time_P[place][:, None]
        velocity = {m: torch.zeros_like(z) for m, z in batch.latents.items()}
        velocity[target][at] = self.strength * exact
        return velocity


def model(task: str, strength: float) -> SimpleNamespace:
    config = SimpleNamespace(flow=FlowConfig())
    prior = UsesCondition(task, strength)
    return SimpleNamespace(prior=prior, tasks=TASKS, config=config, modalities={}, path=STRAIGHT)


def examples(count: int = 24) -> list[dict[str, Latent]]:
    """Latents that all say one thing, another one in every example."""
    made = []
    for i in range(count):
        says = torch.randn(3, generator=generator("says", i))
        length = 2 * (1 + i % 4)
        grids = {"P": (2,), "C": (length,), "I": (1 + i % 2, 2)}
        made.append({k: Latent(says.repeat(math.prod(g), 1), g) for k, g in grids.items()})
    return made


def pick(task: str) -> dict[str, EncodedItems]:
    kinds = {s.kind for s in TASKS[task].layout.filled}
    return items([{k: v for k, v in e.items() if k in kinds} for e in examples()])


@pytest.mark.parametrize("task", ["text_to_image", "captioning"])
@pytest.mark.parametrize("across", [True, False])
def test_an_interval_tells_use_of_the_condition_from_neglect(task, across):
    encoded, partner = pick(task), partners(STYLES, across)
    swapped = repaired(encoded, partner, TASKS[task].generates)
    for strength, uses in ((1.0, True), (0.0, False)):
        own, other = (target_loss(model(task, strength), task, e) for e in (encoded, swapped))
        found = condition_matters(own, other)
        assert (0.0 in found) is not uses
        assert found.count == len(STYLES)
    assert float(target_loss(model(task, 1.0), task, encoded).model_ED.max()) < 1e-6


@pytest.mark.parametrize("task", ["text_to_image", "captioning"])
def test_the_draws_do_not_depend_on_the_condition(task):
    encoded = pick(task)
    swapped = repaired(encoded, partners(STYLES, across=True), TASKS[task].generates)
    own, other = (target_loss(model(task, 0.0), task, e, draws=3) for e in (encoded, swapped))
    assert torch.equal(own.zero_ED, other.zero_ED)
    assert torch.equal(own.model_ED, own.zero_ED)
    assert own.zero_ED.shape == (24, 3)
    assert len(own.zero_ED.unique()) == own.zero_ED.numel()


def test_a_loss_does_not_depend_on_its_batch(monkeypatch):
    prior = toys.prior()
    pipeline = model("captioning", 0.0)
    pipeline.prior = prior
    of = [s for s in toys.samples(40) if s.task == "captioning"]
    latents = toys.latents(of, toys.layouts())
    encoded = items(
        [{k: Latent(z, s.grids[k]) for k, z in e.items()} for s, e in zip(of, latents, strict=True)]
    )
    together = target_loss(pipeline, "captioning", encoded)
    monkeypatch.setattr(flow_loss, "BATCH", 3)
    apart = target_loss(pipeline, "captioning", encoded)
    torch.testing.assert_close(apart.model_ED, together.model_ED)
    assert not torch.allclose(together.model_ED, together.zero_ED)


def test_the_target_is_the_only_noise():
    kinds = {name: [s.kind for s in target_layout(task).segments] for name, task in TASKS.items()}
    assert kinds == {
        "continuation": ["C", "N"],
        "captioning": ["P", "I", "C", "N"],
        "text_to_image": ["C", "I"],
    }
    assert all(target_layout(task).unconditional_rate == 0 for task in TASKS.values())


def test_no_examples_have_no_loss():
    with pytest.raises(ValueError, match="at least one; found none"):
        encode(model("captioning", 1.0), [])


def test_each_example_has_the_latents_of_its_own_items(monkeypatch):
    pipeline = tiny.pipeline()
    made = tiny.examples(pipeline, 12, ((16, 16), (8, 16)))
    some = [e for e in made if e.stream == "captioning"]
    with pytest.raises(ValueError, match="found captioning, continuation, text_to_image"):
        encode(pipeline, made)
    monkeypatch.setattr(flow_loss, "BATCH", 3)
    found = encode(pipeline, some)
    assert found.keys() == {"P", "I", "C"}
    for kind, of in found.items():
        modality = pipeline.modalities["image" if kind == "I" else "text"]
        for example, start, grid in zip(some, of.starts, of.grids, strict=True):
            (alone,) = modes(encode_items(modality, [example.observations[kind]]))
            mine = of.latents_KC[start : start + math.prod(grid)]
            assert grid == alone.grid
            torch.testing.assert_close(mine, alone.values, atol=1e-5, rtol=1e-4)


# ---- autoencoders --------------------------------------------------------------------------------


def test_reconstruction_gives_each_observation_back_whatever_its_batch():
    torch.manual_seed(0)
    sizes = {"dim": 16, "ffn_dim": 32, "num_heads": 2, "latent_dim": 4, "vocab_size": 300}
    blocks = {"encoder_num_blocks": 1, "decoder_num_blocks": 1}
    modality = TextModality.build(TextConfig(**sizes, **blocks), ["a 3D emoji of door"])
    shown = [modality.observe("door" * n, ends=True) for n in range(1, 40)]
    sampled = reconstruct(modality, shown, seed=1)
    assert [len(x) for x in sampled] == [len(x) for x in shown]
    assert all(
        torch.equal(x, y) for x, y in zip(sampled, reconstruct(modality, shown, 1), strict=True)
    )
    few = reconstruct(modality, shown[:3], seed=1)
    assert all(torch.equal(x, y) for x, y in zip(few, sampled, strict=False))
    assert len(reconstruct(modality, shown)) == len(shown)


# ---- emoji ---------------------------------------------------------------------------------------

NAMES = ["door", "South Sudan flag", "woman: blond hair", "piñata", "3D glasses", "A", "emoji of x"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("vocabulary", [260, 400])
def test_name_tokens_spell_the_name(name, vocabulary):
    captions = [f"a {style} emoji of {n}" for style in ("3D", "flat") for n in NAMES]
    tokenizer = Tokenizer.train(captions, vocabulary)
    for style in ("3D", "flat"):
        caption = f"a {style} emoji of {name}"
        mask, ids = name_tokens(tokenizer, caption, name), tokenizer.encode(caption)
        assert len(mask) == len(ids)
        assert mask == sorted(mask)  # the name is the end
        chosen = tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m])
        assert chosen.strip() == name
        assert named(caption) == name


def test_a_caption_that_does_not_end_with_the_name_is_refused():
    with pytest.raises(ValueError, match="should end with the name"):
        name_tokens(Tokenizer.train(["a"], 260), "a 3D emoji of door", "gate")


def test_style_and_name_of_texts_that_are_no_captions():
    assert says_style("a flat emoji of lime", "flat")
    assert not says_style("a flat emoji of lime", "3D")
    assert not says_style("a flat 3D emoji", "flat")
    assert not says_style("it was a dark night", "flat")
    assert named("it was a dark night") == ""
