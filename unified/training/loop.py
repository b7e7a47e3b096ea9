"""The one training loop.

A stage is an objective, its data and its settings; the loop knows nothing else of it. For each term
k the objective gives sums S_k over positions, and before any forward the counts N_k of positions.
The loss of a step is

    sum_k  weight_k * (sum of S_k over microbatches, rows and ranks) / (sum of N_k over the same)

so it does not depend on how a batch is split into accumulation steps and processes (beyond the
order of floating-point additions).

The device runs ahead: a step is launched before the numbers of the one before have arrived. A loss
or gradient that is not finite is therefore met one step late, but always before anything is saved.

Global random draws inside a forward (a plugin's dropout) are seeded from the step, so nothing of a
generator has to be stored to continue a run exactly.
"""

from __future__ import annotations

import contextlib
import math
import signal
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unified.config.schema import StageConfig, TrainingConfig
from unified.data.prefetch import prefetch
from unified.errors import StoppedError
from unified.latents.tensors import map_tensors, moved
from unified.randomness import derive
from unified.training import checkpoint, divergence
from unified.training.ema import EMA
from unified.training.folder import RunFolder
from unified.training.metrics import Metrics, Speed, memory_gb, say
from unified.training.objectives.objective import Objective
from unified.training.optim import (
    build_optimizer,
    hidden_matrices,
    learning_groups,
    learning_rate,
    ratio,
    set_learning,
    set_learning_rate,
    vae_learns,
)
from unified.training.parallel import (
    apart,
    clip,
    distribute,
    from_main,
    gathered,
    is_sharded,
    summed,
)
from unified.training.saver import Saver
from unified.training.work import (
    Batches,
    Outcome,
    Tally,
    Work,
    add,
    on_device,
    over_all,
    pins,
    stacked,
    total,
)

if TYPE_CHECKING:
    from accelerate import Accelerator


#: steps whose numbers the host has not waited for when the next one begins
AHEAD = 1


class DivergedError(ValueError):
    """A loss or gradient stopped being a finite number, or the loss grew without end."""


