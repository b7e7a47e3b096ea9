"""Checkpoints: all that the next step depends on, in one folder, without pickle.

    checkpoints/STAGE-STEP/
      shard-*.safetensors   by process: "model/NAME", "ema/NAME", "optimizer/STATE/NAME" (whatever
                            states the optimizer has)
      state.json            the scalars, and the size and SHA-256 of each file above

PyTorch's distributed checkpoint writes and reads the tensors: every process its own part, whole or
sharded, and any number of processes what any other number wrote. Random draws are functions of the
step, so no generator is stored. A folder gets its name once everything in it is on the disk; one
that does not match its own sums is named and never read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save

from unified.latents.weights import check_names, check_shapes, named_tensors
from unified.training.ema import EMA
from unified.training.optim import make_state

STATE = "state.json"
#: how chance is drawn, for checkpoints that were made when it was drawn in another way; they say
#: nothing of it
DRAWS = "philox"

# a process alone need not be told that it is
warnings.filterwarnings("ignore", "torch.distributed is disabled")


@dataclass
class Progress:
    """How far a stage has come. `data` is the data's state after `step` steps (its own is ahead, as
    it prepares the next steps early); `best_*` is the lowest ``val/loss`` so far; `trend` is
    what `unified.training.divergence` keeps; `bad` and `truncated` count examples."""

    step: int = 0
    seconds: float = 0.0
    data: dict[str, Any] = field(default_factory=dict)
    best_step: int | None = None
    best_loss: float | None = None
    trend: dict[str, dict[str, float]] = field(default_factory=dict)
    bad: int = 0
    truncated: int = 0

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

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its name in a checkpoint."""
        groups = {
            "model": named_tensors(self.objective),
            "optimizer": optimizer_tensors(self.optimizer, self.objective),
            "ema": self.ema.shadow if self.ema is not None else {},
        }
        return {f"{g}/{n}": t.detach() for g, tensors in groups.items() for n, t in tensors.items()}


def optimizer_tensors(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state as "STATE/PARAMETER" -> tensor."""
    names = {id(p): name for name, p in module.named_parameters()}
    return {
        f"{key}/{names[id(parameter)]}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


# ---- one folder ----------------------------------------------------------------------------------


def write(path: Path, tensors: Mapping[str, Tensor]) -> object:
    """This process's part of `tensors` into the folder `path`. Every process takes part."""
    return save(
        dict(tensors),
        storage_writer=HuggingFaceStorageWriter(str(path), save_distributed=True),
        no_dist=not dist.is_initialized(),
    )


def seal(partial: Path, path: Path, stage: str, progress: Mapping[str, Any]) -> None:
    """Make the folder `partial`, whose tensors are written, the checkpoint `path`."""
    files = {p.name: {"size": p.stat().st_size, "sha256": digest(p)} for p in _shards(partial)}
    state = {"stage": stage, "progress": progress, "draws": DRAWS, "files": files}
    (partial / STATE).write_text(json.dumps(state, indent=2), encoding="utf-8")
    for file in (*_shards(partial), partial / STATE, partial):
        to_disk(file)
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)
    to_disk(path.parent)


def to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, would survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_state(path: Path) -> dict[str, Any] | None:
    """The scalars of the checkpoint at `path`; None if its files are not all there in full."""
    try:
        state: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
        there = {p.name: p.stat().st_size for p in _shards(path)}
        return state if there == {n: f["size"] for n, f in state["files"].items()} else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def draws_alike(path: Path) -> bool:
    """Whether the checkpoint at `path` was made by steps that drew their chance as steps do now."""
    state = read_state(path)
    return state is not None and state.get("draws") == DRAWS


def damage(path: Path) -> str | None:
    """What is wrong with the checkpoint at `path`; None if it is what was written."""
    state = read_state(path)
    if state is None:
        return f"{STATE} or a file that it names is missing or not whole"
    wrong = [n for n, file in state["files"].items() if digest(path / n) != file["sha256"]]
    return f"the SHA-256 of {wrong[0]} is not the one in {STATE}" if wrong else None


def read(path: Path, group: str) -> dict[str, Tensor]:
    """The whole tensors of one group (``model``, ``ema`` or ``optimizer``), on the CPU."""
    found = _metadata(path)
    tensors = {
        name: torch.empty(meta.size, dtype=meta.properties.dtype)
        for name, meta in found.items()
        if name.startswith(f"{group}/")
    }
    load_tensors(tensors, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)
    return {name.partition("/")[2]: tensor for name, tensor in tensors.items()}


def load(path: Path, trained: Trained) -> None:
    """Continue from the checkpoint at `path`. ValueError if it is of another model."""
    state = read_state(path)
    if state is None:
        raise ValueError(f"{path} is not a whole checkpoint")
    found = _metadata(path)
    moments = [n.partition("/")[2] for n in found if n.startswith("optimizer/")]
    known, learned = dict(trained.objective.named_parameters()), {*map(_parameter, moments)}
    unknown = sorted(learned - known.keys())
    if unknown:
        raise ValueError(f"{path} has optimizer state of {unknown[0]}, unknown here")
    make_state(trained.optimizer, [known[name] for name in sorted(learned)])
    tensors = trained.tensors()
    shapes = {name: torch.empty(meta.size, device="meta") for name, meta in found.items()}
    check_shapes(tensors, shapes, path)
    check_names(tensors, shapes, path)
    reader, alone = HuggingFaceStorageReader(str(path)), not dist.is_initialized()
    load_tensors(tensors, storage_reader=reader, no_dist=alone)
    trained.progress = Progress(**state["progress"])


def _parameter(name: str) -> str:
    """ "STATE/PARAMETER" -> the parameter's name."""
    return name.partition("/")[2]


def _shards(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors"))


def _metadata(path: Path) -> dict[str, Any]:
    """Name -> what the checkpoint says of each tensor."""
    metadata = HuggingFaceStorageReader(str(path)).read_metadata()
    return dict(metadata.state_dict_metadata)


# ---- the folder of folders -----------------------------------------------------------------------


def steps(folder: Path, stage: str) -> dict[int, Path]:
    """Step -> folder of the whole checkpoints of `stage`, oldest first."""
    found = {step: path for step, path in _named(folder, stage).items() if read_state(path)}
    return dict(sorted(found.items()))


def newest(folder: Path, stage: str) -> Path | None:
    """The last whole checkpoint of `stage`."""
    return next(reversed(steps(folder, stage).values()), None)


def newest_sound(folder: Path, stage: str) -> tuple[Path | None, list[str]]:
    """The last checkpoint that is what was written, and a sentence for each later one that is
    not."""
    damaged: list[str] = []
    for _, path in sorted(_named(folder, stage).items(), reverse=True):
        reason = damage(path)
        if reason is None:
            return path, damaged
        damaged.append(f"{path} is damaged: {reason}; using the one before it")
    return None, damaged


def _named(folder: Path, stage: str) -> dict[int, Path]:
    """Step -> folder, of everything that has the name of a checkpoint of `stage`."""
    names = {
        path: re.fullmatch(rf"{re.escape(stage)}-(\d+)", path.name) for path in folder.glob("*")
    }
    return {int(name[1]): path for path, name in names.items() if name}


def prune(folder: Path, stage: str, best: int | None, keep: int) -> None:
    """Keep this stage's newest `keep` checkpoints and its best; earlier stages live in stages/."""
    found = steps(folder, stage)
    kept = {path for step, path in found.items() if step in {*list(found)[-keep:], best}}
    for path in folder.glob("*"):
        if path.is_dir() and path not in kept:
            shutil.rmtree(path)
