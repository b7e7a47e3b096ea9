"""The command line: ``unified train | generate | score | eval | convert | ...``.

Every command imports what it needs when it runs, so that ``unified --help`` needs no torch. What
a user can get wrong ends in one line ``error: ...`` and exit code 2; ``UNIFIED_DEBUG=1`` shows
where it came from.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any

import typer

from unified.commands import evaluate, tokenizer
from unified.errors import one_line

app = typer.Typer(
    name="unified",
    help="Unified text-image models on continuous latents.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
generate = typer.Typer(no_args_is_help=True, help="Generate text or images from a checkpoint.")
show = typer.Typer(no_args_is_help=True, help="Show a configuration, a task or a model.")
app.add_typer(generate, name="generate")
convert = typer.Typer(no_args_is_help=True, help="Official Cola DLM checkpoints, in and out.")
app.add_typer(show, name="show")
app.add_typer(convert, name="convert")
app.add_typer(evaluate.app, name="eval")
app.add_typer(tokenizer.app, name="tokenizer")

ConfigName = Annotated[
    str, typer.Argument(metavar="CONFIG", help="A YAML file, or the name of a shipped one.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="E.g. stages.0.steps=10.")
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
Prompts = Annotated[list[str], typer.Option("--prompt", help="Repeat it for several.")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; user mistakes become one line on stderr and exit code 2."""
    try:
        app(args=list(arguments) if arguments is not None else None, prog_name="unified")
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("UNIFIED_DEBUG") == "1":
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None


@app.command()
def train(
    config: ConfigName, overrides: Overrides = None, trust_remote_code: Trust = False
) -> None:
    """Train a model, stage by stage; the same command continues a run that was interrupted."""
    from unified.configuring import load_config
    from unified.training.run import train as run

    final = run(load_config(config, overrides or []), config, trust_remote_code)
    if os.environ.get("RANK", "0") == "0":  # one line, however many processes were launched
        print(final)


@app.command()
def version() -> None:
    """Print the version."""
    from unified import __version__

    print(__version__)


# ---- generate ----------------------------------------------------------------------------------


def _pipeline(checkpoint: str, trust_remote_code: bool) -> Any:
    from unified.pipeline import UnifiedPipeline

    return UnifiedPipeline.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)


def _given(**options: Any) -> dict[str, Any]:
    """The options that were given; the checkpoint's own defaults serve for the others."""
    return {name: value for name, value in options.items() if value is not None}


@generate.command("continuation")
def generate_continuation(
    checkpoint: Checkpoint,
    prompt: Prompts,
    seed: Seed = 0,
    steps: Steps = None,
    guidance: Guidance = None,
    max_new_tokens: MaxNewTokens = None,
    trust_remote_code: Trust = False,
) -> None:
    """Continue one or more texts; prints one continuation per prompt."""
    options = _given(num_steps=steps, guidance_scale=guidance, max_new_tokens=max_new_tokens)
    pipeline = _pipeline(checkpoint, trust_remote_code)
    for text in pipeline.continue_text(prompt, seed=seed, **options):
        print(text)


@generate.command("captioning")
def generate_captioning(
    checkpoint: Checkpoint,
    image: Annotated[list[Path], typer.Option(help="An image file; repeat it for several.")],
    prompt: Annotated[str | None, typer.Option(help="Instruction, e.g. a question.")] = None,
    seed: Seed = 0,
    steps: Steps = None,
    guidance: Guidance = None,
    max_new_tokens: MaxNewTokens = None,
    trust_remote_code: Trust = False,
) -> None:
    """Describe one or more images; prints one caption per image."""
    images = [_read_image(path) for path in image]
    prompts = None if prompt is None else [prompt] * len(images)
    options = _given(num_steps=steps, guidance_scale=guidance, max_new_tokens=max_new_tokens)
    pipeline = _pipeline(checkpoint, trust_remote_code)
    for text in pipeline.caption(images, prompts=prompts, seed=seed, **options):
        print(text)


