"""The text modality: tokens in and out, losses and their counts, files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from batched import both, ragged
from safetensors.torch import load_file, save_file
from torch import Tensor

from unified.latents.modality import decode, encode, modes
from unified.latents.ragged import Latent, Posteriors
from unified.modalities.text.modality import TextConfig, TextModality, location_by_width
from unified.modalities.text.tokenizer import Tokenizer

CORPUS = [
    "a 3D emoji of blueberries",
    "a flat emoji of a lime and a motor scooter",
    "It is a truth universally acknowledged, that a single man must be in want of a wife.",
    "Call me Ishmael.",
] * 5
SMALL: dict[str, Any] = {
    "vocab_size": 320,
    "dim": 32,
    "ffn_dim": 64,
    "encoder_num_blocks": 1,
    "decoder_num_blocks": 1,
    "num_heads": 2,
    "latent_dim": 4,
}


def build(**changes: Any) -> TextModality:
    torch.manual_seed(0)
    return TextModality.build(TextConfig(**(SMALL | changes)), CORPUS)


@pytest.fixture(scope="module")
def text() -> TextModality:
    return build()


def posterior_of(text: TextModality, ids: Tensor) -> Posteriors:
    """The posterior of one text."""
    (posterior,) = encode(text, [ids])
    return posterior


@pytest.mark.parametrize(
    "item", ["a lime", " two  spaces\n", "naïve 🫐 漢字", "<|endoftext|> and <|pad|>", "\x00"]
)
def test_every_string_comes_back(text: TextModality, item: str) -> None:
    assert text.realise(text.observe(item)) == item
    assert text.realise(text.observe(item, ends=True, block=16)) == item


def test_ends_and_blocks(text: TextModality) -> None:
    ids = text.observe("a lime")
    tokenizer = text.tokenizer
    assert ids.dtype == torch.int64
    closed = text.observe("a lime", ends=True)
    assert closed.tolist() == [*ids.tolist(), tokenizer.eos_id]
    padded = text.observe("a lime", ends=True, block=16)
    assert len(padded) == 16
    assert padded[: len(closed)].equal(closed)
    assert (padded[len(closed) :] == tokenizer.pad_id).all()
    assert text.grid(padded) == (16,)
    assert text.observe("", ends=True).tolist() == [tokenizer.eos_id]


def test_patches_are_filled() -> None:
    text = build(patch_size=2)
    odd = text.observe("a lime ", ends=True)
    assert len(odd) % 2 == 0
    assert text.grid(odd) == (len(odd) // 2,)
    blocks = text.observe("a lime", block=4)
    assert len(blocks) % 8 == 0
    (back,) = decode(text, modes(encode(text, [odd])))
    assert back.shape == odd.shape


def test_what_cannot_be_observed_is_explained() -> None:
    text = build(max_tokens=3)
    assert len(text.observe("abc")) <= 3
    with pytest.raises(ValueError, match="an empty text has no tokens"):
        text.observe("")
    with pytest.raises(ValueError, match="a text must be a str, but a bytes was found"):
        text.observe(b"abc")
    with pytest.raises(ValueError, match="cannot hold half a character"):
        text.observe("\ud83e")
    with pytest.raises(ValueError, match="a text has 7 tokens, eos included, but max_tokens is 3"):
        text.observe("ZYXWVU", ends=True)
    with pytest.raises(
        ValueError, match="a text must be UTF-8, found invalid start byte at byte 1"
    ):
        text.read(b"a\xff")
    assert text.read("né".encode()) == "né"


def test_without_a_corpus_there_is_a_network_but_no_tokenizer() -> None:
    text = TextModality.build(TextConfig(**SMALL), None)
    assert sum(p.numel() for p in text.parameters()) > 0
    with pytest.raises(ValueError, match="has no tokenizer, and works on ids only"):
        text.observe("a lime")


def test_vocabularies_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vocab_size 200 is too small: 258 tokens are needed"):
        build(vocab_size=200)
    Tokenizer.train(CORPUS, 320).save(tmp_path)
    with pytest.raises(ValueError, match="has 320 tokens, but vocab_size is 300"):
        build(vocab_size=300, tokenizer=str(tmp_path))
    with pytest.raises(ValueError, match=r"expected a folder with tokenizer\.json"):
        build(tokenizer=str(tmp_path / "nowhere"))


def test_a_configured_tokenizer_is_used(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["lime " * 9], 300)
    tokenizer.save(tmp_path)
    text = build(tokenizer=str(tmp_path / "tokenizer.json"))
    assert text.observe("lime lime").tolist() == tokenizer.encode("lime lime")


def test_a_tokenizer_without_special_tokens_is_refused(tmp_path: Path) -> None:
    Tokenizer.train(CORPUS, 320).save(tmp_path)
    options = {"eos_token": {"content": "<eos>"}, "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(options))
    with pytest.raises(ValueError, match="the tokenizer has no eos token '<eos>'"):
        Tokenizer.load(tmp_path)


def test_counts_need_no_network_and_match_the_losses(text: TextModality) -> None:
    observations = [text.observe(item, ends=True, block=8) for item in CORPUS[:4]]
    counts = text.counts(ragged(text, observations))
    real = [len(text.observe(item, ends=True)) for item in CORPUS[:4]]
    assert counts["reconstruction"] == sum(real)
    assert counts["kl"] == sum(len(o) for o in observations)
    assert counts["mask"] == sum(max(1, round(0.15 * n)) for n in real)
    terms = text.loss(*both(text, observations))
    assert terms.keys() == counts.keys() == text.weights().keys()
    assert all(t.ndim == 0 and t.isfinite() for t in terms.values())


@pytest.mark.parametrize("block_size", [1, 4])
def test_losses_are_sums_over_examples(block_size: int) -> None:
    text = build(block_size=block_size).double()
    observations = [text.observe(item, ends=True) for item in CORPUS[:4]]
    together = text.loss(*both(text, observations))
    apart = [text.loss(*both(text, [o], [i])) for i, o in enumerate(observations)]
    for term, value in together.items():
        torch.testing.assert_close(value, torch.stack([a[term] for a in apart]).sum())


def test_pads_have_no_reconstruction_loss(text: TextModality) -> None:
    short, long = (text.observe("a lime", ends=True, block=b) for b in (None, 16))
    sums = []
    for ids in (short, long):
        mode = posterior_of(text, ids).mode
        sums.append(text.reconstruction(ragged(text, [ids]), mode)["reconstruction"])
    torch.testing.assert_close(*sums)


def test_no_mask_weight_leaves_the_term_out() -> None:
    text = build(mask_weight=0.0)
    observations, chance = both(text, [text.observe("a lime")])
    assert text.masking(observations, chance) == {}
    assert "mask" not in text.counts(observations) | text.weights()


def test_masked_tokens_are_hidden_from_their_own_prediction() -> None:
    """With a rate of 1 the encoder reads nothing but mask tokens, and pads."""
    text = build(mask_rate=1.0)
    (read,) = hidden_from(text, [text.observe("a lime", block=8)])
    real = len(text.observe("a lime"))
    assert (read[:real] == text.config.vocab_size).all()
    assert (read[real:] == text.tokenizer.pad_id).all()


def hidden_from(
    text: TextModality, observations: list[Tensor], keys: list[int] | None = None, step: int = 0
) -> list[Tensor]:
    """What the encoder reads of each text while it predicts masked tokens: the ids, some hidden."""
    seen: list[Tensor] = []
    hook = text.network.encoder.wte.register_forward_hook(lambda _, ids, out: seen.append(ids[0]))
    text.masking(*both(text, observations, keys, step))
    hook.remove()
    order = sorted(range(len(observations)), key=lambda i: len(observations[i]))
    rows = dict(zip(order, seen[0], strict=True))
    return [rows[i][: len(o)] for i, o in enumerate(observations)]


@pytest.mark.parametrize("rate", [0.05, 0.15, 0.5])
def test_masking_hides_as_many_tokens_as_are_counted(rate: float) -> None:
    """Of each text its own share of its own tokens, and one at least; never a pad, and never an
    unknown token once more."""
    text = build(mask_rate=rate)
    observations = [text.observe(item, ends=True, block=8) for item in CORPUS[:4]]
    observations.append(text.observe("a lime", lead=3, block=8))
    for ids, read in zip(observations, hidden_from(text, observations), strict=True):
        hidden = (read == text.unknown_id) & (ids != text.unknown_id)
        assert read[~hidden].equal(ids[~hidden])
        assert not hidden[ids == text.tokenizer.pad_id].any()
        assert int(hidden.sum()) == text.counts(ragged(text, [ids]))["mask"] >= 1
        real = int(((ids != text.unknown_id) & (ids != text.tokenizer.pad_id)).sum())
        assert int(hidden.sum()) == max(1, int(rate * real + 0.5))
    whole = text.counts(ragged(text, observations))["mask"]
    assert whole == sum(text.counts(ragged(text, [ids]))["mask"] for ids in observations)


def test_which_tokens_are_hidden_depends_on_the_text_alone() -> None:
    """On its key, and on the step; not on who else is in the batch, in which order, or how long."""
    text = build(mask_rate=0.5)
    texts = [text.observe(item, ends=True, block=4) for item in CORPUS[:4]]
    together = hidden_from(text, texts)
    mixed = hidden_from(text, [texts[2], texts[0]], [2, 0])
    for i, read in enumerate(together):
        (alone,) = hidden_from(text, [texts[i]], [i])
        assert alone.equal(read)
    assert mixed[0].equal(together[2])
    assert mixed[1].equal(together[0])
    assert not hidden_from(text, [texts[2]], [7])[0].equal(together[2])
    assert not hidden_from(text, texts, step=1)[2].equal(together[2])


def test_every_token_is_hidden_as_often_as_any_other() -> None:
    text = build(mask_rate=0.25)
    ids = text.observe(CORPUS[2])
    rows = torch.stack(hidden_from(text, [ids] * 2000))
    share_T = (rows == text.unknown_id).double().mean(0)
    expected = text.counts(ragged(text, [ids]))["mask"] / len(ids)
    assert (share_T - expected).abs().max() < 5 * (expected * (1 - expected) / 2000) ** 0.5


def test_posteriors_have_unit_scale(text: TextModality) -> None:
    posterior = posterior_of(text, text.observe(CORPUS[2]))
    assert posterior.mean_NC.mean(-1).abs().max() < 1e-5
    torch.testing.assert_close(
        posterior.mean_NC.var(-1, unbiased=False), torch.ones(posterior.grid), atol=1e-2, rtol=0
    )


def test_official_scalars_shape_normalised_space() -> None:
    plain, scaled = build(), build(scaling_factor=2.0, shifting_factor=0.5)
    ids = plain.observe("a lime")
    p, s = posterior_of(plain, ids), posterior_of(scaled, ids)
    torch.testing.assert_close(s.mean_NC, (p.mean_NC - 0.5) * 2)
    torch.testing.assert_close(s.logvar_NC.exp().sqrt(), p.logvar_NC.exp().sqrt() * 2)
    z = Latent(torch.randn(3, 4), (3,))
    assert plain.logits([z]).equal(scaled.logits([z]))


def test_a_few_steps_learn_to_reconstruct() -> None:
    text = build(beta=0.01, dim=64, latent_dim=8)
    observations = [text.observe(item, ends=True) for item in CORPUS[:4]]
    optimizer = torch.optim.AdamW(text.parameters(), lr=5e-3)
    counts, weights = text.counts(ragged(text, observations)), text.weights()
    for step in range(60):
        terms = text.loss(*both(text, observations, step=step))
        optimizer.zero_grad()
        torch.stack([weights[k] * terms[k] / counts[k] for k in terms]).sum().backward()
        optimizer.step()
    decoded = decode(text, modes(encode(text, observations)))
    assert [text.realise(ids) for ids in decoded] == CORPUS[:4]


@pytest.mark.parametrize("name", ["text", "notes"])
def test_saved_and_read_back(text: TextModality, tmp_path: Path, name: str) -> None:
    text.save_pretrained(tmp_path, name)
    again = TextModality.from_pretrained(tmp_path, name)
    assert again.config == text.config
    ids = text.observe("a lime", ends=True)
    assert again.observe("a lime", ends=True).equal(ids)
    assert posterior_of(again, ids).mean_NC.equal(posterior_of(text, ids).mean_NC)
    stored = json.loads((tmp_path / f"{name}_vae" / "config.json").read_text())
    assert stored["type"] == "text"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder.in_layer.bias": None}, "lacks tensor decoder.in_layer.bias"),
        ({"surplus": torch.ones(1)}, "has tensor surplus, unknown here"),
        ({"decoder.in_layer.weight": torch.ones(32, 3)}, r"decoder.in_layer.weight .*\[32, 3\]"),
    ],
)
def test_weights_that_do_not_fit_are_named(
    text: TextModality, tmp_path: Path, change: dict[str, Tensor | None], message: str
) -> None:
    text.save_pretrained(tmp_path, "text")
    file = tmp_path / "text_vae" / "model.safetensors"
    changed = load_file(file) | change
    save_file({k: v for k, v in changed.items() if v is not None}, file)
    with pytest.raises(ValueError, match=message):
        TextModality.from_pretrained(tmp_path, "text")


def test_configurations_that_do_not_fit_are_explained(text: TextModality, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the folder holds no saved text modality"):
        TextModality.from_pretrained(tmp_path, "text")
    text.save_pretrained(tmp_path, "text")
    file = tmp_path / "text_vae" / "config.json"
    file.write_text(file.read_text().replace('"type": "text"', '"type": "image"'))
    with pytest.raises(ValueError, match="has type 'image', but a text modality's is 'text'"):
        TextModality.from_pretrained(tmp_path, "text")


def test_transformers_reads_the_tokenizer(text: TextModality, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    text.save_pretrained(tmp_path, "text")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    ours = text.tokenizer
    assert (theirs.pad_token_id, theirs.eos_token_id) == (ours.pad_id, ours.eos_id)
    for item in (CORPUS[2], " naïve 🫐  漢字\n"):
        assert theirs.encode(item, add_special_tokens=False) == ours.encode(item)
        assert theirs.decode(ours.encode(item)) == item


@pytest.mark.parametrize(
    ("channels", "location"),
    [(8, 1.0), (16, 1.0), (32, 1.35), (64, 1.7), (96, 2.051), (128, 2.3), (256, 2.3)],
)
def test_the_timestep_location_follows_the_width(channels: int, location: float) -> None:
    assert location_by_width(channels) == pytest.approx(location, abs=1e-3)
