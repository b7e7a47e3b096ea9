"""``unified show``: a configuration, a task or a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from unified.commands.options import AsJson, ConfigName, Overrides, Trust

if TYPE_CHECKING:
    from unified.config.schema import Config

app = typer.Typer(no_args_is_help=True, help="Show a configuration, a task or a model.")


@app.command("config")
def config(config: ConfigName, overrides: Overrides = None) -> None:
    """Print the resolved configuration as YAML."""
    from unified.config.loading import dump_config, load_config

    print(dump_config(load_config(config, overrides or [])), end="")


@app.command("task")
def task(
    name: Annotated[str, typer.Argument(help="A task, e.g. captioning.")],
    checkpoint: Annotated[
        str | None, typer.Option(metavar="DIR", help="Whose task it is: a pipeline folder.")
    ] = None,
    of: Annotated[
        str | None, typer.Option("--config", metavar="CONFIG", help="Whose task it is: a file.")
    ] = None,
    lengths: Annotated[str, typer.Option(help="Latents per segment, e.g. P=3,I=4,C=6.")] = "",
    block: Annotated[int, typer.Option(min=1, help="Latents per block.")] = 2,
    unconditional: Annotated[
        bool, typer.Option("--unconditional", help="Add the unconditional copies U.")
    ] = False,
    as_json: AsJson = False,
    trust_remote_code: Trust = False,
) -> None:
    """Draw which position of a task's sequence sees which, and list its segments."""
    from unified.planning import describe as view

    if checkpoint is not None and of is not None:
        raise ValueError("name a checkpoint or a configuration, not both")
    found = view.find_task(name, _configuration(checkpoint, of), trust_remote_code)
    layout = view.shortened(found.layout, block)
    sizes = view.parse_lengths(lengths, layout)
    print(view.show_task(layout, sizes, unconditional, as_json, found))


def _configuration(checkpoint: str | None, config: str | None) -> Config | None:
    """What the model, or the file, says of its tasks."""
    if checkpoint is not None:
        from unified.pipeline import read_index

        return read_index(checkpoint)[1]
    if config is not None:
        from unified.config.loading import load_config

        return load_config(config)
    return None


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