@generate.command("text_to_image")
def generate_text_to_image(
    checkpoint: Checkpoint,
    prompt: Annotated[str, typer.Option(help="What the image shows.")],
    output: Annotated[Path, typer.Option(metavar="FILE", help="Where to write the image.")],
    seed: Seed = 0,
    steps: Steps = None,
    guidance: Guidance = None,
    size: Annotated[int | None, typer.Option(min=1, help="Pixels per side.")] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Paint a text; writes one image file."""
    _check_image_name(output)
    options = _given(num_steps=steps, guidance_scale=guidance, size=size)
    pipeline = _pipeline(checkpoint, trust_remote_code)
    (image,) = pipeline.text_to_image([prompt], seed=seed, **options)
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


# ---- show --------------------------------------------------------------------------------------


@show.command("config")
def show_config(config: ConfigName, overrides: Overrides = None) -> None:
    """Print the resolved configuration as YAML."""
    from unified.configuring import dump_config, load_config

    print(dump_config(load_config(config, overrides or [])), end="")


@show.command("task")
def show_task(
    name: Annotated[str, typer.Argument(help="A task, e.g. captioning.")],
    lengths: Annotated[str, typer.Option(help="Latents per segment, e.g. P=3,I=4,C=6.")] = "",
    block: Annotated[int, typer.Option(min=1, help="Latents per block.")] = 2,
    unconditional: Annotated[
        bool, typer.Option("--unconditional", help="Add the unconditional copies U.")
    ] = False,
    as_json: AsJson = False,
    trust_remote_code: Trust = False,
) -> None:
    """Draw which position of a task's sequence sees which."""
    from unified import show as view

    layout = view.task_layout(name, block, trust_remote_code)
    print(view.show_task(layout, view.parse_lengths(lengths, layout), unconditional, as_json))


@show.command("model")
def show_model(
    config: ConfigName,
    overrides: Overrides = None,
    as_json: AsJson = False,
    trust_remote_code: Trust = False,
) -> None:
    """Print the model's modules and their parameter counts, without allocating them."""
    from unified import show as view
    from unified.configuring import load_config

    counts = view.parameter_counts(load_config(config, overrides or []), trust_remote_code)
    print(view.show_model(counts, as_json))


# ---- score -------------------------------------------------------------------------------------


@app.command("score")
def score_response(
    checkpoint: Checkpoint,
    response: Annotated[str, typer.Option(help="The text whose likelihood is asked for.")],
    prompt: Annotated[str | None, typer.Option(help="What it comes after.")] = None,
    samples: Annotated[int, typer.Option(help="Posterior samples K.")] = 8,
    estimator: Annotated[str, typer.Option(help="elbo or iwae.")] = "elbo",
    trace: Annotated[str | None, typer.Option(help="hutchinson or exact.")] = None,
    probes: Annotated[str | None, typer.Option(help="rademacher or gaussian.")] = None,
    solver: Annotated[str | None, typer.Option(help="euler, heun, rk4 or dopri5.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of a fixed-step solver.")] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
    trust_remote_code: Trust = False,
) -> None:
    """Print the log-likelihood of a response, and its prior, posterior and decoder parts."""
    import json

    options = _given(trace=trace, probes=probes, solver=solver, num_steps=steps)
    pipeline = _pipeline(checkpoint, trust_remote_code)
    prompts = None if prompt is None else [prompt]
    (found,) = pipeline.score([response], prompts, samples, estimator, seed, **options)
    if as_json:
        print(json.dumps(found.as_json(), indent=2))
        return
    from unified.likelihood.report import as_table

    print(as_table(found))


# ---- convert -----------------------------------------------------------------------------------


@convert.command("official")
def convert_official(
    source: Annotated[str, typer.Argument(metavar="DIR", help="An official folder, or hub id.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The pipeline folder to write.")],
) -> None:
    """Make a pipeline folder of an official checkpoint."""
    from unified.official import from_official

    pipeline = from_official(source)
    pipeline.save_pretrained(output)
    if not pipeline.modalities["text"].has_tokenizer:
        print(f"{source} has no tokenizer.json: the model works on ids only", file=sys.stderr)
    print(output)


@convert.command("to-official")
def convert_to_official(
    source: Annotated[str, typer.Argument(metavar="DIR", help="A text-only pipeline folder.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The official folder to write.")],
    max_shard_size: Annotated[str, typer.Option(help="Largest weights file.")] = "5GB",
) -> None:
    """Write a text-only pipeline in the official format."""
    from unified.official import to_official

    to_official(_pipeline(source, False), output, max_shard_size)
    print(output)


if __name__ == "__main__":
    main()
