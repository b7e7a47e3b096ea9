"""Several tokens to a latent: every phase is trained, and a prompt ends with a whole latent."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from unified.data.examples import Example
from unified.data.shards import read_shards
from unified.data.streams import ItemStream, TaskStream
from unified.generation.items import Inference, Wish
from unified.latents.ragged import Ragged
from unified.pipeline import UnifiedPipeline
from unified.randomness import derive, generator

PROMPTS = ("a big green", "a big gree", "a small red square", "a small red squar")


def build(**text: Any) -> UnifiedPipeline:
    settings = tiny.config(
        modalities={"text": {**tiny.TEXT, "patch_size": 2, **text}},
        tasks={"continuation": tiny.TASKS["continuation"]},
    )
    pipeline = tiny.pipeline(settings)
    for module in pipeline.modules.values():
        tiny.randomise(module)
    return pipeline


@pytest.fixture(scope="module")
def model() -> UnifiedPipeline:
    return build()


def given(model: UnifiedPipeline, prompt: str, **settings: Any) -> tuple[Any, Any]:
    """(ids that are encoded, latents that the generator gets) for a prompt."""
    runner = Inference(model.modalities, model.tasks, model.prior, "continuation")
    chosen = model.config.generation.model_copy(update=settings)
    start = runner._observe(Wish({"C": prompt}, 8), chosen)
    (request,) = runner._requests([Wish({"C": prompt}, 8)], [start], [0], chosen)
    return start.observations["C"], request.given["C"].values


def test_a_prompt_of_either_parity_ends_with_a_whole_latent(model: UnifiedPipeline) -> None:
    text: Any = model.modalities["text"]
    phases = set()
    for prompt in PROMPTS:
        ids, latents = given(model, prompt)
        wanted = text.beginning(prompt)
        phases.add(len(wanted) % 2)
        assert ids[len(ids) - len(wanted) :].equal(wanted)
        assert ids[: len(ids) - len(wanted)].tolist() == [text.unknown_id] * (len(wanted) % 2)
        assert text.tokenizer.pad_id not in ids
        assert len(latents) == len(ids) / 2
    assert phases == {0, 1}


def test_the_official_way_pads_on_the_right() -> None:
    right = build(boundary="right")
    text: Any = right.modalities["text"]
    prompt = next(p for p in PROMPTS if len(text.beginning(p)) % 2)
    ids, latents = given(right, prompt)
    assert ids.tolist() == [*text.beginning(prompt).tolist(), text.tokenizer.pad_id]
    assert len(latents) == len(ids) / 2


def test_what_is_made_has_the_length_that_was_asked_for(
    model: UnifiedPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    text: Any = model.modalities["text"]
    monkeypatch.setattr(text, "has_ended", lambda ids: False)
    monkeypatch.setattr(text, "realise", lambda ids: ids.tolist())
    for size in (1, 5, 8):
        made = model.continue_text(PROMPTS, max_new_tokens=size, seed=0)
        assert [len(ids) for ids in made] == [size] * len(PROMPTS)


@pytest.mark.parametrize(("boundary", "phases"), [("lead", {0, 1}), ("right", {0})])
def test_training_shows_the_phases(boundary: str, phases: set[int], tmp_path: Path) -> None:
    """In the task that is continued and in crops of the autoencoder; about as often each."""
    pipeline = build(boundary=boundary)
    text: Any = pipeline.modalities["text"]
    (raw, *_) = read_shards(tiny.write_shard(tmp_path / "a.tar", tiny.squares()))
    example = Example(raw, pipeline.modalities)
    task = TaskStream("continuation", pipeline.tasks["continuation"], pipeline.modalities)
    crops, items = (ItemStream("s", "text", pipeline.modalities, crop=c) for c in (3, None))
    for stream, kind in ((task, "C"), (crops, "X"), (items, "X")):
        leads = Counter(
            int((stream.prepare(example, generator("p", i))[0][kind] == text.unknown_id).sum())
            for i in range(200)
        )
        assert set(leads) == phases
        assert min(leads.values()) > 60


def test_unknown_tokens_are_no_targets_and_no_text(model: UnifiedPipeline) -> None:
    text: Any = model.modalities["text"]
    ids = text.observe("a big", lead=1)
    assert int(ids[0]) == text.unknown_id
    counted = text.counts(Ragged.of([ids]))["reconstruction"]
    assert counted == len(text.beginning("a big"))
    assert text.realise(ids) == "a big"
    other = ids.clone()
    other[0] = ids[1]  # a known token in its place counts
    assert text.counts(Ragged.of([other]))["reconstruction"] == counted + 1


def test_a_score_conditions_on_whole_latents(model: UnifiedPipeline) -> None:
    """No latent holds parts of prompt and response, so none is given that knows the response."""
    scorer = model.scorer(num_steps=2)
    text: Any = model.modalities["text"]
    odd = next(p for p in PROMPTS if len(text.beginning(p)) % 2)
    (found,) = model.score(["e red"], [odd], num_samples=1, num_steps=2, ends=False)
    prompt = text.pad(text.beginning(odd), 1, "lead")
    whole = torch.cat([prompt, text.beginning("e red")])
    terms = scorer.terms(whole, len(prompt), 1, derive(0, "response"))
    assert found.response.value == pytest.approx(float(terms.log_w[0]))
    # a latent that does hold both counts in full
    inside = scorer.terms(whole, len(prompt) + 1, 1, 0)
    outside = scorer.terms(whole, len(prompt), 1, 0)
    assert inside.prior[:, 0].equal(outside.prior[:, 0])
