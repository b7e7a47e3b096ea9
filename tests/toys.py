"""Small layouts, samples and priors that several test files use."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unified.config.schema import FlowConfig, GenerationConfig, PriorConfig
from unified.flow.matching import FlowMatching
from unified.flow.path import STRAIGHT, Path
from unified.generation.blocks import Request, Session
from unified.latents.modality import Latent
from unified.model.prior import Prior
from unified.randomness import generator
from unified.sequence.layout import Layout
from unified.sequence.packing import PackedBatch, Sample, pack
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
    of: Sequence[Sample], layouts_: Mapping[str, Layout], row_length: int | None = 64
) -> PackedBatch:
    packed = pack(of, layouts_, visibility(layouts_), row_length, AXES)
    return packed.with_latents(latents(of, layouts_))


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
