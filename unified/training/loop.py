"""The one training loop.

A stage is an objective, its data and its settings; the loop knows nothing else of it. For each term
k the objective gives sums S_k over positions, and before any forward the counts N_k of positions.
The loss of a step is

    sum_k  weight_k * (sum of S_k over microbatches, rows and ranks) / (sum of N_k over the same)

so it does not depend on how a batch is split into accumulation steps and processes (beyond the
order of floating-point additions). Of the W * A microbatches of W processes and A accumulation
steps, microbatch a of rank r takes the examples with ``slot % (W * A) == a * W + r``.

Global random draws inside a forward (a plugin's dropout) are seeded from the step, so nothing of a
generator has to be stored to continue a run exactly.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from unified.config import StageConfig, TrainingConfig
from unified.data.prefetch import prefetch
from unified.randomness import derive
from unified.training import checkpoint
from unified.training.ema import EMA
from unified.training.folder import RunFolder
from unified.training.metrics import Metrics, say
from unified.training.objective import Objective, Plan
from unified.training.optim import (
    build_optimizer,
    learning_groups,
    learning_rate,
    set_learning,
    set_learning_rate,
    vae_learns,
)

if TYPE_CHECKING:
    from accelerate import Accelerator


class DivergedError(ValueError):
    """A loss or gradient stopped being a finite number."""


class Slotted(Protocol):
    """An example that knows its place in the global batch."""

    @property
    def slot(self) -> int: ...


class Batches(Protocol):
    """The data: the global batch of each step, in order, the same on every process."""

    def batch(self, step: int) -> Sequence[Slotted]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Work:
    """What a step needs before its first forward: this rank's microbatches, the positions of each
    term in them, and the state of the data after them. Made ahead of time, in a thread."""

    plans: list[Plan]
    counts: list[float]
    data: dict[str, Any]


@dataclass
class Stage:
    """A stage, ready to run. `first` is the number of steps of the stages before it, `prefetch`
    how many steps are prepared ahead.

    Every `training.validate_every` steps and at the end `validate` gives named values, with the
    averaged weights in place; the lowest ``loss`` among them marks the best checkpoint. Every
    `training.sample_every` steps `sample` writes into the folder it is given, and
    returns what it wrote, by name.
    """

    config: StageConfig
    training: TrainingConfig
    objective: Objective
    data: Batches
    folder: RunFolder
    seed: int = 0
    first: int = 0
    prefetch: int = 2
    validate: Callable[[int], dict[str, float]] | None = None
    sample: Callable[[int, Path], Mapping[str, Any]] | None = None

    @property
    def steps(self) -> int:
        return planned_steps(self.config, self.training)


def planned_steps(stage: StageConfig, training: TrainingConfig) -> int:
    """The steps of a stage; ``training.max_steps`` cuts it short (0 takes none)."""
    return stage.steps if training.max_steps is None else min(stage.steps, training.max_steps)


def share(examples: Sequence[Any], part: int, parts: int) -> list[Any]:
    """The examples of microbatch `part` of `parts`."""
    return [example for example in examples if example.slot % parts == part]


def add(counts: Iterable[Mapping[str, float]], terms: Sequence[str]) -> list[float]:
    """Counts (or sums) by term, added up; ValueError for a term that has no weight."""
    total = dict.fromkeys(terms, 0.0)
    for part in counts:
        for term, value in part.items():
            if term not in total:
                raise ValueError(f"loss term {term} has no weight; there are {sorted(terms)}")
            total[term] += float(value)
    return [total[term] for term in terms]


def over_ranks(values: Sequence[float], accelerator: Accelerator) -> list[float]:
    """`values` added up over the processes."""
    if accelerator.num_processes == 1:
        return list(values)
    summed = accelerator.reduce(torch.tensor(values, device=accelerator.device), "sum")
    return [float(value) for value in summed.tolist()]


def averages(sums: Sequence[float], counts: Mapping[str, float]) -> dict[str, float]:
    """Term -> sum / count, for the terms that have positions."""
    return {k: s / n for (k, n), s in zip(counts.items(), sums, strict=True) if n}


def total(losses: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """The loss that the optimizer sees, of averages by term."""
    return sum(weights[term] * value for term, value in losses.items())


@torch.no_grad()
def evaluate(
    objective: Objective,
    streams: Mapping[str, Sequence[Sequence[Any]]],
    accelerator: Accelerator,
) -> dict[str, float]:
    """``loss`` and the average of each term over the batches of all `streams`, and of each stream
    (``STREAM/TERM``); every batch is shared among the processes.

    The draws are those of steps 0, 1, ...: the same ones at every evaluation.
    """
    weights = objective.weights(0)
    terms = sorted(weights)
    found = {
        name: [over_ranks(part, accelerator) for part in _sums(objective, batches, accelerator)]
        for name, batches in streams.items()
    }
    everything = [
        [sum(column) for column in zip(*part, strict=True)]
        for part in zip(*found.values(), strict=True)
    ]
    means = {
        name: averages(sums, dict(zip(terms, counts, strict=True)))
        for name, (sums, counts) in {**found, "": everything}.items()
    }
    overall = means.pop("")
    each = {f"{name}/{term}": v for name, mean in means.items() for term, v in mean.items()}
    return {"loss": total(overall, weights), **overall, **each}


def _sums(
    objective: Objective, batches: Sequence[Sequence[Any]], accelerator: Accelerator
) -> tuple[list[float], list[float]]:
    """This process's sums and counts of each term, over its share of `batches`."""
    terms = sorted(objective.weights(0))
    sums, counts = [0.0] * len(terms), [0.0] * len(terms)
    for index, batch in enumerate(batches):
        mine = share(batch, accelerator.process_index, accelerator.num_processes)
        if not mine:
            continue
        plan = objective.plan(mine, index)
        losses = {term: float(loss) for term, loss in objective(plan).items()}
        sums = [a + b for a, b in zip(sums, add([losses], terms), strict=True)]
        counts = [a + b for a, b in zip(counts, add([plan.counts], terms), strict=True)]
    return sums, counts


