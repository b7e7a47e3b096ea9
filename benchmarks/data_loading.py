"""Examples per second of our `Mixture`, beside plain webdataset on the same shards.

    python benchmarks/data_loading.py                     # a table; --json for JSON
    python benchmarks/data_loading.py --generate 2000 --side 256 --workers 0 1 2

Both read tar shards of images with captions, decode with PIL, and make the same observations:
pixels of `--pixels` and token ids. `Mixture` gives what a training step gets: the batches of a
stage, in an order that is a function of the seed and can be resumed. The other is
``WebDataset(urls).decode("pil").map(...)`` under a `DataLoader`, and does neither.

Every setting reads `--examples` examples after a first batch that is not timed, and the best of
`--repeats` counts. `ratio` is ours over webdataset's with as many workers: 1 or more is the goal.
"""

from __future__ import annotations

import io
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import machine
import torch
from PIL import Image
from torch.utils.data import DataLoader

from unified.config.schema import Config
from unified.data.mixture import Feed, Mixture
from unified.data.remote import local_path
from unified.data.source import Source
from unified.data.streams import TaskStream
from unified.latents.modality import Modality
from unified.pipeline import UnifiedPipeline

EMBEDDED = "embedded:emoji/train-{00000..00003}.tar"
SHARDS = 4


def configuration(pixels: int) -> Config:
    """Images of this side and their captions; the networks are never run."""
    blocks = {"encoder_num_blocks": 1, "decoder_num_blocks": 1}
    network = {"block_out_channels": [8, 8], "layers_per_block": 1, "norm_groups": 4}
    return Config.model_validate(
        {
            "modalities": {
                "text": {
                    "type": "text", "vocab_size": 512, "dim": 16, "ffn_dim": 32, "num_heads": 2,
                    **blocks,
                },
                "image": {
                    "type": "image", "max_size": pixels,
                    "network": network | {"pixel_patch": 8, "attention": False},
                },
            },
            "tasks": {"text_to_image": {"type": "text_to_image", "source": "s", "block": 8}},
        }
    )  # fmt: skip


def generate(folder: Path, examples: int, side: int) -> list[str]:
    """Shards of WebP images of smooth noise, with captions, as photographs would compress."""
    urls = [folder / f"{shard:05}.tar" for shard in range(SHARDS)]
    for shard, path in enumerate(urls):
        with tarfile.open(path, "w") as tar:
            for i in range(shard, examples, SHARDS):
                add(tar, f"{i:06}.webp", picture(i, side))
                add(tar, f"{i:06}.txt", f"picture number {i}".encode())
    return [str(path) for path in urls]


def picture(seed: int, side: int) -> bytes:
    rough = (machine.randn((8, 8, 3), seed) * 50 + 128).clamp(0, 255).byte()
    stream = io.BytesIO()
    smooth = Image.fromarray(rough.numpy()).resize((side, side), Image.Resampling.BICUBIC)
    smooth.save(stream, "WEBP")
    return stream.getvalue()


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


class Loading:
    """The two ways to read the same shards."""

    def __init__(self, urls: Sequence[str], pixels: int, batch: int):
        self.source, self.batch = Source("s", urls), batch
        captions = [raw.members["txt"].decode() for raw in self.source]
        pipeline = UnifiedPipeline.build(configuration(pixels), {"text": captions})
        self.task, self.modalities = pipeline.tasks["text_to_image"], pipeline.modalities

    def mixture(self, workers: int) -> Iterator[Sequence[object]]:
        """Batches of our own, without end."""
        feed = Feed(TaskStream("text_to_image", self.task, self.modalities), self.source)
        mixture = Mixture([feed], batch_size=self.batch, seed=0, stage="joint", workers=workers)
        step = 0
        while True:
            (examples,) = mixture.batch(step)
            yield examples
            step += 1

    def webdataset(self, workers: int) -> Iterator[Sequence[object]]:
        """Batches of webdataset, epoch after epoch."""
        from webdataset import WebDataset, handlers

        paths = [str(local_path(url)) for url in self.source.urls]
        shards = WebDataset(paths, shardshuffle=False, handler=handlers.reraise_exception)
        decoded = shards.decode("pil").map(Observe(self.modalities)).repeat()
        return iter(
            DataLoader(decoded, batch_size=self.batch, num_workers=workers, collate_fn=list)
        )


class Observe:
    """A decoded example's observations, as the task makes them."""

    def __init__(self, modalities: Mapping[str, Modality]):
        self.modalities = modalities

    def __call__(self, example: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        image = next(example[e] for e in self.modalities["image"].extensions if e in example)
        text, pixels = self.modalities["text"], self.modalities["image"]
        observed = text.observe(example["txt"], block=8, ends=True)
        return {"C": observed, "I": pixels.observe(image, ends=True)}


def rate(batches: Iterator[Sequence[object]], examples: int) -> float:
    """Examples per second, once the first batch is there."""
    next(batches)
    seen, start = 0, time.perf_counter()
    while seen < examples:
        seen += len(next(batches))
    return seen / (time.perf_counter() - start)


def measure(loading: Loading, workers: int, examples: int, repeats: int) -> dict[str, Any]:
    """One row of the table; the two take turns, so that a busy moment meets both."""
    ours, theirs = [], []
    for _ in range(repeats):
        ours.append(rate(loading.mixture(workers), examples))
        theirs.append(rate(loading.webdataset(workers), examples))
    return {
        "workers": workers,
        "mixture_per_s": max(ours),
        "webdataset_per_s": max(theirs),
        "ratio": max(ours) / max(theirs),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    options = machine.parser(__doc__)
    options.add_argument("--workers", nargs="+", type=int, default=[0, 1, 2])
    options.add_argument("--generate", type=int, help="make so many examples; else emoji")
    options.add_argument("--side", type=int, default=256, help="of generated images")
    options.add_argument("--pixels", type=int, default=64, help="side of an observation")
    options.add_argument("--batch", type=int, default=32)
    options.add_argument("--examples", type=int, default=2000)
    options.add_argument("--repeats", type=int, default=3)
    args = machine.parse(options, arguments)
    with TemporaryDirectory() as folder:
        made = generate(Path(folder), args.generate, args.side) if args.generate else [EMBEDDED]
        loading = Loading(made, args.pixels, args.batch)
        rows = [measure(loading, w, args.examples, args.repeats) for w in args.workers]
    machine.show(rows, args)


if __name__ == "__main__":
    main()
