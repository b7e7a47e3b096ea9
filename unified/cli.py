"""The command line: ``unified train | generate | score | eval | convert | ...``.

Every command imports what it needs when it runs, so that ``unified --help`` needs no torch. What
a user can get wrong ends in one line ``error: ...`` and exit code 2; ``UNIFIED_DEBUG=1`` shows
where it came from.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from unified.commands import (
    convert,
    data,
    evaluate,
    generate,
    inspect,
    plan,
    runs,
    show,
    tokenizers,
)
from unified.commands.options import (
    AsJson,
    Checkpoint,
    ConfigName,
    Density,
    Overrides,
    Seed,
    Trust,
    given,
    open_pipeline,
)
from unified.config.schema import DensityConfig
from unified.errors import StoppedError, one_line

app = typer.Typer(
    name="unified",
    help="Unified text-image models on continuous latents.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for _name, _group in {
    "show": show,
    "eval": evaluate,
    "inspect": inspect,
    "data": data,
    "runs": runs,
    "tokenizer": tokenizers,
    "convert": convert,
}.items():
    app.add_typer(_group.app, name=_name)
app.command("generate", no_args_is_help=True)(generate.generate)
app.command("plan")(plan.plan)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; user mistakes become one line on stderr and exit code 2, and what was
    stopped by a signal ends as such."""
    try:
        app(args=list(arguments) if arguments is not None else None, prog_name="unified")
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("UNIFIED_DEBUG") == "1":
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    except StoppedError as stopped:
        print(stopped, file=sys.stderr)
        raise SystemExit(128 + signal.SIGTERM) from None


@app.command()
def train(
    config: ConfigName, overrides: Overrides = None, trust_remote_code: Trust = False
) -> None:
    """Train a model, stage by stage; the same command continues a run that was interrupted."""
    from unified.config.loading import load_config
    from unified.training.run import train as run

    final = run(load_config(config, overrides or []), config, trust_remote_code)
    if os.environ.get("RANK", "0") == "0":  # one line, however many processes were launched
        print(final)


@app.command()
def version() -> None:
    """Print the version."""
    from unified import __version__

    print(__version__)


@app.command("score")
def score_response(
    checkpoint: Checkpoint,
    response: Annotated[str, typer.Option(help="The text whose likelihood is asked for.")],
    density: Density = None,
    prompt: Annotated[str | None, typer.Option(help="What it comes after.")] = None,
    samples: Annotated[int, typer.Option(help="Posterior samples K.")] = 8,
    estimator: Annotated[str, typer.Option(help="elbo or iwae.")] = "elbo",
    seed: Seed = 0,
    goes_on: Annotated[
        bool, typer.Option("--open", help="The response need not end there: no end mark.")
    ] = False,
    task: Annotated[str | None, typer.Option(help="A task that goes on with a text.")] = None,
    as_json: AsJson = False,
    trust_remote_code: Trust = False,
) -> None:
    """Print the log-likelihood of a response, and its prior, posterior and decoder parts."""
    import json

    options = given(DensityConfig, density)
    pipeline = open_pipeline(checkpoint, trust_remote_code)
    prompts = None if prompt is None else [prompt]
    (found,) = pipeline.score(
        [response], prompts, samples, estimator, seed, not goes_on, task, **options
    )
    if as_json:
        print(json.dumps(found.as_json(), indent=2))
        return
    from unified.likelihood.score_text import as_table

    print(as_table(found))


if __name__ == "__main__":
    main()