def distributed_settings() -> list[Any]:
    """How processes must average gradients, for ``Accelerator(kwargs_handlers=...)``: a step may
    leave out parameters, as when the autoencoders rest or a batch lacks a modality."""
    from accelerate.utils import DistributedDataParallelKwargs

    return [DistributedDataParallelKwargs(find_unused_parameters=True)]


def train_stage(stage: Stage, accelerator: Accelerator) -> checkpoint.Progress:
    """Run `stage` to its end, from its newest checkpoint if it has one.

    The objective's modules end with the averaged weights, where there is an EMA.
    """
    loop = Loop(stage, accelerator)
    try:
        loop.run()
    finally:
        loop.metrics.close()
        accelerator.free_memory()
    return loop.trained.progress


class Loop:
    """The live state of one stage: what `train_stage` steps through."""

    def __init__(self, stage: Stage, accelerator: Accelerator):
        self.stage, self.accelerator = stage, accelerator
        self.parts = accelerator.num_processes * stage.config.accumulate
        if stage.config.batch_size % self.parts:
            raise ValueError(
                f"stage {stage.config.name}: batch_size {stage.config.batch_size} must be a"
                f" multiple of {accelerator.num_processes} processes times accumulate"
                f" {stage.config.accumulate}"
            )
        self.groups = learning_groups(stage.objective.groups(), stage.config.optimizer)
        self.learners = [p for group in self.groups.values() for p in group]
        set_learning(stage.objective.parameters(), False)
        set_learning(self.learners, True)
        self.model, self.optimizer = accelerator.prepare(
            stage.objective, build_optimizer(self.groups, stage.config.optimizer)
        )
        self.trained = self._resume()
        self.metrics = Metrics(
            stage.folder.metrics, stage.config.name, stage.steps, accelerator, stage.first
        )
        self.since = (self.trained.progress.seconds, self.trained.progress.step)

    def _resume(self) -> checkpoint.Trained:
        """The stage's state, at its newest checkpoint or at its beginning."""
        stage = self.stage
        learns = {id(p) for p in self.learners}
        named = {n: p for n, p in stage.objective.named_parameters() if id(p) in learns}
        trained = checkpoint.Trained(
            stage.config.name,
            stage.objective,
            self.optimizer.optimizer,
            EMA(named, stage.training.ema) if stage.training.ema else None,
        )
        found = checkpoint.newest(stage.folder.checkpoints, stage.config.name)
        if found is not None:
            checkpoint.load(found, trained)
            stage.data.load_state_dict(trained.progress.data)
            if self.accelerator.is_main_process:
                say(f"continuing {stage.config.name} at step {trained.progress.step}: {found}")
        return trained

    def run(self) -> None:
        """Step to the end of the stage; report, validate, sample and save when due."""
        stage, progress = self.stage, self.trained.progress
        self.metrics.start(progress.step)
        work = prefetch(self._prepare, progress.step, stage.steps, stage.prefetch)
        with contextlib.closing(work):
            began = time.monotonic()
            for prepared in work:
                values = self.step(progress.step, prepared)
                progress.step += 1
                progress.data = prepared.data
                progress.seconds += time.monotonic() - began
                self.metrics.advance()
                self._between(values)
                began = time.monotonic()
        if self.trained.ema is not None:
            self.trained.ema.copy_to_parameters()

    def _between(self, values: Mapping[str, float]) -> None:
        """What is due after a step."""
        training = self.stage.training
        if self._due(training.log_every):
            self._report(values)
        best = self._due(training.validate_every) and self._validate()
        if training.sample_every is not None and self._due(training.sample_every):
            self._sample()
        if best or self._due(training.save_every):
            self._save()

    def _due(self, every: int) -> bool:
        """Whether something that happens `every` so many steps, and at the end, happens now."""
        step = self.trained.progress.step
        return step % every == 0 or step == self.stage.steps

    # ---- one step ------------------------------------------------------------------------------

    def _prepare(self, step: int) -> Work:
        """Read and plan this rank's part of a step, without network or device."""
        batch = self.stage.data.batch(step)
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        plans = [
            self.stage.objective.plan(share(batch, a * world + rank, self.parts), step)
            for a in range(self.stage.config.accumulate)
        ]
        terms = sorted(self.stage.objective.weights(step))
        return Work(plans, add((p.counts for p in plans), terms), self.stage.data.state_dict())

    def step(self, step: int, work: Work) -> dict[str, float]:
        """One optimizer step (from 0); the values to report."""
        stage, accelerator, settings = self.stage, self.accelerator, self.stage.config.optimizer
        torch.manual_seed(derive(stage.seed, stage.config.name, step, accelerator.process_index))
        set_learning(self.groups.get("vae", ()), vae_learns(step, stage.config.interval))
        weights = stage.objective.weights(step)
        counts = dict(zip(sorted(weights), over_ranks(work.counts, accelerator), strict=True))
        losses = averages(self._backward(work.plans, weights, counts), counts)
        self._check({**losses, "loss": total(losses, weights)})
        norm = float(accelerator.clip_grad_norm_(self.learners, settings.clip_grad_norm))
        self._check({"grad_norm": norm})
        lr = learning_rate(step, stage.config.steps, settings)
        set_learning_rate(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.trained.ema is not None:
            self.trained.ema.update(step)
        terms = {f"loss/{term}": value for term, value in losses.items()}
        return {"loss": total(losses, weights), **terms, "lr": lr, "grad_norm": norm}

    def _backward(
        self, plans: list[Plan], weights: Mapping[str, float], counts: Mapping[str, float]
    ) -> list[float]:
        """Gradients of the loss; returns the sums of each term over all microbatches and ranks.

        Processes average their gradients where the loss is a sum, hence the factor. They meet in
        the last microbatch only.
        """
        factors = {
            k: self.accelerator.num_processes * weights[k] / n for k, n in counts.items() if n
        }
        sums: dict[str, Tensor] = {}
        for index, plan in enumerate(plans):
            with self._apart(index + 1 < len(plans)):
                losses = self.model(plan)
                parts = [factors[term] * losses[term] for term in losses if term in factors]
                self.accelerator.backward(torch.stack(parts).sum())
            for term, loss in losses.items():
                sums[term] = sums[term] + loss.detach() if term in sums else loss.detach()
        local = dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True))
        return over_ranks(add([local], list(counts)), self.accelerator)

    def _apart(self, apart: bool) -> AbstractContextManager[Any]:
        """Keep gradients on their process for now, or let them meet."""
        return self.accelerator.no_sync(self.model) if apart else nullcontext()

    def _check(self, values: Mapping[str, float]) -> None:
        """DivergedError for a value that is not finite, before it reaches any weight."""
        for name, value in values.items():
            if not math.isfinite(value):
                stage = self.stage.config.name
                last = checkpoint.newest(self.stage.folder.checkpoints, stage)
                raise DivergedError(
                    f"stage {stage}, step {self.trained.progress.step + 1}: {name} is {value}; the"
                    f" last good checkpoint is {last or 'none'}; a lower optimizer.lr or a longer"
                    " warmup may help"
                )

    # ---- between steps -------------------------------------------------------------------------

    def _report(self, values: Mapping[str, float]) -> None:
        progress, (then, before) = self.trained.progress, self.since
        self.since = (progress.seconds, progress.step)
        examples = (progress.step - before) * self.stage.config.batch_size
        speed = examples / max(1e-9, progress.seconds - then)
        line = {**values, "examples_per_s": speed, "seconds": progress.seconds}
        self.metrics.write(progress.step, line)

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Averaged weights, evaluation mode, no gradients."""
        ema, objective = self.trained.ema, self.stage.objective
        objective.eval()
        with (
            ema.applied() if ema is not None else nullcontext(),
            torch.no_grad(),
            self.accelerator.autocast(),
        ):
            yield
        objective.train()

    def _validate(self) -> bool:
        """Validate; True if this is the best so far."""
        if self.stage.validate is None:
            return False
        progress = self.trained.progress
        with self._evaluating():
            values = self.stage.validate(progress.step)
        self.metrics.write(progress.step, {f"val/{key}": value for key, value in values.items()})
        best = "loss" in values and progress.is_best(values["loss"])
        if best:
            progress.best_step, progress.best_loss = progress.step, values["loss"]
        return best

    def _sample(self) -> None:
        if self.stage.sample is None or not self.accelerator.is_main_process:
            return
        step = self.trained.progress.step
        folder = self.stage.folder.samples / f"{self.stage.config.name}-{step}"
        folder.mkdir(parents=True, exist_ok=True)
        with self._evaluating():
            items = self.stage.sample(step, folder)
        self.metrics.write_samples(step, items)

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            checkpoint.save(self.stage.folder.checkpoints, self.trained)
        self.accelerator.wait_for_everyone()
