"""``unified runs``: look at the runs in run folders, finished or not."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unified.commands.options import AsJson

app = typer.Typer(no_args_is_help=True, help="Look at training runs.")


@app.callback()
def runs() -> None:
    """Look at training runs."""


@app.command("show")
def show(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Run folders.")],
    plot: Annotated[
        bool, typer.Option("--plot", help="Draw all curves to curves.png of the (first) DIR.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw them to this .png, .pdf or .svg.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Summarise a run, or compare several: steps, losses, speed, checkpoints; and draw them."""
    import json

    from unified.runs.history import read_run
    from unified.runs.history_text import show_runs

    found = [read_run(folder) for folder in folders]
    print(json.dumps([r.as_json() for r in found], indent=2) if as_json else show_runs(found))
    if plot or output is not None:
        from unified.runs.curves import draw

        target = output or folders[0] / "curves.png"
        draw(found, target)
        typer.echo(f"curves: {target}", err=True)
