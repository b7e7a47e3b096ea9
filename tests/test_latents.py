"""Instruments: known values come out, and what is held at a value stays there."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from batched import both
from torch import Tensor

from unified import cli
from unified.cola.official import official_configs
from unified.evaluation.reconstruction import posteriors
from unified.evaluation.robustness import log_snr, noise_robustness
from unified.evaluation.token_table import Judge, as_table, token_table
from unified.latents.measures import psnr
from unified.latents.ragged import Posteriors
from unified.modalities.text.modality import TextConfig, TextModality
from unified.pipeline import UnifiedPipeline

TEXT = "a big green square and a small red square beside it"


@pytest.fixture(scope="module")
def model() -> UnifiedPipeline:
    """A model whose autoencoder knows its captions, with a prior that knows nothing."""
    pipeline = tiny.pipeline(seed=1)
    text = pipeline.modalities["text"]
    optimizer = torch.optim.Adam(text.parameters(), lr=1e-2)
    shown = [text.observe(c, ends=True) for c in tiny.CAPTIONS]
    for step in range(300):
        loss = text.loss(*both(text, shown, step=step))["reconstruction"] / len(shown)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tiny.randomise(pipeline.prior)
    return pipeline


def gaussian(mean: Tensor, std: float) -> Posteriors:
    return Posteriors(mean, torch.full_like(mean, 2 * math.log(std)), ((1, (len(mean),)),))


# ---- logSNR -------------------------------------------------------------------------------------


def test_log_snr_of_known_posteriors() -> None:
    """Equations 16.2-16.3: over all coordinates of all items, whatever their lengths."""
    one = gaussian(torch.full((3, 4), 2.0), 0.5)
    assert log_snr([one]) == pytest.approx(math.log(4 / 0.25))
    other = gaussian(torch.zeros(9, 4), 1.0)
    mixed = (3 * 4.0 / 12) / ((3 * 0.25 + 9 * 1.0) / 12)
    assert log_snr([one, other]) == pytest.approx(math.log(mixed))
    with pytest.raises(ValueError, match="at least one item"):
        log_snr([])


@pytest.mark.parametrize("wanted", [1.0, 4.5])
def test_a_held_log_snr_is_what_is_measured(model: UnifiedPipeline, wanted: float) -> None:
    text = model.modalities["text"]
    assert isinstance(text, TextModality)
    held = TextModality(text.config.model_copy(update={"log_snr": wanted}), text.tokenizer)
    held.load_state_dict(text.state_dict())
    shown = [held.observe(c, ends=True) for c in tiny.CAPTIONS]
    assert log_snr(posteriors(held, shown)) == pytest.approx(wanted, abs=1e-3)
    assert log_snr(posteriors(text, shown)) != pytest.approx(wanted, abs=1e-2)


def test_a_log_snr_needs_means_of_known_power_and_stays_here() -> None:
    with pytest.raises(ValueError, match="only encoder_last_ln gives them"):
        TextConfig(log_snr=1.0, encoder_last_ln=False)
    settings = tiny.config(
        modalities={"text": {**tiny.TEXT, "log_snr": 1.5}},
        tasks={"continuation": tiny.TASKS["continuation"]},
    )
    with pytest.raises(ValueError, match=r"log_snr is held at 1\.5"):
        official_configs(tiny.pipeline(settings))


# ---- robustness ---------------------------------------------------------------------------------


def test_more_noise_gives_back_less(model: UnifiedPipeline) -> None:
    text = model.modalities["text"]
    shown = [text.observe(c, ends=True) for c in tiny.CAPTIONS]
    curve = noise_robustness(text, shown, (0, 500, 1000))
    means = [point.fidelity.mean for point in curve]
    assert means[0] == 1.0
    assert means[0] > means[1] > means[2]
    assert means[2] < 0.3
    again = noise_robustness(text, shown[:2], (500,))
    assert again[0].fidelity.count == 2
    with pytest.raises(ValueError, match="between 0 and 1000, found 1001"):
        noise_robustness(text, shown, (0, 1001))


def test_fidelity_counts_what_is_an_items_own(model: UnifiedPipeline) -> None:
    text, image = model.modalities["text"], model.modalities["image"]
    ids = text.observe("a big", block=8, ends=True)
    wrong = ids.clone()
    wrong[-1] += 1  # a pad
    assert text.fidelity(ids, wrong) == 1.0
    wrong[0] += 1
    real = int((ids != text.tokenizer.pad_id).sum())  # type: ignore[attr-defined]
    assert text.fidelity(ids, wrong) == pytest.approx(1 - 1 / real)
    pixels = image.observe(tiny.square(tiny.CAPTIONS[0]))
    other = pixels.roll(1, -1)
    assert image.fidelity(pixels, other) == pytest.approx(psnr(pixels, other, 255))
    assert image.fidelity(pixels, pixels) == 99.0


# ---- the token table ----------------------------------------------------------------------------


def test_a_row_is_the_score_of_the_blocks_last_latent(model: UnifiedPipeline) -> None:
    (row,) = token_table(model, TEXT, ["beside"], samples=2, trace="exact", num_steps=2)
    scorer = model.scorer(trace="exact", num_steps=2)
    before = TEXT[: TEXT.index(" beside")]
    start = scorer.modality.beginning(before)
    ids = scorer.modality.beginning(TEXT)[: len(start) + 1]
    ids = ids[len(ids) % scorer.block :]
    terms = scorer.terms(ids, len(ids) - 1, 2, 0)
    assert terms.prior.shape == (2, 1)
    assert row.prior == pytest.approx(float(terms.prior.mean()))
    assert row.posterior == pytest.approx(float(terms.posterior.mean()))
    assert row.perplexity == pytest.approx(math.exp(row.posterior - row.prior - row.decoder))
    assert row.token == scorer.modality.realise_all(ids[-1:])
    assert (row.judged_token, row.generated) == (
        None,
        model.continue_text([before], max_new_tokens=1, seed=0)[0],
    )
    assert "log q(z|x)" in as_table([row])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["yellow"], "'yellow' is not in the text"),
        (["squar"], "'squar' is not in the text"),
        (["a"], "is symbol 1 of the text, but a block"),
    ],
)
def test_a_word_that_cannot_be_scored_is_named(
    model: UnifiedPipeline, words: list[str], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        token_table(model, TEXT, words)


def test_a_judge_gives_its_own_perplexity(model: UnifiedPipeline, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    text: Any = model.modalities["text"]
    text.tokenizer.save(tmp_path)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    judge = LlamaForCausalLM(LlamaConfig(vocab_size=280, **sizes, **heads))
    judge.lm_head.weight.data.zero_()  # every token is as likely as any other
    judge.save_pretrained(tmp_path)
    asked = Judge(str(tmp_path))
    assert asked.perplexity("a big", " green") == pytest.approx(280, rel=1e-4)
    assert math.isnan(asked.perplexity("a", ""))
    (row,) = token_table(model, TEXT, ["beside"], samples=1, judge=asked, num_steps=2)
    assert row.judged_token == pytest.approx(280, rel=1e-4)
    with pytest.raises(ValueError, match="holds no causal language model"):
        Judge(str(tmp_path / "nowhere"))


# ---- the command --------------------------------------------------------------------------------


def printed(capsys: Any, *arguments: str, code: int = 0) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main(["inspect", *arguments])
    out = capsys.readouterr()
    assert end.value.code == code, out.err
    return str(out.out or out.err)


def test_the_commands(model: UnifiedPipeline, tmp_path: Path, capsys: Any) -> None:
    model.save_pretrained(tmp_path / "model")
    shard = tiny.write_shard(tmp_path / "a.tar", tiny.squares())
    given = ["--checkpoint", str(tmp_path / "model"), "--shards", shard]
    told = json.loads(printed(capsys, "logsnr", *given, "--json", "--limit", "4"))
    assert told["items"] == 4
    assert f"{told['log_snr']:.3f} nats" in printed(capsys, "logsnr", *given, "--limit", "4")
    curve = json.loads(printed(capsys, "noise", *given, "--levels", "0,1000", "--json"))
    assert [p["timestep"] for p in curve] == [0, 1000]
    assert "PSNR in dB" in printed(capsys, "noise", *given, "--modality", "image", "--levels", "0")
    says = printed(capsys, "noise", *given, "--levels", "none", code=2)
    assert "--levels should be numbers between commas, found 'none'" in says
    assert "no modality 'txt'" in printed(capsys, "logsnr", *given, "--modality", "txt", code=2)
    words = ["--text", TEXT, "--word", "beside", "--word", "red", "--samples", "1", "--json"]
    rows = json.loads(printed(capsys, "tokens", *given[:2], *words, "num_steps=2"))
    assert len(rows) == 2
    assert printed(capsys, "tokens", *given[:2], *words, "num_step=2", code=2).count("\n") == 1
