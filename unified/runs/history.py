"""What a run folder tells of its run: how far each stage is, its values, and what lies beside.

Only files are read, and none is locked, so a run can be looked at while it trains. A value is any
number of a line of ``metrics.jsonl``; its key needs no code here. Nothing here imports torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from unified.config.loading import load_config
from unified.config.schema import Config, StageConfig
from unified.errors import did_you_mean
from unified.runs.health import warnings

#: (step, value) in the order of the file
Curve = list[tuple[int, float]]

#: lines that a mean is taken over
RECENT = 10


@dataclass(frozen=True)
class Value:
    """One key of one stage. `mean` is that of its last `RECENT` lines, `lowest` of them all."""

    last: float
    mean: float
    lowest: float
    lowest_step: int


@dataclass(frozen=True)
class CheckpointFile:
    """A whole checkpoint; `best` is the one of the lowest ``val/loss``."""

    step: int
    bytes: int
    best: bool


@dataclass(frozen=True)
class StageHistory:
    """One stage: `done` of `planned` steps, and whether the next one may begin."""

    name: str
    objective: str
    done: int
    planned: int
    finished: bool
    values: dict[str, Value]
    checkpoints: list[CheckpointFile]
    samples: list[str]
    warnings: list[str]


@dataclass(frozen=True)
class RunHistory:
    """One run. `written` is when its newest file was, in seconds since 1970."""

    path: str
    modalities: list[str]
    tasks: list[str]
    prior: dict[str, Any]
    prior_parameters: int | None
    written: float
    stages: list[StageHistory]
    curves: dict[str, dict[str, Curve]]

    def as_json(self) -> dict[str, Any]:
        """All but the curves, which metrics.jsonl is."""
        return asdict(replace(self, curves={})) | {"curves": f"{self.path}/metrics.jsonl"}


def read_run(folder: Path | str) -> RunHistory:
    """The run in `folder`. ValueError for a folder that holds none, with one that is near."""
    path = Path(folder)
    if not is_run(path):
        what = "holds no run (no config.yaml)" if path.is_dir() else "is no folder"
        raise ValueError(f"{path} {what}; {did_you_mean(str(path), map(str, near(path)))}")
    config = load_config(path / "config.yaml")
    curves = read_curves(path / "metrics.jsonl")
    return RunHistory(
        str(path),
        list(config.modalities),
        list(config.tasks),
        config.prior.model_dump(),
        count_parameters(path / "initial" / "prior"),
        last_written(path),
        [stage_history(path, config, stage, curves.get(stage.name, {})) for stage in config.stages],
        curves,
    )


def is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file()


def near(path: Path) -> Iterator[Path]:
    """Run folders around `path`: inside it, beside it, and the one that it is a part of."""
    for place in (path, path.parent):
        if place.is_dir():
            yield from (p for p in sorted(place.iterdir()) if is_run(p))
    yield from (p for p in path.parents if is_run(p))


def last_written(path: Path) -> float:
    """When the configuration, the metrics or a checkpoint was written last."""
    files = [path / "config.yaml", path / "metrics.jsonl", path / "checkpoints", path / "stages"]
    return max(p.stat().st_mtime for p in files if p.exists())


def count_parameters(folder: Path) -> int | None:
    """The numbers in a folder of safetensors files, by their headers; None without any."""
    from safetensors import SafetensorError, safe_open

    total = 0
    try:
        for path in folder.glob("*.safetensors"):
            with safe_open(path, framework="np") as file:
                total += sum(math.prod(file.get_slice(k).get_shape()) for k in file.keys())  # noqa: SIM118
    except SafetensorError:
        return None
    return total or None


# ---- one stage -----------------------------------------------------------------------------------


def stage_history(
    path: Path, config: Config, stage: StageConfig, curves: Mapping[str, Curve]
) -> StageHistory:
    taken = finished_stages(path).get(stage.name)
    cap = config.training.max_steps
    checkpoints = read_checkpoints(path / "checkpoints", stage.name)
    seen = [step for curve in curves.values() for step, _ in curve]
    return StageHistory(
        stage.name,
        stage.objective,
        max([*seen, *(c.step for c in checkpoints), taken or 0]),
        stage.steps if cap is None else min(stage.steps, cap),
        taken is not None,
        {key: summarise(curve) for key, curve in curves.items()},
        checkpoints,
        sample_folders(path / "samples", stage.name),
        warnings({key: [value for _, value in curve] for key, curve in curves.items()}),
    )


def finished_stages(path: Path) -> dict[str, int]:
    record = path / "stages" / "finished.json"
    return dict(json.loads(record.read_text("utf-8"))) if record.is_file() else {}


def summarise(curve: Curve) -> Value:
    lowest_step, lowest = min(curve, key=lambda point: point[1])
    values = [value for _, value in curve]
    return Value(values[-1], fmean(values[-RECENT:]), lowest, lowest_step)


def read_checkpoints(folder: Path, stage: str) -> list[CheckpointFile]:
    """The whole checkpoints of a stage, oldest first."""
    found: dict[int, tuple[int, int | None]] = {}
    for path in folder.glob(f"{stage}-*/state.json"):
        try:
            state = json.loads(path.read_text("utf-8"))
            sizes = {name: (path.parent / name).stat().st_size for name in state["files"]}
            whole = all(sizes[name] == file["size"] for name, file in state["files"].items())
        except (OSError, ValueError, TypeError):  # being written, or being dropped
            continue
        if state["stage"] == stage and whole:
            progress = state["progress"]
            found[progress["step"]] = (sum(sizes.values()), progress["best_step"])
    best = found[max(found)][1] if found else None
    return [CheckpointFile(step, size, step == best) for step, (size, _) in sorted(found.items())]


def sample_folders(folder: Path, stage: str) -> list[str]:
    """The names of a stage's sample folders, by step."""
    steps = (p.name.removeprefix(f"{stage}-") for p in folder.glob(f"{stage}-*"))
    return [f"{stage}-{step}" for step in sorted(int(s) for s in steps if s.isdecimal())]


# ---- metrics.jsonl -------------------------------------------------------------------------------


def read_curves(path: Path) -> dict[str, dict[str, Curve]]:
    """Stage -> key -> curve, of every number in the file."""
    curves: dict[str, dict[str, Curve]] = {}
    for line in read_lines(path):
        keys = curves.setdefault(str(line.pop("stage")), {})
        step = int(line.pop("step"))
        for key, value in numbers(line.items()):
            keys.setdefault(key, []).append((step, value))
    return curves


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics file; one that is not whole, or not yet, is passed over."""
    if not path.is_file():
        return
    for text in path.read_bytes().splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and {"stage", "step"} <= line.keys():
            yield line


def numbers(pairs: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, float]]:
    """Those pairs whose value is a finite number."""
    for key, value in pairs:
        if isinstance(value, int | float) and math.isfinite(value):
            yield key, float(value)
