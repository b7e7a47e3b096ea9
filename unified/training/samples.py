"""Samples while training: what the model makes of the first validation examples.

A joint stage generates each task's target from the rest of the example; where there is no rest (a
text that goes on), from the first half of the target. An autoencoder stage reconstructs, and sets
originals above reconstructions where the modality has a way to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from unified.config.schema import GenerationConfig
from unified.data.streams import Prepared
from unified.generation.items import Inference, Wish
from unified.latents.modality import Modality, decode, encode, modes
from unified.latents.ragged import Latent
from unified.pipeline import UnifiedPipeline
from unified.randomness import derive
from unified.sequence.layout import Layout

#: examples of each stream, and pairs on a sheet of reconstructions
SAMPLES, PAIRS = 4, 8


def reconstruct(modality: Modality, observations: Sequence[Tensor]) -> list[Any]:
    """The items that the autoencoder gives back."""
    latents = modes(encode(modality, observations))
    return [modality.realise(o) for o in decode(modality, latents)]


def write_reconstructions(
    folder: Path, stream: str, modality: Modality, observations: Sequence[Tensor]
) -> dict[str, Any]:
    """The first reconstructions as files of their own, and a sheet of originals above
    reconstructions, ``STREAM-sheet``, of a modality that can draw one; the items by name."""
    shown = observations[:PAIRS]
    back = reconstruct(modality, shown)
    written = write(folder, stream, modality, back[:SAMPLES])
    sheet = modality.sheet([[modality.realise(o) for o in shown], back])
    if sheet is not None:
        modality.write(sheet, folder / f"{stream}-sheet")
        written[f"{stream}-sheet"] = sheet
    return written


def generate(
    pipeline: UnifiedPipeline, task: str, examples: Sequence[Prepared], settings: GenerationConfig
) -> list[Any]:
    """The items that `task` generates for `examples`, each as large as the true one."""
    layout, target = pipeline.tasks[task].layout, pipeline.tasks[task].generates
    wishes = [wish(layout, target, encoded(pipeline.modalities, layout, e)) for e in examples]
    seeds = [derive("sample", e.slot) for e in examples]
    of = (pipeline.modalities, pipeline.tasks, pipeline.prior)
    inference = Inference(*of, task, pipeline.path)
    made: dict[int, Any] = {}
    for items in inference.stream(wishes, settings, seeds):
        made |= items
    return [made[index] for index in range(len(examples))]


def encoded(
    modalities: Mapping[str, Modality], layout: Layout, example: Prepared
) -> dict[str, Latent]:
    """Kind -> latent of an example."""
    return {
        kind: modes(encode(modalities[layout[kind].modality], [observation]))[0]
        for kind, observation in example.observations.items()
    }


def wish(layout: Layout, target: str, latents: Mapping[str, Latent]) -> Wish:
    """All but the target as given; without anything else, the target's first half."""
    given = {kind: latent for kind, latent in latents.items() if kind != target}
    grid = latents[target].grid
    if given or layout[target].block is None:
        return Wish(given, grid=grid)
    half = grid[0] // 2
    return Wish({target: Latent(latents[target].values[:half], (half,))}, grid=(grid[0] - half,))


def write(folder: Path, stream: str, modality: Modality, items: Sequence[Any]) -> dict[str, Any]:
    """One file an item: ``STREAM-INDEX`` and the modality's ending. Returns the items by name."""
    named = {f"{stream}-{index}": item for index, item in enumerate(items)}
    for name, item in named.items():
        modality.write(item, folder / name)
    return named
