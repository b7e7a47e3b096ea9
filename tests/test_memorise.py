"""The whole line at work: four emoji and their captions, learned by heart.

`unified train` trains both autoencoders and the joint prior on a shard of four pairs. The pipeline
is then read back from disk: it must name each image in the exact words, and paint each caption so
that its own image is by far the nearest.
"""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from unified import cli
from unified.data.shards import read_shards
from unified.pipeline import UnifiedPipeline

SOURCE = "embedded:emoji/train-00000.tar"
COUNT, SIDE = 4, 64
MARGIN_DB = 6

CONFIG = """
run: {seed: 0}
modalities:
  text:
    {type: text, vocab_size: 320, dim: 64, ffn_dim: 128, num_heads: 2, encoder_num_blocks: 1,
     decoder_num_blocks: 1, latent_dim: 8}
  image:
    type: image
    max_size: 64
    channels: 16
    beta: 1.0e-6
    network: {block_out_channels: [32, 64, 64], layers_per_block: 1, norm_groups: 8,
              attention: false, pixel_patch: 4}
prior: {width: 128, heads: 4, head_dim: 32, rope_dim: 24, single_stream_depth: 4}
tasks:
  captioning: {type: captioning, source: s, block: 8, unconditional_rate: 0.1}
  text_to_image: {type: text_to_image, source: s, ratio: 3, block: 8, unconditional_rate: 0.1}
stages:
  - {name: text_vae, objective: autoencoder, modality: text, sources: {s: 1}, steps: 200,
     batch_size: 8, optimizer: {lr: 5e-3, warmup_steps: 10}}
  - {name: image_vae, objective: autoencoder, modality: image, sources: {s: 1}, steps: 250,
     batch_size: 4, optimizer: {lr: 3e-3, warmup_steps: 20}}
  - {name: joint, objective: joint, steps: 800, batch_size: 16, row_length: 192,
     posterior: mean, optimizer: {lr: 3e-3, warmup_steps: 30}}
training: {precision: fp32, ema: {decay: 0.99}, trackers: [], save_every: 10000,
           validate_every: 10000}
generation: {num_steps: 12, guidance_scale: 1.5, max_new_tokens: 32}
"""


def pairs() -> list[tuple[Image.Image, str]]:
    """The first emoji of the shipped data, at one size."""
    found = []
    for raw in read_shards(SOURCE)[:: len(read_shards(SOURCE)) // COUNT][:COUNT]:
        picture = Image.open(io.BytesIO(raw.members["webp"])).convert("RGBA")
        flat = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        found.append((flat.convert("RGB").resize((SIDE, SIDE)), raw.members["txt"].decode()))
    return found


def psnr(one: Image.Image, two: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB."""
    a, b = (pil_to_tensor(x).double() for x in (one, two))
    return 10 * math.log10(255**2 / max(1e-9, float((a - b).square().mean())))


@pytest.mark.slow
def test_four_pairs_are_learned_by_heart(tmp_path: Path) -> None:
    images, captions = (list(column) for column in zip(*pairs(), strict=True))
    members = [
        member
        for i, (image, caption) in enumerate(zip(images, captions, strict=True))
        for member in ((f"{i}.png", tiny.as_png(image)), (f"{i}.txt", caption.encode()))
    ]
    shard = tiny.write_shard(tmp_path / "four.tar", members)
    settings = {**yaml.safe_load(CONFIG), "data": {"sources": {"s": {"train": [shard]}}}}
    path = tmp_path / "memorise.yaml"
    path.write_text(yaml.safe_dump(settings))
    with pytest.raises(SystemExit) as end:
        cli.main(["train", str(path), f"run.dir={tmp_path / 'run'}"])
    assert not end.value.code

    torch.manual_seed(1)
    pipeline = UnifiedPipeline.from_pretrained(tmp_path / "run" / "final")
    assert pipeline.caption(images, seed=7) == captions
    painted = pipeline.text_to_image(captions, size=SIDE, seed=7)
    for i, image in enumerate(painted):
        near = [psnr(image, target) for target in images]
        others = max(near[:i] + near[i + 1 :])
        assert near[i] - others >= MARGIN_DB, (captions[i], near)
