"""Text to image by its definition: no cache, no blocks, one picture at a time.

    python examples/generate.py CHECKPOINT "a 3D emoji of a red apple" apple.png

The whole sequence, clean caption C and noisy image I, goes through the prior at every step, once as
it is and once with the image relabelled U, which sees itself alone. `UnifiedPipeline` gives the
same picture faster: the caption's keys are cached, and both velocities come from one pass.

Shape legend: L latents of the image, C channels.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from unified import UnifiedPipeline
from unified.flow.solvers import schedule
from unified.latents.modality import decode, encode, modes
from unified.latents.ragged import Latent
from unified.randomness import noise
from unified.sequence.packing import PackedBatch, Sample, latents_of, pack
from unified.sequence.visibility import UNCONDITIONAL, Visibility

TASK = "text_to_image"


@torch.no_grad()
def generate(pipeline: UnifiedPipeline, prompt: str, seed: int) -> Any:
    """The picture of `prompt`, by Euler's method and classifier-free guidance."""
    task, settings = pipeline.tasks[TASK], pipeline.config.generation
    image = pipeline.modalities[task.layout["I"].modality]
    for module in (pipeline.prior, *pipeline.modalities.values()):
        module.eval()

    text = pipeline.modalities[task.layout["C"].modality]
    (caption,) = modes(encode(text, [task.observe(pipeline.modalities, "C", prompt)]))
    grid = image.grid_for(None)
    z_LC = noise((grid[0] * grid[1], image.channels), seed, TASK, "I", 0).to(caption.values)

    for t, t_next in pairwise(schedule(settings.num_steps, z_LC, settings.time_shift)):
        v_c = velocity(pipeline, caption, Latent(z_LC, grid), t, "I")
        v_u = velocity(pipeline, caption, Latent(z_LC, grid), t, UNCONDITIONAL)
        z_LC = z_LC + (t_next - t) * (v_u + settings.guidance_scale * (v_c - v_u))
    return image.realise(decode(image, [Latent(z_LC, grid)])[0])


def velocity(
    pipeline: UnifiedPipeline, caption: Latent, image: Latent, t: Tensor, kind: str
) -> Tensor:
    """dz/dt [L, C] of the image at time t, as `kind`, given the caption."""
    batch = sequence(pipeline, caption, image)
    of_image = batch.where[pipeline.tasks[TASK].layout["I"].modality]
    time_RL, kind_RL = batch.time_RL.clone(), batch.coordinates.kind.clone()
    time_RL.view(-1)[of_image] = t
    kind_RL.view(-1)[of_image] = batch.rules.kind_index[kind]
    coordinates = replace(batch.coordinates, kind=kind_RL)
    found = pipeline.prior(replace(batch, time_RL=time_RL, coordinates=coordinates))
    return found[pipeline.tasks[TASK].layout["I"].modality]


def sequence(pipeline: UnifiedPipeline, caption: Latent, image: Latent) -> PackedBatch:
    """One row: the caption, then the image."""
    whole = pipeline.tasks[TASK].layout
    layout = whole.only({"C", "I"})
    rules, axes = Visibility({TASK: layout.sees}), pipeline.prior.config.axes
    samples = [Sample(TASK, {"C": caption.grid, "I": image.grid})]
    values = [{"C": caption.values, "I": image.values}]
    batch = pack(samples, {TASK: layout}, rules, None, axes).to(image.values.device)
    return batch.with_latents(latents_of(samples, {TASK: layout}, values))


if __name__ == "__main__":
    folder, text, target = sys.argv[1:]
    generate(UnifiedPipeline.from_pretrained(folder), text, seed=0).save(target)
