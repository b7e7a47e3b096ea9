"""Checkpoints: all that the next step depends on, in one folder, without pickle.

    checkpoints/STAGE-STEP/
      model.safetensors       every tensor of the objective, trained or frozen
      ema.safetensors         the averages, by parameter name
      optimizer.safetensors   "STATE/PARAMETER", e.g. "exp_avg/prior.timestep.proj_in.weight"
      state.json              the scalars, and the size of each file above

Random draws are functions of the step, so no generator is stored. A folder whose files are not all
there in full is not a checkpoint: it is never read.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from unified.training.ema import EMA
from unified.weights import assign, named_tensors, read_file, written_whole

KEEP = 2


@dataclass
class Progress:
    """How far a stage has come. `data` is the data's state after `step` steps (its own is ahead, as
    it prepares the next steps early); `best_*` is the lowest ``val/loss`` so far."""

    step: int = 0
    seconds: float = 0.0
    data: dict[str, Any] = field(default_factory=dict)
    best_step: int | None = None
    best_loss: float | None = None

    def is_best(self, loss: float) -> bool:
        return self.best_loss is None or loss < self.best_loss


@dataclass
class Trained:
    """The live objects of a stage that a checkpoint captures."""

    stage: str
    objective: nn.Module
    optimizer: torch.optim.Optimizer
    ema: EMA | None
    progress: Progress = field(default_factory=Progress)


def optimizer_tensors(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state as "STATE/PARAMETER" -> tensor."""
    names = {id(p): name for name, p in module.named_parameters()}
    return {
        f"{key}/{names[id(parameter)]}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, module: nn.Module, tensors: Mapping[str, Tensor]
) -> None:
    """Set the state that `optimizer_tensors` named. AdamW keeps its step counts on the CPU."""
    parameters = dict(module.named_parameters())
    optimizer.state.clear()
    for name, tensor in tensors.items():
        key, parameter = name.split("/", 1)
        target = parameters[parameter]
        optimizer.state[target][key] = tensor if key == "step" else tensor.to(target.device)


def save(folder: Path, trained: Trained) -> Path:
    """Write ``folder/STAGE-STEP`` and drop older ones, but for the best. Main process only."""
    step = trained.progress.step
    path = folder / f"{trained.stage}-{step}"
    tensors = {
        "model": named_tensors(trained.objective),
        "optimizer": optimizer_tensors(trained.optimizer, trained.objective),
    }
    if trained.ema is not None:
        tensors["ema"] = trained.ema.shadow
    with written_whole(path) as partial:
        for name, group in tensors.items():
            owned = {n: t.detach().contiguous() for n, t in group.items()}
            save_file(owned, partial / f"{name}.safetensors")
        state = {
            "stage": trained.stage,
            "progress": asdict(trained.progress),
            "files": {p.name: p.stat().st_size for p in sorted(partial.iterdir())},
        }
        (partial / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
    prune(folder, trained)
    return path


def read_state(path: Path) -> dict[str, Any] | None:
    """The scalars of the checkpoint at `path`; None if it is not a whole checkpoint."""
    try:
        state: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    sizes = {n: (path / n).stat().st_size for n in state["files"] if (path / n).is_file()}
    return state if sizes == state["files"] else None


def steps(folder: Path, stage: str) -> dict[int, Path]:
    """Step -> folder of the whole checkpoints of `stage`, oldest first."""
    found = {}
    for path in folder.glob("*"):
        state = None if path.name.startswith(".") else read_state(path)
        if state is not None and state["stage"] == stage:
            found[int(state["progress"]["step"])] = path
    return dict(sorted(found.items()))


def newest(folder: Path, stage: str) -> Path | None:
    """The last whole checkpoint of `stage`."""
    return next(reversed(steps(folder, stage).values()), None)


def prune(folder: Path, trained: Trained) -> None:
    """Keep this stage's newest `KEEP` checkpoints and its best; earlier stages live in stages/."""
    found = steps(folder, trained.stage)
    kept = {*list(found)[-KEEP:], trained.progress.best_step}
    keep = {path for step, path in found.items() if step in kept}
    for path in folder.glob("*"):
        if path.is_dir() and path not in keep:
            shutil.rmtree(path)


def load(path: Path, trained: Trained) -> None:
    """Continue from the checkpoint at `path`. ValueError if it is of another model."""
    state = read_state(path)
    if state is None:
        raise ValueError(f"{path} is not a whole checkpoint")
    model = path / "model.safetensors"
    assign(named_tensors(trained.objective), read_file(model), model)
    if trained.ema is not None:
        ema = path / "ema.safetensors"
        assign(trained.ema.shadow, read_file(ema), ema)
    tensors = read_file(path / "optimizer.safetensors")
    restore_optimizer(trained.optimizer, trained.objective, tensors)
    trained.progress = Progress(**state["progress"])