@dataclass
class Stage:
    """A stage, ready to run. `first` is the number of steps of the stages before it, `prefetch`
    how many steps are prepared ahead.

    Every `training.validate_every` steps and at the end `validate` gives named values, with the
    averaged weights in place; the lowest ``loss`` among them marks the best checkpoint. Every
    `training.sample_every` steps `sample` writes into the folder it is given, and
    returns what it wrote, by name.
    `optimizer` makes the optimizer; without it, what the name in `config` stands for does.
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
    optimizer: Callable[..., Any] | None = None

    @property
    def steps(self) -> int:
        return planned_steps(self.config, self.training)


def planned_steps(stage: StageConfig, training: TrainingConfig) -> int:
    """The steps of a stage; ``training.max_steps`` cuts it short (0 takes none)."""
    return stage.steps if training.max_steps is None else min(stage.steps, training.max_steps)


def train_stage(stage: Stage, accelerator: Accelerator) -> checkpoint.Progress:
    """Run `stage` to its end, from its newest checkpoint if it has one: step; report, validate,
    sample and save when due.

    A SIGTERM lets the step finish, saves, and raises StoppedError. The objective's modules end with
    the averaged weights, where there is an EMA.
    """
    loop = Loop(stage, accelerator)
    progress = loop.trained.progress
    loop.metrics.start(progress.step)
    work = prefetch(loop.prepare, progress.step, stage.steps, stage.prefetch)
    try:
        with contextlib.closing(work), on_sigterm(loop.ask_to_stop):
            began = time.monotonic()
            for prepared in work:
                loop.speed.waited += time.monotonic() - began
                loop.coming.append(loop.step(progress.step, prepared))
                progress.step += 1
                progress.data = prepared.data
                values = loop.settle()
                progress.seconds += time.monotonic() - began
                loop.between(values)
                began = time.monotonic()
        if loop.trained.ema is not None:
            loop.trained.ema.copy_to_parameters()
    finally:
        loop.saver.wait()
        loop.metrics.close()
        stage.data.close()
        accelerator.free_memory()
    return progress


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
        learners = learning_groups(stage.objective.groups(), stage.config.optimizer)
        set_learning(stage.objective.parameters(), False)
        set_learning((p for group in learners.values() for p in group), True)
        self.model = distribute(stage.objective, accelerator, stage.training)
        # sharding puts other parameters in the place of those there were
        self.groups = learning_groups(stage.objective.groups(), stage.config.optimizer)
        self.learners = [p for group in self.groups.values() for p in group]
        hidden, make = hidden_matrices(stage.objective), stage.optimizer
        self.optimizer = build_optimizer(self.groups, stage.config.optimizer, hidden, make)
        self.saver = Saver(
            stage.folder.checkpoints,
            stage.training.keep_checkpoints,
            stage.training.background_checkpoints,
            accelerator.is_main_process,
        )
        self.trained = self._resume()
        self.metrics = Metrics(
            stage.folder.metrics, stage.config.name, stage.steps, accelerator, stage.first
        )
        self.speed = Speed(self.trained.progress.seconds)
        self.met = (stage.data.bad, stage.data.truncated)
        self.asked_to_stop = self.stop = False
        #: outcomes of steps that have not been looked at yet
        self.coming: deque[Outcome] = deque()

    def _resume(self) -> checkpoint.Trained:
        """The stage's state, at its newest checkpoint or at its beginning."""
        stage = self.stage
        learns = {id(p) for p in self.learners}
        named = {n: p for n, p in stage.objective.named_parameters() if id(p) in learns}
        trained = checkpoint.Trained(
            stage.config.name,
            stage.objective,
            self.optimizer,
            EMA(named, stage.training.ema) if stage.training.ema else None,
        )
        main = self.accelerator.is_main_process
        folder, name = stage.folder.checkpoints, stage.config.name
        found, damaged = from_main(checkpoint.newest_sound(folder, name) if main else None)
        if main:
            for sentence in damaged:
                say(sentence)
        if found is not None:
            checkpoint.load(found, trained)
            stage.data.load_state_dict(trained.progress.data)
            if main:
                say(f"continuing {stage.config.name} at step {trained.progress.step}: {found}")
            if main and not checkpoint.draws_alike(found):
                say(
                    f"{found} was made by an earlier version: weights, moments, step and the order"
                    " of the data go on, but the noise that steps draw changes from here"
                )
        return trained

    def ask_to_stop(self) -> None:
        """Stop once the step that runs is done, and saved."""
        self.asked_to_stop = True

    def _ahead(self) -> int:
        """Of how many steps the numbers may still be on their way: of none, before something is
        saved, measured or reported."""
        training, alone = self.stage.training, self.accelerator.num_processes == 1
        every = (training.log_every, training.validate_every, training.sample_every)
        waits = any(self._due(n) for n in (*every, training.save_every))
        return 0 if waits or (alone and self.asked_to_stop) else AHEAD

    def between(self, values: Mapping[str, float]) -> None:
        """What is due after a step."""
        self.metrics.advance()
        training, step = self.stage.training, self.trained.progress.step
        if self._due(training.log_every):
            self._report(values)
        best = self._due(training.validate_every) and self._validate()
        if self._due(training.sample_every):
            self._sample()
        if best or self.stop or self._due(training.save_every):
            self.settle(0)
            self._save()
        if self.stop and step < self.stage.steps:
            self.saver.wait()
            raise StoppedError(
                f"stopped at step {step} of {self.stage.config.name}, as asked by SIGTERM; the same"
                " command continues"
            )

    def _due(self, every: int | None) -> bool:
        """Whether something that happens `every` so many steps, and at the end, happens now."""
        step = self.trained.progress.step
        return every is not None and (step % every == 0 or step == self.stage.steps)

    # ---- one step ------------------------------------------------------------------------------

    def prepare(self, step: int) -> Work:
        """This process's microbatches of a step, and what is counted in them. No network, and no
        device but to pin memory for it."""
        data = self.stage.data
        parts = list(data.batch(step))
        if pins(self.accelerator.device):
            parts = [map_tensors(part, Tensor.pin_memory) for part in parts]
        counts = add((p.counts for p in parts), sorted(self.stage.objective.weights(step)))
        used, laid = (sum(p.positions[i] for p in parts) for i in (0, 1))
        met, self.met = self.met, (data.bad, data.truncated)
        bad, truncated = (float(now - then) for now, then in zip(self.met, met, strict=True))
        return Work(parts, counts, Tally(used, laid, bad, truncated), data.state_dict())

    def step(self, step: int, work: Work) -> Outcome:
        """One optimizer step (from 0). Nothing in it waits for the device.

        Processes meet in the last microbatch only.
        """
        stage, accelerator, device = self.stage, self.accelerator, self.accelerator.device
        torch.manual_seed(derive(stage.seed, stage.config.name, step, accelerator.process_index))
        set_learning(self.groups.get("vae", ()), vae_learns(step, stage.config.interval))
        weights = stage.objective.weights(step)
        numbers = over_all(work, sorted(weights), self.asked_to_stop, accelerator)
        factors_K = self._factors(weights, numbers)
        sums_K = torch.zeros_like(factors_K)
        for index, part in enumerate(work.parts):
            batch, last = moved(part, device), index + 1 == len(work.parts)
            with nullcontext() if last else apart(self.model), accelerator.autocast():
                losses = self.model(batch)
                part_K = stacked(losses, sorted(weights), factors_K)
                accelerator.backward((factors_K * part_K).sum())
            sums_K += part_K.detach()
        norm = clip(self.learners, stage.config.optimizer.clip_grad_norm)
        everything = torch.cat([summed(sums_K, accelerator), numbers, norm.to(numbers).view(1)])
        return Outcome.of(step, weights, self._update(step), everything)

    def _factors(self, weights: Mapping[str, float], numbers: Tensor) -> Tensor:
        """What the sums of each term are multiplied by: its weight over its positions. Processes
        average their gradients where the loss is a sum, hence their number."""
        counts_K = numbers[: len(weights)]
        weights_K = on_device([weights[term] for term in sorted(weights)], numbers.device)
        world = self.accelerator.num_processes
        return world * weights_K / counts_K.clamp(min=1) * (counts_K > 0)

    def _update(self, step: int) -> dict[str, float]:
        """The weights and their averages, after the gradients of `step`; the learning rates."""
        settings = self.stage.config.optimizer
        lr = learning_rate(step, self.stage.config.steps, settings)
        set_learning_rate(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.trained.ema is not None:
            self.trained.ema.update(step)
        others = (n for n in self.groups if n != "main")
        return {"lr": lr} | {f"lr/{n}": lr * ratio(n, settings) for n in others}

    def settle(self, ahead: int | None = None) -> dict[str, float]:
        """Look at the numbers of all steps but the last `ahead` (by default, as many as may still
        be on their way); the values of the newest of them, to report. DivergedError for what is not
        finite: nothing of it has been saved."""
        values: dict[str, float] = {}
        ahead = self._ahead() if ahead is None else ahead
        while len(self.coming) > ahead:
            outcome = self.coming.popleft()
            losses, tally, norm = outcome.read()
            loss = total(losses, outcome.weights)
            self._check(outcome.step, {**losses, "loss": loss, "grad_norm": norm})
            self._check_growth(outcome, losses)
            self._count(tally)
            terms = {f"loss/{term}": value for term, value in losses.items()}
            values = {"loss": loss, **terms, **outcome.rates, "grad_norm": norm}
        return values

    def _count(self, tally: Tally) -> None:
        """Add what a step went through to the totals."""
        progress = self.trained.progress
        progress.bad += int(tally.bad)
        progress.truncated += int(tally.truncated)
        self.stop = self.stop or bool(tally.stop)
        self.speed.used += tally.used
        self.speed.laid += tally.laid
        self.speed.examples += self.stage.config.batch_size

    def _check(self, step: int, values: Mapping[str, float]) -> None:
        """DivergedError for a value that is not finite."""
        for name, value in values.items():
            if not math.isfinite(value):
                raise self._diverged(step, f"{name} is {value}")

    def _check_growth(self, outcome: Outcome, losses: Mapping[str, float]) -> None:
        """DivergedError once the loss has grown to many times what it was at first."""
        trend, most = self.trained.progress.trend, self.stage.training.divergence
        divergence.follow(trend, outcome.step, losses, outcome.weights)
        grown = divergence.growth(trend)
        if most is not None and grown > most - 1:
            raise self._diverged(
                outcome.step,
                f"the running mean of the loss has grown to {grown + 1:.3g} times what it was, more"
                f" than training.divergence {most:g}",
            )

    def _diverged(self, step: int, what: str) -> DivergedError:
        stage = self.stage.config.name
        last = checkpoint.newest(self.stage.folder.checkpoints, stage)
        return DivergedError(
            f"stage {stage}, step {step + 1}: {what}; the last good checkpoint is"
            f" {last or 'none'}; a lower optimizer.lr or a longer warmup may help"
        )

    # ---- between steps -------------------------------------------------------------------------

    def _report(self, values: Mapping[str, float]) -> None:
        progress = self.trained.progress
        totals = {"bad": progress.bad, "truncated": progress.truncated}
        line = {
            **values,
            **self.speed.report(progress.seconds),
            "memory_gb": memory_gb(self.accelerator.device),
            **{name: float(count) for name, count in totals.items() if count},
            "seconds": progress.seconds,
        }
        self.speed = Speed(progress.seconds)
        self.metrics.write(progress.step, line)

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Averaged weights, evaluation mode, no gradients."""
        ema, objective = self.trained.ema, self.stage.objective
        objective.eval()
        with (
            ema.applied() if ema is not None else nullcontext(),
            gathered(self.model),
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

    def _save(self) -> None:
        """A checkpoint. The last one of a stage has to be written."""
        written = self.saver.save(self.trained)
        last = self.trained.progress.step == self.stage.steps
        if last and not (written and self.saver.wait()):
            raise ValueError(
                f"stage {self.stage.config.name} took all its steps, but its last checkpoint could"
                f" not be written to {self.stage.folder.checkpoints}; make room there and run the"
                " same command again"
            )

    def _sample(self) -> None:
        """Samples into the run folder. Shards are gathered by all processes, which then all
        generate, and the main one keeps what it made."""
        main = self.accelerator.is_main_process
        if self.stage.sample is None or not (main or is_sharded(self.model)):
            return
        step = self.trained.progress.step
        folder = self.stage.folder.samples / f"{self.stage.config.name}-{step}"
        with tempfile.TemporaryDirectory() as elsewhere, self._evaluating():
            target = folder if main else Path(elsewhere)
            target.mkdir(parents=True, exist_ok=True)
            items = self.stage.sample(step, target)
        self.metrics.write_samples(step, items)


@contextlib.contextmanager
def on_sigterm(call: Callable[[], None]) -> Iterator[None]:
    """Within it, SIGTERM calls this instead of ending the process (in the main thread only, which
    is where signals arrive)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: call())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
