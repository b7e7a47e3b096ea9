"""The text VAE's network: sizes, causality, cache, precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from unified.modalities.text.transformer import TextKVCache
from unified.modalities.text.vae import TextVAE
from unified.modalities.text.vae_config import TextVAEConfig

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


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_default_sizes() -> None:
    with torch.device("meta"):
        vae = TextVAE(TextVAEConfig())
    sizes = {name: p.numel() for name, p in vae.named_parameters()}
    assert sum(sizes.values()) == 501_871_574
    tokens = sizes["encoder.wte.weight"] - 1536 + sizes["decoder.final_layer.weight"]
    assert tokens == 308_054_016


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
    full, cache = vae.decoder(z), TextKVCache()
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
