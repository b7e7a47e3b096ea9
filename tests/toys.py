"""Small layouts, samples and priors that several test files use."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unified.config.schema import FlowConfig, GenerationConfig, PriorConfig
from unified.flow.matching import FlowMatching, Target
from unified.flow.path import STRAIGHT, Path
from unified.generation.blocks import Request, Session
from unified.latents.ragged import Latent
from unified.model.prior import Prior
from unified.randomness import Chance, generator
from unified.sequence.layout import Layout
from unified.sequence.packing import PackedBatch, Packer, Sample, latents_of
from unified.sequence.visibility import Visibility
from unified.tasks.captioning import Captioning, CaptioningConfig
from unified.tasks.continuation import Continuation, ContinuationConfig
from unified.tasks.text_to_image import TextToImage, TextToImageConfig

CHANNELS = {"text": 3, "image": 5}
AXES = 3


def layouts(block: int = 2, unconditional_rate: float = 0.0) -> dict[str, Layout]:
    shared = {"source": "s", "block": block, "unconditional_rate": unconditional_rate}
    return {
        "continuation": Continuation(ContinuationConfig(**shared)).layout,
        "captioning": Captioning(CaptioningConfig(**shared)).layout,
        "text_to_image": TextToImage(TextToImageConfig(**shared)).layout,
    }


def visibility(of: Mapping[str, Layout]) -> Visibility:
    return Visibility({name: layout.sees for name, layout in of.items()})


def samples(count: int, seed: int = 0) -> list[Sample]:
    """Samples of random tasks and sizes; text fills whole blocks of 2."""
    rng = generator(seed, "samples")

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=rng))

    made = []
    for _ in range(count):
        text, image = (2 * draw(1, 4),), (draw(1, 3), draw(1, 3))
        made.append(
            [
                Sample("continuation", {"C": text}),
                Sample("captioning", {"P": (draw(1, 3),), "I": image, "C": text}),
                Sample("text_to_image", {"C": text, "I": image}),
            ][draw(0, 2)]
        )
    return made


def latents(
    of: Sequence[Sample], layouts_: Mapping[str, Layout], seed: int = 0
) -> list[dict[str, Tensor]]:
    """Random latents of every sample, by kind, in float64; a function of (seed, sample index)."""
    return [
        {
            kind: torch.randn(
                math.prod(grid),
                CHANNELS[layouts_[s.task][kind].modality],
                generator=generator(seed, i, kind),
                dtype=torch.float64,
            )
            for kind, grid in s.grids.items()
        }
        for i, s in enumerate(of)
    ]


def batch(
    of: Sequence[Sample],
    layouts_: Mapping[str, Layout],
    row_length: int | None = 64,
    values: Sequence[Mapping[str, Tensor]] | None = None,
    slots: Sequence[int] | None = None,
    training: bool = False,
) -> PackedBatch:
    """Samples in rows, with their latents (`values`, or random ones)."""
    rule = visibility(layouts_)
    packed = Packer(layouts_, rule, AXES, row_length, training)(of, slots=slots).under(rule)
    values = latents(of, layouts_) if values is None else values
    return packed.with_latents(latents_of(of, layouts_, values))


class Part(NamedTuple):
    """One segment of one sample: which of its modality's N positions it has, and their blocks."""

    sample: int
    kind: str
    modality: str
    at: Tensor
    block: Tensor


def parts(of: PackedBatch) -> list[Part]:
    """The segments in a batch, as its coordinates tell them."""
    kinds = {number: kind for kind, number in of.rules.kind_index.items()}
    found = []
    for m, where_N in of.where.items():
        sample_N, kind_N, block_N = (
            t.flatten()[where_N]
            for t in (of.coordinates.sample, of.coordinates.kind, of.coordinates.block)
        )
        for sample, kind in torch.stack([sample_N, kind_N], 1).unique(dim=0).tolist():
            at = ((sample_N == sample) & (kind_N == kind)).nonzero()[:, 0]
            found.append(Part(sample, kinds[kind], m, at, block_N[at]))
    return found


def corrupt(
    of: PackedBatch, matching: FlowMatching, seed: int = 3
) -> tuple[PackedBatch, dict[str, Target]]:
    """What training makes of a batch, with the chance of `seed`."""
    kept = matching.keep_beginnings(of, Chance(seed))
    return matching.corrupt(kept, matching.draw(kept, Chance(seed), CHANNELS))


def prior(multi: int = 1, single: int = 1, seed: int = 0, **options: int) -> Prior:
    """A small prior in float64 whose every weight is random, so that nothing is gated away."""
    sizes = {"width": 16, "heads": 2, "head_dim": 8, "rope_dim": 6, "mlp_ratio": 2, **options}
    config = PriorConfig(multi_stream_depth=multi, single_stream_depth=single, **sizes)
    model = Prior(config, CHANNELS).double()
    rng = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        value = torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
        parameter.data = value / math.sqrt(parameter.shape[-1])
    return model


def flow(layouts_: Mapping[str, Layout], **options: object) -> FlowMatching:
    return FlowMatching(FlowConfig.model_validate(options), layouts_)


def settings(
    num_steps: int = 16, guidance_scale: float = 1.0, solver: str = "euler", **others: Any
) -> GenerationConfig:
    """Settings of generation, without guidance unless it is asked for."""
    told = {"num_steps": num_steps, "guidance_scale": guidance_scale, "solver": solver, **others}
    return GenerationConfig.model_validate(told)


def generate(
    model: Prior,
    layouts_: Mapping[str, Layout],
    task: str,
    target: str,
    requests: Sequence[Request],
    told: GenerationConfig,
    path: Path = STRAIGHT,
) -> list[Latent]:
    """The whole target of each request, known beginning included."""
    session = Session(model, layouts_, task, target, requests, told, path)
    while session.active:
        session.step()
        session.finish([])
    return [Latent(z, r.grid) for z, r in zip(session.latents, requests, strict=True)]
