"""A whole tiny model: both modalities, all three tasks, and the shard that they read."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from unified.config.schema import Config
from unified.data.streams import Prepared
from unified.pipeline import UnifiedPipeline

#: pixels of an image, and of one of its 2 x 2 cells
SIDE, CELL = 16, 8
COLOURS = {"red": (220, 40, 30), "green": (40, 170, 60), "blue": (30, 60, 210)}
CAPTIONS = [f"a {size} {colour} square" for size in ("big", "small") for colour in COLOURS]

TEXT: dict[str, Any] = {
    "type": "text",
    "vocab_size": 280,
    "dim": 16,
    "ffn_dim": 32,
    "num_heads": 2,
    "encoder_num_blocks": 1,
    "decoder_num_blocks": 1,
    "latent_dim": 4,
    "max_tokens": 64,
}
IMAGE: dict[str, Any] = {
    "type": "image",
    "max_size": SIDE,
    "channels": 4,
    "network": {
        "block_out_channels": [8, 8],
        "layers_per_block": 1,
        "norm_groups": 4,
        "attention": False,
        "pixel_patch": 4,
    },
}
PRIOR = {"width": 16, "heads": 2, "head_dim": 8, "rope_dim": 6, "single_stream_depth": 1}
TASKS: dict[str, Any] = {
    name: {"type": name, "source": "s", "block": 4}
    for name in ("continuation", "captioning", "text_to_image")
}


def square(caption: str) -> Image.Image:
    """What the caption says, on white."""
    _, size, colour, _ = caption.split()
    image, edge = Image.new("RGB", (SIDE, SIDE), "white"), 12 if size == "big" else 6
    image.paste(COLOURS[colour], (2, 2, 2 + edge, 2 + edge))
    return image


def as_png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def write_shard(path: Path, members: Sequence[tuple[str, bytes]]) -> str:
    """A tar file of (name, data)."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def squares(captions: Sequence[str] = CAPTIONS) -> list[tuple[str, bytes]]:
    """The members of a shard of these captions and their images."""
    return [
        member
        for i, caption in enumerate(captions)
        for member in (
            (f"{i:04}.png", as_png(square(caption))),
            (f"{i:04}.txt", caption.encode()),
        )
    ]


def autoencoder(modality: str, **changes: Any) -> dict[str, Any]:
    """A short autoencoder stage of `modality`."""
    stage = {"name": f"{modality}_vae", "objective": "autoencoder", "modality": modality}
    return {**stage, "sources": {"s": 1.0}, "steps": 2, "batch_size": 4, **changes}


def joint(**changes: Any) -> dict[str, Any]:
    """A short joint stage."""
    return {"name": "joint", "objective": "joint", "steps": 2, "batch_size": 6, **changes}


def tree(folder: Path | str = "unused", shard: str = "unused.tar", **changes: Any) -> Any:
    """A configuration, as a file holds it; a change replaces its whole part."""
    training = {"precision": "fp32", "save_every": 100, "validate_every": 100, "log_every": 1}
    return {
        "run": {"dir": str(folder)},
        "modalities": {"text": TEXT, "image": IMAGE},
        "prior": PRIOR,
        "tasks": TASKS,
        "data": {"sources": {"s": {"train": [shard]}}},
        "stages": [autoencoder("text"), autoencoder("image"), joint()],
        "training": {**training, "validation_examples": 4, "trackers": []},
        "generation": {"num_steps": 4, "guidance_scale": 1.5, "max_new_tokens": 8},
        **changes,
    }


def config(folder: Path | str = "unused", shard: str = "unused.tar", **changes: Any) -> Config:
    return Config.model_validate(tree(folder, shard, **changes))


def pipeline(settings: Config | None = None, seed: int = 0) -> UnifiedPipeline:
    """A new model whose tokenizer knows the captions."""
    torch.manual_seed(seed)
    return UnifiedPipeline.build(settings or config(), {"text": CAPTIONS})


def randomise(module: torch.nn.Module, seed: int = 0) -> None:
    """Random values everywhere: a new prior's gates are shut, and pass nothing on."""
    rng = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        value = torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
        parameter.data = (value / max(parameter.shape[-1], 1) ** 0.5).to(parameter)


def examples(
    of: UnifiedPipeline, count: int = 6, sizes: Sequence[tuple[int, int]] = ((SIDE, SIDE),)
) -> list[Prepared]:
    """Examples of all tasks in turn, each round with images of the next of `sizes` (width and
    height)."""
    made = []
    for slot in range(count):
        name = list(of.tasks)[slot % len(of.tasks)]
        task, caption = of.tasks[name], CAPTIONS[slot % len(CAPTIONS)]
        image = square(caption).resize(sizes[slot // len(of.tasks) % len(sizes)])
        items = task.fill({"text": caption, "image": image})
        observations = {k: task.observe(of.modalities, k, items[k]) for k in items}
        made.append(Prepared(name, f"{slot:04}", slot, observations))
    return made
