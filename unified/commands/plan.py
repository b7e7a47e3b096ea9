"""``unified plan``: what a stage costs on given GPUs, without any."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from unified.commands.options import AsJson, ConfigName, Overrides, Trust


def plan(
    config: ConfigName,
    overrides: Overrides = None,
    stage: Annotated[str | None, typer.Option(help="A joint stage; by default the last.")] = None,
    gpus: Annotated[int, typer.Option(help="How many GPUs share the batch.")] = 1,
    gpu: Annotated[
        str, typer.Option(help="a100-40, a100-80, h100, h200, b200, or custom.")
    ] = "h100",
    peak_tflops: Annotated[
        float | None, typer.Option(help="Dense TFLOP/s of a custom GPU.")
    ] = None,
    memory_gb: Annotated[float | None, typer.Option(help="GB of a custom GPU.")] = None,
    mfu: Annotated[float, typer.Option(help="Share of the peak that training reaches.")] = 0.4,
    steps: Annotated[int | None, typer.Option(help="By default the stage's own.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="bf16 or fp32; by default the configuration's.")
    ] = None,
    text_tokens: Annotated[
        int | None, typer.Option(help="Tokens of a text whose task sets no limit.")
    ] = None,
    image_size: Annotated[int | None, typer.Option(help="Pixels of an image's side.")] = None,
    size: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODALITY=N", help="Size of a modality's items, in its own unit; repeatable."
        ),
    ] = None,
    as_json: AsJson = False,
    trust_remote_code: Trust = False,
) -> None:
    """Print parameters, FLOPs, memory per device and time of a joint stage, without running it."""
    from unified.config.loading import load_config
    from unified.planning import plan_text as report
    from unified.planning.draft import make_plan
    from unified.planning.figures import PlanRequest
    from unified.planning.gpus import find_gpu
    from unified.planning.typical import Sizes

    chosen = find_gpu(gpu, peak_tflops, memory_gb)
    sizes = Sizes(text_tokens, image_size, _named(size or []))
    request = PlanRequest(chosen, gpus, mfu, steps, precision, sizes)
    found = make_plan(
        load_config(config, overrides or []), request, stage, config, trust_remote_code
    )
    print(json.dumps(report.as_tree(found), indent=2) if as_json else report.as_text(found))


def _named(sizes: list[str]) -> dict[str, int]:
    """Modality -> size, of what was told as MODALITY=N."""
    found = {}
    for pair in sizes:
        name, _, number = pair.partition("=")
        if not (name and number.isdecimal()):
            raise ValueError(f"--size should read MODALITY=N, found {pair!r}")
        found[name] = int(number)
    return found
