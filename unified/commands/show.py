"""``unified show``: a configuration, a task or a model."""

from __future__ import annotations

from typing import Annotated

import typer

from unified.commands.options import AsJson, ConfigName, Overrides, Trust

app = typer.Typer(no_args_is_help=True, help="Show a configuration, a task or a model.")


@app.command("config")
def config(config: ConfigName, overrides: Overrides = None) -> None:
    """Print the resolved configuration as YAML."""
    from unified.config.loading import dump_config, load_config

    print(dump_config(load_config(config, overrides or [])), end="")


@app.command("task")
def task(
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
    from unified.planning import describe as view

    layout = view.task_layout(name, block, trust_remote_code)
    print(view.show_task(layout, view.parse_lengths(lengths, layout), unconditional, as_json))


@app.command("model")
def model(
    config: ConfigName,
    overrides: Overrides = None,
    as_json: AsJson = False,
    trust_remote_code: Trust = False,
) -> None:
    """Print the model's modules and their parameter counts, without allocating them."""
    from unified.config.loading import load_config
    from unified.planning import describe as view

    counts = view.parameter_counts(load_config(config, overrides or []), trust_remote_code)
    print(view.show_model(counts, as_json))
