"""``unified generate``: text or images from a checkpoint."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Annotated, Any

import typer

from unified.commands.options import (
    Checkpoint,
    Guidance,
    MaxNewTokens,
    Seed,
    Settings,
    Steps,
    Trust,
    given,
    open_pipeline,
)
from unified.config.schema import GenerationConfig

app = typer.Typer(no_args_is_help=True, help="Generate text or images from a checkpoint.")

TaskName = Annotated[str, typer.Option(help="The model's own name for the task.")]


@app.command("continuation")
def continuation(
    checkpoint: Checkpoint,
    prompt: Annotated[list[str], typer.Option(help="The text to go on with; repeatable.")],
    settings: Settings = None,
    seed: Seed = 0,
    steps: Steps = None,
    guidance: Guidance = None,
    max_new_tokens: MaxNewTokens = None,
    trust_remote_code: Trust = False,
) -> None:
    """Continue one or more texts; prints one continuation per prompt."""
    options = given(
        GenerationConfig,
        settings,
        num_steps=steps,
        guidance_scale=guidance,
        max_new_tokens=max_new_tokens,
    )
    pipeline = open_pipeline(checkpoint, trust_remote_code)
    for text in pipeline.continue_text(prompt, seed=seed, **options):
        print(text)


@app.command("captioning")
def captioning(
    checkpoint: Checkpoint,
    image: Annotated[list[Path], typer.Option(help="An image file; repeat it for several.")],
    settings: Settings = None,
    prompt: Annotated[str | None, typer.Option(help="Instruction, e.g. a question.")] = None,
    task: TaskName = "captioning",
    seed: Seed = 0,
    steps: Steps = None,
    guidance: Guidance = None,
    max_new_tokens: MaxNewTokens = None,
    trust_remote_code: Trust = False,
) -> None:
    """Describe one or more images; prints one caption per image."""
    images = [_read_image(path) for path in image]
    prompts = None if prompt is None else [prompt] * len(images)
    options = given(
        GenerationConfig,
        settings,
        num_steps=steps,
        guidance_scale=guidance,
        max_new_tokens=max_new_tokens,
    )
    pipeline = open_pipeline(checkpoint, trust_remote_code)
    for text in pipeline.caption(images, prompts=prompts, task=task, seed=seed, **options):
        print(text)


@app.command("text_to_image")
def text_to_image(
    checkpoint: Checkpoint,
    prompt: Annotated[str, typer.Option(help="What the image shows.")],
    output: Annotated[Path, typer.Option(metavar="FILE", help="Where to write the image.")],
    settings: Settings = None,
    seed: Seed = 0,
    steps: Steps = None,
    guidance: Guidance = None,
    size: Annotated[int | None, typer.Option(min=1, help="Pixels per side.")] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Paint a text; writes one image file."""
    _check_image_name(output)
    options = given(GenerationConfig, settings, num_steps=steps, guidance_scale=guidance)
    pipeline = open_pipeline(checkpoint, trust_remote_code)
    (image,) = pipeline.text_to_image([prompt], size, seed=seed, **options)
    image.save(output)
    print(output)


def _read_image(path: Path) -> Any:
    """The image as it is: turning it upright, and onto white, is the modality's part."""
    from PIL import Image

    data = BytesIO(path.read_bytes())
    try:
        image = Image.open(data)
        image.load()
    except Exception as error:  # decoders raise nearly anything on bytes that are no image
        reason = str(error).replace(repr(data), "its format is unknown")
        raise ValueError(
            f"{path} should be an image file, but it cannot be read: {reason}"
        ) from None
    return image


def _check_image_name(path: Path) -> None:
    """Before minutes are spent on the image: can it be written there?"""
    from PIL import Image

    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"--output should end in an image format such as .png, found {path.name}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--output {path}: there is no folder {path.parent}")
