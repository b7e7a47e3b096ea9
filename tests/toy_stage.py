"""A toy stage for the engine's tests: two terms with different counts, two parameter groups."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from unified.config.schema import StageConfig, TrainingConfig
from unified.data.batches import microbatches
from unified.randomness import generator
from unified.training.folder import RunFolder
from unified.training.loop import Stage, train_stage
from unified.training.objectives.objective import Objective

WIDTH = 4


@dataclass(frozen=True)
class ToyExample:
    slot: int
    x: Tensor
    truncated: bool = False


@dataclass(frozen=True)
class ToyBatch:
    x: Tensor
    noise: Tensor
    marked: Tensor
    counts: dict[str, float]

    @property
    def positions(self) -> tuple[float, float]:
        return float(len(self.x)), float(len(self.x))


@dataclass(frozen=True)
class ToyCollate:
    """Noise of each example, which is not finite at step `diverge_at`."""

    seed: int
    diverge_at: int | None

    def __call__(self, examples: Sequence[ToyExample], step: int) -> ToyBatch:
        noise = [torch.randn(WIDTH, generator=generator(self.seed, step, e.slot)) for e in examples]
        if step == self.diverge_at:
            noise[0] = noise[0] * float("nan")
        marked = torch.tensor([float(e.slot % 3 == 0) for e in examples])
        counts = {"fit": float(len(examples)), "size": float(marked.sum())}
        return ToyBatch(torch.stack([e.x for e in examples]), torch.stack(noise), marked, counts)


class ToyObjective(Objective):
    """An encoder (vae) and a linear map (main); `size` counts only every third example."""

    def __init__(self, seed: int = 0, diverge_at: int | None = None, dropout: float = 0.0):
        super().__init__()
        self.encoder = nn.Linear(WIDTH, WIDTH)
        self.main = nn.Linear(WIDTH, WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.collate = ToyCollate(seed, diverge_at)
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(torch.randn(p.shape, generator=generator(seed, "init", i)))

    def forward(self, batch: ToyBatch) -> dict[str, Tensor]:
        z_NW = self.encoder(batch.x)
        y_NW = self.main(self.dropout(z_NW) + 0.1 * batch.noise) + self.frozen(z_NW)
        error_N = ((y_NW - batch.x.flip(-1)) ** 2).sum(-1)
        return {"fit": error_N.sum(), "size": ((z_NW**2).sum(-1) * batch.marked).sum()}

    def weights(self, step: int) -> dict[str, float]:
        return {"fit": 1.0, "size": 0.1}

    def groups(self) -> dict[str, list[nn.Parameter]]:
        return {"main": list(self.main.parameters()), "vae": list(self.encoder.parameters())}


class ToyData:
    """Batches in order; like a mixture, it must be told where it is."""

    bad = truncated = 0

    def close(self) -> None:
        pass

    def __init__(self, collate: ToyCollate, batch_size: int = 8, seed: int = 0, parts: int = 1):
        self.collate, self.batch_size, self.seed, self.parts = collate, batch_size, seed, parts
        self.share, self.position = (0, 1), 0

    def batch(self, step: int) -> list[ToyBatch]:
        start, self.position = self.position, self.position + self.batch_size
        draws = [generator(self.seed, "data", start + i) for i in range(self.batch_size)]
        made: Any = [ToyExample(i, torch.randn(WIDTH, generator=g)) for i, g in enumerate(draws)]
        return microbatches(made, self.collate, step, *self.share, self.parts)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def stage_config(**changes: Any) -> StageConfig:
    optimizer = {"lr": 0.05, "vae_lr_ratio": 0.5, "warmup_steps": 2}
    fields = {"name": "toy", "objective": "joint", "steps": 6, "batch_size": 8}
    return StageConfig.model_validate({**fields, "optimizer": optimizer, **changes})


def interval_stage() -> StageConfig:
    """Two accumulation steps, and autoencoders that rest every third step."""
    return stage_config(accumulate=2, interval={"train": 2, "freeze": 1})


def training_config(**changes: Any) -> TrainingConfig:
    fields = {"save_every": 3, "log_every": 1, "validate_every": 3, "precision": "fp32"}
    return TrainingConfig.model_validate({**fields, "trackers": [], **changes})


def toy(folder: Path, stage: Any = None, training: Any = None, **changes: Any) -> Stage:
    """A toy stage in the run folder `folder`, ready to run."""
    objective = ToyObjective(**changes.pop("objective", {}))
    stage = stage or stage_config()
    return Stage(
        stage,
        training or training_config(),
        objective,
        ToyData(objective.collate, stage.batch_size, parts=stage.accumulate),
        RunFolder(folder),
        **changes,
    )


def lines(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def on_the_cpu(**options: Any) -> Accelerator:
    """A new accelerator, whatever this process has used so far."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True, **options)


def main(folder: str, world: str) -> None:
    """Run the toy stage under torchrun, and insist on the number of processes."""
    from unified.training.parallel import distributed_settings

    accelerator = Accelerator(cpu=True, kwargs_handlers=distributed_settings())
    assert accelerator.num_processes == int(world), accelerator.num_processes
    stage = toy(Path(folder), interval_stage())
    stage.data.share = (accelerator.process_index, accelerator.num_processes)
    train_stage(stage, accelerator)


if __name__ == "__main__":
    main(*sys.argv[1:])
