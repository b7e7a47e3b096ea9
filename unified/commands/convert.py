"""``unified convert``: official Cola DLM checkpoints in and out, and checkpoints of runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from unified.commands.options import Trust, open_pipeline

app = typer.Typer(
    no_args_is_help=True, help="Official checkpoints in and out; checkpoints of runs."
)


@app.command("official")
def official(
    source: Annotated[str, typer.Argument(metavar="DIR", help="An official folder, or hub id.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The pipeline folder to write.")],
) -> None:
    """Make a pipeline folder of an official checkpoint."""
    from unified.cola.official import from_official, has_tokenizer

    pipeline = from_official(source)
    pipeline.save_pretrained(output)
    if not has_tokenizer(pipeline):
        print(f"{source} has no tokenizer.json: the model works on ids only", file=sys.stderr)
    print(output)


@app.command("checkpoint")
def checkpoint(
    source: Annotated[
        Path, typer.Argument(metavar="DIR", help="RUN/checkpoints/STAGE-STEP, whole or sharded.")
    ],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The pipeline folder to write.")],
    raw: Annotated[
        bool, typer.Option("--raw", help="The weights as trained, not averaged.")
    ] = False,
    trust_remote_code: Trust = False,
) -> None:
    """Make a pipeline folder of a checkpoint of a run."""
    from unified.training.export import exported

    exported(source, "raw" if raw else "ema", trust_remote_code).save_pretrained(output)
    print(output)


@app.command("to-official")
def to_official(
    source: Annotated[str, typer.Argument(metavar="DIR", help="A text-only pipeline folder.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The official folder to write.")],
    max_shard_size: Annotated[str, typer.Option(help="Largest weights file.")] = "5GB",
    trust_remote_code: Trust = False,
) -> None:
    """Write a text-only pipeline in the official format."""
    from unified.cola.official import to_official

    to_official(open_pipeline(source, trust_remote_code), output, max_shard_size)
    print(output)
