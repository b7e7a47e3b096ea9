"""From a stage's configuration to its objective, its data and its validation.

What depends on the kind of a stage (its objective, its streams, its samples) is decided here and
nowhere else. Modalities and tasks are whatever the pipeline holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Set
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unified.config import Config, StageConfig
from unified.data.examples import Example
from unified.data.fixed import fixed_examples
from unified.data.mixture import Feed, Mixture
from unified.data.source import Source
from unified.data.streams import ItemStream, Prepared, TaskStream
from unified.pipeline import UnifiedPipeline
from unified.plugins import critic_plugins, modality_plugins
from unified.randomness import derive
from unified.training import samples
from unified.training.loop import evaluate
from unified.training.measures import measured
from unified.training.objective import Objective
from unified.training.objectives import AutoencoderObjective, JointObjective

if TYPE_CHECKING:
    from accelerate import Accelerator

#: examples that the latent statistics are fitted to
STATISTICS_EXAMPLES = 512


class Sources:
    """The sources of a configuration; each split is read once."""

    def __init__(self, config: Config):
        self.config = config
        self._open: dict[tuple[str, str], Source] = {}

    def __call__(self, name: str, split: str = "train") -> Source:
        if (name, split) not in self._open:
            self._open[name, split] = Source.open(name, self.config.data.sources[name], split)
        return self._open[name, split]

    def read(self) -> None:
        """Read all training and validation shards now, so that a wrong path is found at once."""
        for name in self.config.data.sources:
            self(name)
            if self.has(name, "val"):
                self(name, "val")

    def has(self, name: str, split: str) -> bool:
        return bool(getattr(self.config.data.sources[name], split))

    def corpus(self, modality: str, trust_remote_code: bool = False) -> Iterator[Any]:
        """The items of one modality in all training sources; those that cannot be read left out.

        They are read by a modality that has no corpus yet, which is built on the first item.
        """
        plugin, options = modality_plugins(self.config, trust_remote_code)[modality]
        reader = {modality: plugin.build(options, None)}
        for name in self.config.data.sources:
            source = self(name)
            for example in (Example(source[i], reader) for i in range(len(source))):
                if modality in example:
                    try:
                        yield example[modality]
                    except ValueError:  # training skips and counts it, and refuses too many
                        continue


class Materials:
    """What one stage is made of, given the pipeline as it stands when the stage begins."""

    def __init__(
        self, config: Config, stage: StageConfig, pipeline: UnifiedPipeline, sources: Sources
    ):
        self.config, self.stage, self.pipeline, self.sources = config, stage, pipeline, sources

    def objective(self) -> Objective:
        return OBJECTIVES[self.stage.objective](self.config, self.stage, self.pipeline)

    @cached_property
    def streams(self) -> list[tuple[ItemStream | TaskStream, str, float]]:
        """(stream, source, ratio): one a source, or in a joint stage one a task."""
        stage, modalities = self.stage, self.pipeline.modalities
        if stage.objective == "autoencoder":
            return [
                (ItemStream(source, str(stage.modality), modalities, stage.crop), source, ratio)
                for source, ratio in stage.sources.items()
            ]
        return [
            (TaskStream(n, t, modalities, stage.row_length), t.config.source, t.config.ratio)
            for n, t in self.pipeline.tasks.items()
        ]

    def mixture(self, batch_size: int, purpose: str) -> Mixture:
        """The training data, in an order that depends on `purpose`."""
        feeds = [Feed(stream, self.sources(source), r) for stream, source, r in self.streams]
        return Mixture(
            feeds,
            batch_size=batch_size,
            seed=self.config.run.seed,
            stage=purpose,
            max_bad_share=self.config.data.max_bad_share,
        )

    @cached_property
    def held_out(self) -> dict[str, list[Prepared]]:
        """Stream -> the first examples of its ``val`` split, where it has one."""
        count = self.config.training.validation_examples
        return {
            stream.name: fixed_examples(self.sources(source, "val"), stream, count)
            for stream, source, ratio in self.streams
            if ratio and self.sources.has(source, "val")
        }

    def validation(self) -> dict[str, list[list[Prepared]]]:
        """Stream -> held-out examples in batches, as large as a training step's microbatches."""
        size = self.stage.batch_size // self.stage.accumulate
        return {
            name: [examples[i : i + size] for i in range(0, len(examples), size)]
            for name, examples in self.held_out.items()
        }

    def validate(
        self, objective: Objective, accelerator: Accelerator
    ) -> Callable[[int], dict[str, float]] | None:
        """The named values of a validation: losses over the held-out examples, and in an
        autoencoder stage the modality's own measures. None without such examples."""
        batches, fixed = self.validation(), objective.for_validation()
        if not batches:
            return None

        def validate(step: int) -> dict[str, float]:
            del step
            losses = evaluate(fixed, batches, accelerator)
            if self.stage.modality is None:
                return losses
            modality = self.pipeline.modalities[self.stage.modality]
            return losses | measured(modality, batches, accelerator)

        return validate

    def sample(self, step: int, folder: Path) -> None:
        """Write what the model makes of the first held-out examples into `folder`."""
        del step
        for stream, examples in self.held_out.items():
            if self.stage.modality is not None:
                modality = self.pipeline.modalities[self.stage.modality]
                shown = [e.observations["X"] for e in examples]
                samples.write_reconstructions(folder, stream, modality, shown)
                continue
            few, task = examples[: samples.SAMPLES], self.pipeline.tasks[stream]
            modality = self.pipeline.modalities[task.layout[task.generates].modality]
            items = samples.generate(self.pipeline, stream, few, self.config.generation)
            samples.write(folder, stream, modality, items)

    @torch.no_grad()
    def fit_statistics(self, names: Set[str]) -> None:
        """Fit the latent statistics of these modalities to examples of the tasks."""
        if not names:
            return
        observations: dict[str, list[Tensor]] = {}
        for example in self.mixture(STATISTICS_EXAMPLES, "statistics").batch(0):
            layout = self.pipeline.tasks[example.stream].layout
            for kind, observation in example.observations.items():
                observations.setdefault(layout[kind].modality, []).append(observation)
        for name in names & observations.keys():
            self.pipeline.modalities[name].eval().fit_statistics(observations[name])


def _autoencoder(config: Config, stage: StageConfig, pipeline: UnifiedPipeline) -> Objective:
    """Critics begin with weights that are a function of the seed and the stage."""
    modality = pipeline.modalities[str(stage.modality)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(config.run.seed, stage.name, "critics"))
        plugins = critic_plugins(type(modality), stage)
        critics = {name: cls(options) for name, (cls, options) in plugins.items()}
    return AutoencoderObjective(modality, stage, config.run.seed, critics)


def _joint(config: Config, stage: StageConfig, pipeline: UnifiedPipeline) -> Objective:
    """With ``loss.ref``, the encoders as they stand now are the reference of eq. 3.18."""
    anchored = stage.loss.ref > 0 and stage.optimizer.vae_lr_ratio > 0
    learning = {n: m for n, m in pipeline.modalities.items() if anchored and not m.frozen}
    return JointObjective(
        pipeline.prior,
        pipeline.modalities,
        {name: task.layout for name, task in pipeline.tasks.items()},
        stage,
        config.flow,
        config.run.seed,
        {name: deepcopy(modality) for name, modality in learning.items()},
    )


OBJECTIVES: Mapping[str, Callable[[Config, StageConfig, UnifiedPipeline], Objective]] = {
    "autoencoder": _autoencoder,
    "joint": _joint,
}
