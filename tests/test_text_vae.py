"""The text VAE's network: official outputs, causality, cache, precision."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from unified.modalities.text.layers import KVCache
from unified.modalities.text.vae import TextVAE
from unified.modalities.text.vae_config import TextVAEConfig

GOLDEN = Path(
    os.environ.get("COLA_GOLDEN", Path(__file__).parents[2] / "shared" / "golden" / "cola_dlm")
)
golden = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason="no golden tensors: set COLA_GOLDEN to their folder"
)
SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "dim": 24,
    "ffn_dim": 32,
    "encoder_num_blocks": 2,
    "decoder_num_blocks": 2,
    "num_heads": 2,
    "latent_dim": 4,
}


def small(**changes: Any) -> TextVAE:
    torch.manual_seed(0)
    return TextVAE(TextVAEConfig(**(SMALL | changes))).double().eval()


def official(name: str, **changes: Any) -> TextVAE:
    stored = json.loads((GOLDEN / name / "config.json").read_text())
    fields = {k: v for k, v in stored.items() if k in TextVAEConfig.model_fields}
    vae = TextVAE(TextVAEConfig(**(fields | changes)))
    vae.load_state_dict(load_file(GOLDEN / name / "model.safetensors"))
    return vae.eval()


def pad(flat: Tensor, lengths: Tensor) -> Tensor:
    return pad_sequence(flat.split(lengths.tolist()), batch_first=True)


def unpad(padded: Tensor, lengths: Tensor) -> Tensor:
    return torch.cat([row[:n] for row, n in zip(padded, lengths.tolist(), strict=True)])


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_default_sizes() -> None:
    with torch.device("meta"):
        vae = TextVAE(TextVAEConfig())
    sizes = {name: p.numel() for name, p in vae.named_parameters()}
    assert sum(sizes.values()) == 501_871_574
    tokens = sizes["encoder.wte.weight"] - 1536 + sizes["decoder.final_layer.weight"]
    assert tokens == 308_054_016


@golden
@pytest.mark.parametrize("block", [1, 4, 16])
@torch.no_grad()
def test_official_encoder(block: int) -> None:
    data = load_file(GOLDEN / "vae_encode.safetensors")
    vae, lengths = official("cola_vae", block_size=block), data["lens"]
    mean, logvar = vae.encoder(pad(data["ids"], lengths), lengths)
    close(unpad(mean, lengths), data[f"mean.block{block}"])
    close(unpad(logvar, lengths), data[f"logvar.block{block}"])


@golden
@torch.no_grad()
def test_official_encoder_of_odd_lengths() -> None:
    data = load_file(GOLDEN / "vae_encode.safetensors")
    vae, lengths = official("cola_vae", block_size=1), data["odd.lens"]
    mean, logvar = vae.encoder(pad(data["odd.ids"], lengths), lengths)
    close(unpad(mean, lengths), data["odd.mean.block1"])
    close(unpad(logvar, lengths), data["odd.logvar.block1"])


@golden
@torch.no_grad()
def test_official_mask_row() -> None:
    data = load_file(GOLDEN / "vae_encode.safetensors")
    ids = data["mask_id_probe.ids"]
    vae = official("cola_vae")
    assert ids[1] == vae.config.vocab_size
    close(vae.encoder(ids[None])[0][0], data["mask_id_probe.mean"])


@golden
@pytest.mark.parametrize("block", [1, 4, 16])
@torch.no_grad()
def test_official_decoder(block: int) -> None:
    data = load_file(GOLDEN / "vae_decode.safetensors")
    vae, lengths = official("cola_vae", block_size=block), data["lens"]
    logits = vae.decoder(pad(data["z"], lengths), lengths_B=lengths)
    close(unpad(logits, lengths), data[f"logits.block{block}"])


@golden
@torch.no_grad()
def test_official_cached_decoder() -> None:
    """Three samples whose prefixes differ in length (one is empty), then two blocks each."""
    data = load_file(GOLDEN / "vae_decode.safetensors")
    vae, lengths, cache = official("cola_vae"), data["cached.prefix_lens"], KVCache()
    logits = vae.decoder(pad(data["cached.prefix_z"], lengths), cache, lengths)
    close(unpad(logits, lengths), data["cached.prefix_logits"])
    for block in ("cached.block1", "cached.block2"):
        logits = vae.decoder(data[f"{block}_z"].unflatten(0, (3, -1)), cache)
        close(logits.flatten(0, 1), data[f"{block}_logits"])


@golden
@pytest.mark.parametrize("name", ["vae_patch2", "vae_prenorm"])
@torch.no_grad()
def test_official_variants(name: str) -> None:
    data, vae = load_file(GOLDEN / f"variant_{name}.safetensors"), official(name)
    lengths, z_lengths = data["lens"], data["z_lens"]
    mean, logvar = vae.encoder(pad(data["ids"], lengths), z_lengths)
    close(unpad(mean, z_lengths), data["mean"])
    close(unpad(logvar, z_lengths), data["logvar"])
    logits = vae.decoder(pad(data["z"], z_lengths), lengths_B=z_lengths)
    close(unpad(logits, lengths), data["logits"])


@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("patch", [1, 2])
def test_nothing_after_a_block_is_seen(block: int, patch: int) -> None:
    """Gradients of one output position reach the latents up to its block's end, and no others."""
    vae = small(block_size=block, patch_size=patch)
    z = torch.randn(1, 9, 4, dtype=torch.float64, requires_grad=True)
    for position in range(9):
        logits = vae.decoder(z)[:, position * patch : (position + 1) * patch]
        (gradient,) = torch.autograd.grad(logits.pow(2).sum(), z)
        end = (position // block + 1) * block
        assert (gradient[0, :end].abs().sum(-1) > 0).all()
        assert (gradient[0, end:] == 0).all()


@pytest.mark.parametrize("block", [1, 4])
@torch.no_grad()
def test_padding_changes_nothing(block: int) -> None:
    vae = small(block_size=block)
    ids = torch.randint(0, 40, (2, 10))
    lengths = torch.tensor([10, 6])
    mean, logvar = vae.encoder(ids, lengths)
    for row, length in enumerate(lengths):
        alone = vae.encoder(ids[row : row + 1, :length])
        torch.testing.assert_close(mean[row, :length], alone[0][0])
        torch.testing.assert_close(logvar[row, :length], alone[1][0])


@pytest.mark.parametrize("block", [1, 2])
@torch.no_grad()
def test_cached_decoding_equals_full_decoding(block: int) -> None:
    """Ragged pieces in one batch: each sample gets what it gets alone and at once."""
    vae = small(block_size=block)
    z = torch.randn(2, 10, 4, dtype=torch.float64)
    full, cache = vae.decoder(z), KVCache()
    done, pieces = [0, 0], [[], []]  # type: tuple[list[int], list[list[Tensor]]]
    for takes in ([2, 6], [4, 0], [4, 4]):
        parts = [z[b, done[b] : done[b] + n] for b, n in enumerate(takes)]
        logits = vae.decoder(pad_sequence(parts, batch_first=True), cache, torch.tensor(takes))
        for b, n in enumerate(takes):
            pieces[b].append(logits[b, :n])
            done[b] += n
    for b in range(2):
        torch.testing.assert_close(torch.cat(pieces[b]), full[b])


@torch.no_grad()
def test_single_precision_agrees_with_double() -> None:
    vae = small()
    ids = torch.randint(0, 40, (2, 12))
    mean, _ = vae.encoder(ids)
    logits = vae.decoder(mean)
    assert logits.dtype == torch.float64
    vae = vae.float()
    close(vae.encoder(ids)[0].double(), mean)
    close(vae.decoder(mean.float()).double(), logits)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="dim 20 must be num_heads 4 times an even number"):
        TextVAEConfig(dim=20, num_heads=4)
    with pytest.raises(ValueError, match="ffn_dim 33 must be even"):
        TextVAEConfig(ffn_dim=33)
