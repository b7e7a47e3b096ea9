"""Train a small model, measure it, and show what it does.

    python -m unified.demos.quickstart [CONFIG] [KEY=VALUE]...

CONFIG is a YAML file or the name of a shipped configuration, by default ``quickstart.yaml``. The
run's folder then holds ``report.html``, ``report.png`` and ``evaluation.json``. The same command
continues a run that was interrupted.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from unified.errors import one_line

if TYPE_CHECKING:
    from unified.pipeline import UnifiedPipeline

USAGE = "usage: python -m unified.demos.quickstart [CONFIG] [KEY=VALUE]..."


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the demo; what a user can get wrong ends in one line on stderr and exit code 2."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(given):
        print(USAGE)
        return
    named = bool(given) and "=" not in given[0]
    try:
        quickstart(given[0] if named else "quickstart.yaml", given[named:])
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("UNIFIED_DEBUG") == "1":
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None


def quickstart(name: str, overrides: Sequence[str]) -> None:
    """Train, evaluate, write the report and print its table."""
    from unified.config.loading import load_config
    from unified.demos.emoji_evaluation import evaluate_emoji
    from unified.demos.emoji_report import write_report
    from unified.pipeline import UnifiedPipeline
    from unified.training.folder import RunFolder
    from unified.training.run import train

    config = load_config(name, overrides)
    final = train(config, name)
    pipeline = UnifiedPipeline.from_pretrained(final)
    evaluation = evaluate_emoji(pipeline, config)
    folder = RunFolder(config.run.dir)
    report = write_report(evaluation, folder.path, described(pipeline, folder.metrics))
    print(report.text())
    print(f"\n{folder.path / 'report.html'}\n{folder.path / 'report.png'}\n{final}")


def described(pipeline: UnifiedPipeline, metrics: Path) -> str:
    """The model's size, and how long its stages trained."""
    millions = {
        name: sum(p.numel() for p in module.parameters()) / 1e6
        for name, module in pipeline.modules.items()
    }
    sizes = ", ".join(f"{name} {size:.1f}M" for name, size in millions.items())
    seconds: dict[str, float] = {}
    for line in map(json.loads, metrics.read_text("utf-8").splitlines()):
        seconds[line["stage"]] = line.get("seconds", seconds.get(line["stage"], 0.0))
    times = ", ".join(f"{stage} {taken:.0f} s" for stage, taken in seconds.items())
    return f"{sum(millions.values()):.1f}M parameters ({sizes}). Training time: {times}."


if __name__ == "__main__":
    main()
