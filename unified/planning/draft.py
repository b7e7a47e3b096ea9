"""How a plan is worked out: the stage's own objective, on fake tensors.

Nothing is read but the configuration, and no parameter is allocated.
"""

from __future__ import annotations

import math
from functools import cached_property

import torch

from unified.config.plugins import Plugins, resolve_plugins
from unified.config.schema import Config, StageConfig
from unified.data.batches import Items
from unified.data.streams import Prepared
from unified.errors import did_you_mean
from unified.latents.modality import Modality
from unified.planning.describe import counts_of, on_meta
from unified.planning.figures import ExampleCost, Plan, PlanRequest
from unified.planning.flops import TRAINING, layout_flops
from unified.planning.imagined import forward_flops, imagine, observation, recompute
from unified.planning.memory import Memory, forward_only, imagined_step, optimizer_state, per_device
from unified.planning.typical import positions, typical
from unified.randomness import Chance
from unified.training.loop import planned_steps
from unified.training.objectives.joint import JointObjective


def make_plan(
    config: Config,
    request: PlanRequest,
    stage: str | None = None,
    source: str = "",
    trust_remote_code: bool = False,
) -> Plan:
    """The plan of `stage`, by default the last joint one. ValueError for a stage that there is not,
    a batch that the GPUs cannot share, and examples that do not fit a row."""
    plugins = resolve_plugins(config, trust_remote_code, source)
    chosen = joint_stage(config, stage)
    check_shares(chosen, request.gpus)
    precision = request.precision or config.training.precision
    precision = "bf16" if precision == "auto" else precision
    return Draft(config, chosen, request, precision, plugins).plan()


def joint_stage(config: Config, name: str | None) -> StageConfig:
    """The joint stage of that name, or the last one."""
    joint = {s.name: s for s in config.stages if s.objective == "joint"}
    names = [s.name for s in config.stages]
    if not joint:
        raise ValueError(
            "the configuration has no joint stage, and a plan is for one; its stages:"
            f" {', '.join(names) or 'none'}"
        )
    if name is None:
        return list(joint.values())[-1]
    if name not in names:
        raise ValueError(f"the configuration has no stage {name!r}; {did_you_mean(name, names)}")
    if name not in joint:
        raise ValueError(
            f"stage {name} trains an autoencoder, and a plan is for a joint stage:"
            f" {', '.join(joint)}"
        )
    return joint[name]


