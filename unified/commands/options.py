"""What several commands share: their options, and how a checkpoint is opened."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import BaseModel

if TYPE_CHECKING:
    from unified.pipeline import UnifiedPipeline

ConfigName = Annotated[
    str, typer.Argument(metavar="CONFIG", help="A YAML file, or the name of a shipped one.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="E.g. stages.0.steps=10.")
]
Settings = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Any setting of generation, e.g. solver=heun."),
]
Density = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="How densities are computed: trace, probes, num_probes, solver, num_steps, tolerance.",
    ),
]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Allow plugins named by a path to code.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Checkpoint = Annotated[
    str, typer.Option(metavar="DIR", help="A pipeline folder, or its hub id OWNER/NAME.")
]
Seed = Annotated[int, typer.Option(help="The same seed gives the same result.")]
Steps = Annotated[int | None, typer.Option(min=1, help="ODE steps per block.")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale; 1 is none.")]
MaxNewTokens = Annotated[int | None, typer.Option(min=1, help="Longest text to generate.")]


def open_pipeline(checkpoint: str, trust_remote_code: bool = False) -> UnifiedPipeline:
    """The pipeline, on this machine's accelerator if there is one."""
    from unified.model.precision import current_device
    from unified.pipeline import UnifiedPipeline

    return UnifiedPipeline.from_pretrained(checkpoint, trust_remote_code, current_device())


def given(
    model: type[BaseModel], settings: Sequence[str] | None = None, **options: Any
) -> dict[str, Any]:
    """KEY=VALUE settings, which must be fields of `model`, and the options that were given; the
    checkpoint's own defaults serve for the others. ValueError for what is unknown, makes no sense
    or is given twice."""
    from unified.config.loading import parse_settings
    from unified.errors import validated

    told = parse_settings(settings or [])
    for name, value in options.items():
        if value is not None and name in told:
            raise ValueError(f"{name} is given twice, as an option and as {name}={told[name]}")
        if value is not None:
            told[name] = value
    return validated(model, told).model_dump(include=set(told))
