"""The reference model of the benchmarks: the official network, smaller, with random weights.

    python benchmarks/reference.py                # its parts and parameters; --json for JSON

Text only, and on ids: what it is given and what it makes are tensors of token ids. A new prior's
gates are shut and its velocity is 0 (AdaLN-zero), so every parameter is moved a little from where
it starts.

FLOPs are counted as in `unified.planning.flops`, which has the prior's: 2 per weight and position
that it must act on, and attention over pairs that see each other. The text VAE's are here, as the
core knows no modality.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import machine
import torch
from torch import Tensor, nn

from unified.cola.official import FLOW, GENERATION
from unified.config.loading import load_config
from unified.config.plugins import resolve_model
from unified.config.schema import Config
from unified.modalities.text.modality import TextConfig, TextModality
from unified.modalities.text.vae_config import TextVAEConfig
from unified.model.prior import Prior
from unified.pipeline import UnifiedPipeline
from unified.planning.flops import prior_flops

#: how far parameters are from where they start (a standard deviation)
NUDGE = 0.02


def official_sizes() -> dict[str, Any]:
    """Those of ``cola-2b.yaml``, without its tokenizer."""
    config = load_config("cola-2b.yaml", [])
    text = {k: v for k, v in config.modalities["text"].options.items() if k != "tokenizer"}
    prior = config.prior.model_dump(exclude={"multi_stream_depth"})
    return {"text": text, "prior": prior, "block": config.tasks["continuation"].options["block"]}


#: size -> the text VAE, the prior, and the latents of a block
SIZES: dict[str, dict[str, Any]] = {
    "reference": {
        "text": {
            "vocab_size": 4096, "dim": 256, "ffn_dim": 1024, "num_heads": 4, "latent_dim": 16,
            "encoder_num_blocks": 4, "decoder_num_blocks": 4,
        },
        "prior": {
            "width": 384, "heads": 6, "head_dim": 64, "rope_dim": 48, "single_stream_depth": 8,
        },
        "block": 16,
    },
    "2b": official_sizes(),
    "tiny": {
        "text": {
            "vocab_size": 64, "dim": 16, "ffn_dim": 32, "num_heads": 2, "latent_dim": 4,
            "encoder_num_blocks": 1, "decoder_num_blocks": 1,
        },
        "prior": {"width": 16, "heads": 2, "head_dim": 8, "rope_dim": 6, "single_stream_depth": 2},
        "block": 4,
    },
}  # fmt: skip


class IdsModality(TextModality):
    """Text whose items are its token ids, so that it needs no tokenizer."""

    def beginning(self, item: Tensor) -> Tensor:  # type: ignore[override]
        return item

    def realise(self, observation: Tensor) -> Tensor:  # type: ignore[override]
        return observation


def configuration(size: str = "reference") -> Config:
    """The model of one size."""
    sizes = SIZES[size]
    task = {"type": "continuation", "source": "corpus", "block": sizes["block"]}
    return Config.model_validate(
        {
            "modalities": {"text": {"type": "text", **sizes["text"]}},
            "prior": {**sizes["prior"], "multi_stream_depth": 0},
            "tasks": {"continuation": task | {"max_tokens": 4096}},
            "flow": FLOW,
            "generation": GENERATION,
        }
    )


def build(size: str = "reference", seed: int = 0, device: str = "cpu") -> UnifiedPipeline:
    """The model on ids, with random weights, made where it is to run."""
    config = configuration(size)
    torch.manual_seed(seed)
    with torch.device(device):
        text = IdsModality(TextConfig(**config.modalities["text"].options), None)
        prior = Prior(config.prior, {"text": text.channels})
        for module in (text, prior):
            nudge(module, seed)
    return UnifiedPipeline(config, {"text": text}, resolve_model(config).tasks, prior)


def nudge(module: nn.Module, seed: int = 0) -> None:
    """Move every parameter a little, so that no gate stays shut."""
    device = next(module.parameters()).device
    rng = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += NUDGE * torch.randn(parameter.shape, generator=rng, device=device)


def random_ids(config: Config, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Token ids of this shape."""
    vocabulary = config.modalities["text"].options["vocab_size"]
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))


# ---- FLOPs --------------------------------------------------------------------------------------


def causal_pairs(length: int, block: int = 1) -> int:
    """(query, key) pairs of `length` positions, in blocks that see themselves and those before."""
    whole, rest = divmod(length, block)
    return block**2 * whole * (whole + 1) // 2 + rest * length


def stack_flops(config: TextVAEConfig, blocks: int, latents: int, pairs: int) -> int:
    """FLOPs of so many blocks of the text VAE over `latents` positions that form `pairs`."""
    gated = config.act == "swiglu"
    feed_forward = config.dim * (config.ffn_dim + config.ffn_dim // (1 + gated))
    weights = 4 * config.dim**2 + feed_forward
    return blocks * (2 * latents * weights + 4 * config.dim * pairs)


def encoder_flops(config: TextVAEConfig, latents: int, pairs: int) -> int:
    """FLOPs of the text VAE's encoder; the embedding is looked up, and costs nothing."""
    outside = config.patch_size * config.dim**2 + 2 * config.latent_dim * config.dim
    return 2 * latents * outside + stack_flops(config, config.encoder_num_blocks, latents, pairs)


def decoder_flops(config: TextVAEConfig, latents: int, pairs: int, read: int) -> int:
    """FLOPs of the text VAE's decoder over `latents`, of which `read` become logits."""
    tokens = read * config.patch_size
    outside = latents * config.latent_dim * config.dim
    outside += tokens * config.dim**2 + tokens * config.dim * config.vocab_size
    return 2 * outside + stack_flops(config, config.decoder_num_blocks, latents, pairs)


def generation_flops(
    config: Config, batch: int, prompt: int, new: int, steps: int, guided: bool
) -> int:
    """FLOPs of continuing `batch` prompts of equal length by `new` tokens, in `steps` per block.

    Encoding and prefilling the prompt, the steps of each block, the commit of each block but the
    last (which nothing reads), and decoding, with logits for what is new.
    """
    text = TextConfig(**config.modalities["text"].options)
    block = int(config.tasks["continuation"].options["block"])
    known, total = (n // text.patch_size for n in (prompt, prompt + new))
    whole, end = known // block * block, -(-total // block) * block

    def prior(positions: int, pairs: int, timesteps: int) -> int:
        channels, counts = {"text": text.latent_dim}, {"text": batch * positions}
        return prior_flops(config.prior, channels, counts, batch * pairs, timesteps)

    flops = batch * encoder_flops(text, known, causal_pairs(known, text.block_size))
    flops += batch * decoder_flops(text, end, causal_pairs(end, text.block_size), end - known)
    flops += prior(whole, causal_pairs(whole, block), 1) if whole else 0
    for start in range(whole, end, block):
        own, seen = block * block, block * (start + block)
        clean = int(start < known)
        flops += steps * prior(block * (1 + guided), seen + guided * own, 1 + clean)
        flops += prior(block, seen, 1) if start + block < end else 0
    return flops


def main(arguments: Sequence[str] | None = None) -> None:
    options = machine.parser(__doc__)
    options.add_argument("--size", choices=list(SIZES), default="reference")
    args = machine.parse(options, arguments)
    modules = build(args.size).modules
    counts = {part: sum(p.numel() for p in m.parameters()) for part, m in modules.items()}
    machine.show([{"part": part, "parameters": count} for part, count in counts.items()], args)


if __name__ == "__main__":
    main()