def check_shares(stage: StageConfig, gpus: int) -> None:
    """ValueError unless every GPU gets as many examples of each accumulation step."""
    if stage.batch_size % (gpus * stage.accumulate) == 0:
        return
    fair = [n for n in range(1, stage.batch_size // gpus + 1) if stage.batch_size % (gpus * n) == 0]
    where = f"stages.{stage.name}.accumulate"
    remedy = f"{where} may be {', '.join(map(str, fair))}"
    raise ValueError(
        f"stage {stage.name}: batch_size {stage.batch_size} must be a multiple of {gpus} GPUs times"
        f" accumulate {stage.accumulate};"
        f" {remedy if fair else 'choose another number of GPUs or another batch_size'}"
    )


class Draft:
    """What a plan is worked out from: the objective of the stage, imagined."""

    def __init__(
        self,
        config: Config,
        stage: StageConfig,
        request: PlanRequest,
        precision: str,
        plugins: Plugins,
    ):
        self.config, self.stage, self.request, self.precision = config, stage, request, precision
        self.plugins, tasks = plugins, plugins.tasks
        self.tasks = {name: task for name, task in tasks.items() if task.config.ratio}
        self.modalities, self.prior = on_meta(config, plugins)
        self.counts = counts_of(self.modalities, self.prior)
        references = self._references()
        imagine(*self.modalities.values(), self.prior, *references.values())
        layouts = {name: task.layout for name, task in tasks.items()}
        self.objective = JointObjective(
            self.prior,
            self.modalities,
            layouts,
            stage,
            config.flow,
            config.run.seed,
            references,
            path=plugins.path,
        )
        self.grids = {
            name: typical(task, self.modalities, request.sizes, stage.row_length, name)
            for name, task in self.tasks.items()
        }

    def _references(self) -> dict[str, Modality]:
        """The encoders that ``loss.ref`` holds the learning ones to."""
        if not (self.stage.loss.ref and self.stage.optimizer.vae_lr_ratio):
            return {}
        copies, _ = on_meta(self.config, self.plugins)
        return {name: modality for name, modality in copies.items() if not modality.frozen}

    def plan(self) -> Plan:
        config, stage = self.config, self.stage
        heaviest, memories = self.memory()
        return Plan(
            stage,
            self.request,
            self.precision,
            self.request.steps or planned_steps(stage, config.training),
            self.counts,
            {name: self.example(name) for name in self.tasks},
            heaviest,
            memories,
            self.contents(),
        )

    # ---- FLOPs ---------------------------------------------------------------------------------

    @cached_property
    def shares(self) -> dict[str, float]:
        total = sum(task.config.ratio for task in self.tasks.values())
        return {name: task.config.ratio / total for name, task in self.tasks.items()}

    def example(self, name: str) -> ExampleCost:
        task, grids = self.tasks[name], self.grids[name]
        channels = self.prior.channels
        prior = layout_flops(self.config.prior, channels, task.layout, grids)
        forward = backward = 0
        for segment in task.layout.filled:
            whole, learned = self.autoencoders[segment.modality, grids[segment.kind]]
            forward, backward = forward + whole, backward + (TRAINING - 1) * learned
        return ExampleCost(
            self.shares[name],
            grids,
            positions(task, grids),
            prior,
            (TRAINING - 1) * prior,
            forward,
            round(backward * self.learning_share),
        )

    @property
    def learning_share(self) -> float:
        """The share of the steps in which the autoencoders learn."""
        cycle = self.stage.interval
        return 1.0 if cycle is None else cycle.train / (cycle.train + cycle.freeze)

    @cached_property
    def autoencoders(self) -> dict[tuple[str, tuple[int, ...]], tuple[int, int]]:
        """(modality, grid) -> its `autoencoder` FLOPs, for all that the tasks have."""
        kinds = {
            (segment.modality, self.grids[name][segment.kind])
            for name, task in self.tasks.items()
            for segment in task.layout.filled
        }
        return {kind: self.autoencoder(*kind) for kind in kinds}

    def autoencoder(self, name: str, grid: tuple[int, ...]) -> tuple[int, int]:
        """Forward FLOPs of one item: all, and those of them that gradients flow through."""
        modality, blank = self.modalities[name], self.blank(name, grid)
        item = Items.of(modality, [blank], [0])[0]
        observations = modality.collate([blank])
        encode = forward_flops(lambda: modality.encode(observations))
        if name not in self.objective.learning:
            return encode, 0
        own = forward_flops(lambda: modality.loss(observations, item.chance(Chance(0))))
        return own + encode * (name in self.objective.references), own

    # ---- memory --------------------------------------------------------------------------------

    def memory(self) -> tuple[str, dict[tuple[bool, bool], Memory]]:
        """The task that needs most, and memory by (sharded, checkpointed) where it is all there is
        in a microbatch."""
        precision, ema = self.precision, self.config.training.ema is not None
        state = optimizer_state(self.objective, self.plugins.optimizers[self.stage.name])
        batches = {name: self.objective.collate(self.microbatch(name), 0) for name in self.tasks}
        heaviest = next(iter(batches))
        if len(batches) > 1:
            heaviest = max(
                batches, key=lambda n: forward_only(self.objective, batches[n], precision)
            )
        found = {}
        for checkpointed in (False, True):
            if checkpointed:
                recompute(self.prior)
            step = imagined_step(self.objective, batches[heaviest], precision)
            for sharded in (False, True):
                found[sharded, checkpointed] = per_device(
                    self.objective, step, ema, state, self.request.gpus, sharded
                )
        return heaviest, found

    def microbatch(self, name: str) -> list[Prepared]:
        """As many blank examples of one task as a device computes at once."""
        count = self.stage.batch_size // (self.request.gpus * self.stage.accumulate)
        layout = self.tasks[name].layout
        blanks = {k: self.blank(layout[k].modality, grid) for k, grid in self.grids[name].items()}
        return [Prepared(name, str(slot), slot, blanks) for slot in range(count)]

    def blank(self, name: str, grid: tuple[int, ...]) -> torch.Tensor:
        return observation(self.modalities[name], grid)

    # ---- what an example holds -----------------------------------------------------------------

    def contents(self) -> dict[str, tuple[float, float | None]]:
        items: dict[str, float] = dict.fromkeys(self.modalities, 0.0)
        tokens: dict[str, float] = {}
        for name, task in self.tasks.items():
            for segment in task.layout.filled:
                m, grid = segment.modality, self.grids[name][segment.kind]
                items[m] += self.shares[name]
                if self.modalities[m].is_text:
                    stand_for = math.prod(grid) * self.modalities[m].symbols
                    tokens[m] = tokens.get(m, 0.0) + self.shares[name] * stand_for
        return {m: (count, tokens.get(m)) for m, count in items.items()}
