"""``unified eval``: score answers, or let a model answer first."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from unified.commands.options import (
    AsJson,
    Checkpoint,
    Settings,
    Trust,
    given,
    open_pipeline,
)
from unified.config.schema import GenerationConfig
from unified.errors import as_text

app = typer.Typer(no_args_is_help=True, help="Score answers to benchmark questions.")


def _print(found: list[Any], as_json: bool) -> None:
    from unified.evaluation.benchmarks.answers import as_table

    print(json.dumps([asdict(a) for a in found], indent=2) if as_json else as_table(found))


@app.command("answers")
def answers(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="TASK.jsonl files.")],
    task: Annotated[str | None, typer.Option(help="If the file's name is not the task's.")] = None,
    as_json: AsJson = False,
) -> None:
    """Score files of answers by the official rule and by the paper's."""
    from unified.evaluation.benchmarks.answers import score_file

    _print([score_file(path, task) for path in files], as_json)


@app.command("run")
def run(
    checkpoint: Checkpoint,
    task: Annotated[str, typer.Option(help="E.g. lambada.")],
    file: Annotated[Path, typer.Option(help="Questions: one JSON object a line.")],
    settings: Settings = None,
    output: Annotated[Path | None, typer.Option(help="Answers; default beside the file.")] = None,
    few_shot: Annotated[Path | None, typer.Option(help="Worked examples, as text.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first rows.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 20,
    seed: Annotated[int, typer.Option()] = 66,
    as_json: AsJson = False,
    trust_remote_code: Trust = False,
) -> None:
    """Answer a file of questions and score the answers; a stopped run is continued."""
    from unified.evaluation.benchmarks.answering import answer_file
    from unified.evaluation.benchmarks.answers import task_of

    task_of(file, task)
    pipeline = open_pipeline(checkpoint, trust_remote_code)
    found = answer_file(
        pipeline,
        task,
        file,
        output or file.with_name(f"{file.stem}.answers.jsonl"),
        limit,
        batch_size,
        seed,
        as_text(few_shot.read_bytes(), few_shot) if few_shot else "",
        checkpoint,
        **given(GenerationConfig, settings),
    )
    _print([found], as_json)
