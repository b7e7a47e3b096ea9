"""What is asked of a plan, and what it says: FLOPs, bytes and time of a joint stage on GPUs."""

from __future__ import annotations

from dataclasses import dataclass, field

from unified.config.schema import StageConfig
from unified.planning.describe import Counts
from unified.planning.gpus import GPU
from unified.planning.memory import Memory
from unified.planning.typical import Grids, Sizes


@dataclass(frozen=True)
class PlanRequest:
    """On what, and how: `precision` and `steps` are the configuration's where None."""

    gpu: GPU
    gpus: int = 1
    mfu: float = 0.4
    steps: int | None = None
    precision: str | None = None
    sizes: Sizes = field(default_factory=Sizes)

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise ValueError(f"--gpus should be 1 or more, found {self.gpus}")
        if not 0 < self.mfu <= 1:
            raise ValueError(
                f"--mfu is a share of the peak, above 0 and at most 1, found {self.mfu:g}"
            )
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"--steps should be 1 or more, found {self.steps}")
        if self.precision not in (None, *self.gpu.tflops):
            raise ValueError(
                f"--precision should be {' or '.join(self.gpu.tflops)}, found {self.precision!r}"
            )


@dataclass(frozen=True)
class ExampleCost:
    """One example of a task: its share of the batch, its grids by kind, and its FLOPs."""

    share: float
    grids: Grids
    positions: int
    prior_forward: int
    prior_backward: int
    autoencoder_forward: int
    autoencoder_backward: int

    @property
    def flops(self) -> int:
        return (
            self.prior_forward
            + self.prior_backward
            + self.autoencoder_forward
            + self.autoencoder_backward
        )


@dataclass(frozen=True)
class Throughput:
    """Items of one modality, and what their latents stand for (tokens), per second."""

    items: float
    tokens: float | None


@dataclass(frozen=True)
class Plan:
    """A stage on given GPUs. `memory` is by (sharded, checkpointed); `heaviest` is the task whose
    examples fill the microbatch that `memory` is for."""

    stage: StageConfig
    request: PlanRequest
    precision: str
    steps: int
    counts: dict[str, Counts]
    examples: dict[str, ExampleCost]
    heaviest: str
    memory: dict[tuple[bool, bool], Memory]
    #: (items, tokens) of each modality in an average example
    contents: dict[str, tuple[float, float | None]]

    @property
    def microbatch(self) -> int:
        """Examples that one device computes at once."""
        return self.stage.batch_size // (self.request.gpus * self.stage.accumulate)

    @property
    def step_flops(self) -> float:
        return self.stage.batch_size * sum(e.share * e.flops for e in self.examples.values())

    @property
    def flops_per_second(self) -> float:
        request = self.request
        return request.gpus * request.gpu.tflops[self.precision] * 1e12 * request.mfu

    @property
    def seconds_per_step(self) -> float:
        return self.step_flops / self.flops_per_second

    @property
    def examples_per_second(self) -> float:
        return self.stage.batch_size / self.seconds_per_step

    @property
    def positions_per_second(self) -> float:
        mean = sum(e.share * e.positions for e in self.examples.values())
        return mean * self.examples_per_second

    @property
    def throughput(self) -> dict[str, Throughput]:
        speed = self.examples_per_second
        return {
            m: Throughput(items * speed, None if tokens is None else tokens * speed)
            for m, (items, tokens) in self.contents.items()
        }
