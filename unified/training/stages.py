"""From a stage's configuration to its objective, its data and its validation.

What depends on the kind of a stage (its objective, its streams, its samples) is decided here and
nowhere else. Modalities and tasks are whatever the pipeline holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Set
from copy import deepcopy
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unified.config.plugins import Plugins, aligned
from unified.config.schema import Config, StageConfig
from unified.data.batches import Collate
from unified.data.examples import Example
from unified.data.fixed import fixed_examples
from unified.data.mixture import Feed, Mixture, as_list
from unified.data.source import Source, access_of
from unified.data.stored import LATENTS
from unified.data.streams import ItemStream, Prepared, TaskStream
from unified.latents.modality import by_shape, unencoded
from unified.pipeline import UnifiedPipeline
from unified.randomness import derive
from unified.training import samples
from unified.training.objectives.alignment import Alignment
from unified.training.objectives.autoencoder import AutoencoderObjective
from unified.training.objectives.joint import JointObjective
from unified.training.objectives.objective import Objective
from unified.training.validation import Validation, measured, own

if TYPE_CHECKING:
    from accelerate import Accelerator

#: examples that the latent statistics are fitted to
STATISTICS_EXAMPLES = 512
#: examples of a source that a tokenizer is trained on
CORPUS_EXAMPLES = 200_000


class Sources:
    """The sources of a configuration; each split is opened once."""

    def __init__(self, config: Config):
        self.config = config
        self._open: dict[tuple[str, str], Source] = {}

    def __call__(self, name: str, split: str = "train") -> Source:
        if (name, split) not in self._open:
            config, access = self.config.data.sources[name], access_of(self.config.data)
            self._open[name, split] = Source.open(name, config, split, access)
        return self._open[name, split]

    def check(self) -> None:
        """Look at all training and validation shards now, so that a wrong path is found at once."""
        for name in self.config.data.sources:
            self(name)
            if self.has(name, "val"):
                self(name, "val")

    def has(self, name: str, split: str) -> bool:
        return bool(getattr(self.config.data.sources[name], split))

    def corpus(self, modality: str, plugins: Plugins) -> Iterator[Any]:
        """The items of one modality in the first `CORPUS_EXAMPLES` examples of each training
        source; those that cannot be read are left out.

        They are read by a modality that has no corpus yet, which is built on the first item.
        """
        plugin, options = plugins.modalities[modality]
        reader = {modality: plugin.build(options, None)}
        for name in self.config.data.sources:
            for raw in islice(self(name), CORPUS_EXAMPLES):
                example = Example(raw, reader)
                if modality in example:
                    try:
                        yield example[modality]
                    except ValueError:  # training skips and counts it, and refuses too many
                        continue


class Materials:
    """What one stage is made of, given the pipeline as it stands when the stage begins."""

    def __init__(
        self,
        config: Config,
        stage: StageConfig,
        pipeline: UnifiedPipeline,
        sources: Sources,
        plugins: Plugins,
    ):
        self.config, self.stage, self.pipeline, self.sources = config, stage, pipeline, sources
        self.plugins = plugins

    def see_stored(self) -> None:
        """Take the autoencoders' fingerprints, if latents are stored, while they are whole and in
        this process."""
        for _, stream, source, _ in self.streams:
            first = self.sources(source).first
            if isinstance(stream, TaskStream) and LATENTS in first.members:
                _ = stream.encoders

    def objective(self) -> Objective:
        make = OBJECTIVES[self.stage.objective]
        return make(self.config, self.stage, self.pipeline, self.plugins)

    @cached_property
    def streams(self) -> list[tuple[str, ItemStream | TaskStream, str, float]]:
        """(name, stream, source, ratio): one a source, or in a joint stage one a task's source."""
        stage, modalities = self.stage, self.pipeline.modalities
        if stage.objective == "autoencoder":
            return [
                (source, ItemStream(source, str(stage.modality), modalities, stage.crop), source, r)
                for source, r in stage.sources.items()
            ]
        found: list[tuple[str, ItemStream | TaskStream, str, float]] = []
        for name, task in self.pipeline.tasks.items():
            stream = TaskStream(name, task, modalities, stage.row_length, stage.too_long)
            sources = task.config.sources
            for source, share in sources.items():
                label = name if len(sources) == 1 else f"{name}/{source}"
                found.append((label, stream, source, task.config.ratio * share))
        return found

    def mixture(
        self,
        batch_size: int,
        purpose: str,
        process: int = 0,
        processes: int = 1,
        workers: int | None = None,
        collate: Collate = as_list,
    ) -> Mixture:
        """The training data of one of several processes, in an order that depends on `purpose`."""
        data = self.config.data
        return Mixture(
            [Feed(stream, self.sources(s), r, name) for name, stream, s, r in self.streams],
            batch_size=batch_size,
            seed=self.config.run.seed,
            stage=purpose,
            max_bad_share=data.max_bad_share,
            shuffle_buffer=data.shuffle_buffer,
            process=process,
            processes=processes,
            workers=data.workers if workers is None else workers,
            collate=collate,
            parts=1 if collate is as_list else self.stage.accumulate,
        )

    @cached_property
    def held_out(self) -> dict[str, list[Prepared]]:
        """Stream -> the first examples of its ``val`` split, where it has one."""
        count = self.config.training.validation_examples
        return {
            name: fixed_examples(self.sources(source, "val"), stream, count)
            for name, stream, source, ratio in self.streams
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
        """The named values of a validation: losses over the held-out examples, in an autoencoder
        stage the modality's own measures, and ``training.metrics``. None if there is nothing."""
        batches, metrics = self.validation(), self.plugins.metrics
        if not batches and not metrics:
            return None
        losses_of = Validation(objective.for_validation(), batches, accelerator)

        def validate(step: int) -> dict[str, float]:
            values = losses_of() if batches else {}
            if batches and self.stage.modality is not None:
                modality = self.pipeline.modalities[self.stage.modality]
                values |= measured(modality, batches, accelerator)
            return values | own(metrics, self.pipeline, step, values)

        return validate

    def sample(self, step: int, folder: Path) -> dict[str, Any]:
        """Write what the model makes of the first held-out examples into `folder`; the items by
        name."""
        del step
        written: dict[str, Any] = {}
        for stream, examples in self.held_out.items():
            if self.stage.modality is not None:
                modality = self.pipeline.modalities[self.stage.modality]
                shown = unencoded(e.observations["X"] for e in examples)
                written |= samples.write_reconstructions(folder, stream, modality, shown)
                continue
            few = examples[: samples.SAMPLES]
            task = self.pipeline.tasks[few[0].stream]
            modality = self.pipeline.modalities[task.layout[task.generates].modality]
            items = samples.generate(self.pipeline, few[0].stream, few, self.config.generation)
            written |= samples.write(folder, stream.replace("/", "-"), modality, items)
        return written

    @torch.no_grad()
    def fit_statistics(self, names: Set[str]) -> None:
        """Fit the latent statistics of these modalities to examples of the tasks."""
        if not names:
            return
        observations: dict[str, list[Tensor]] = {}
        kept: set[str] = set()
        (drawn,) = self.mixture(STATISTICS_EXAMPLES, "statistics", workers=0).batch(0)
        for example in drawn:
            layout = self.pipeline.tasks[example.stream].layout
            for kind, observation in example.observations.items():
                if isinstance(observation, Tensor):
                    observations.setdefault(layout[kind].modality, []).append(observation)
                else:  # stored latents were made with the statistics that there are
                    kept.add(layout[kind].modality)
        for name in (names & observations.keys()) - kept:
            modality, found = self.pipeline.modalities[name].eval(), observations[name]
            order = by_shape([tuple(o.shape) for o in found])
            batch = modality.collate([found[i] for i in order])
            modality.fit_statistics(batch.to(next(modality.parameters()).device))


def _autoencoder(
    config: Config, stage: StageConfig, pipeline: UnifiedPipeline, plugins: Plugins
) -> Objective:
    """Critics begin with weights that are a function of the seed and the stage."""
    modality = pipeline.modalities[str(stage.modality)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(config.run.seed, stage.name, "critics"))
        found = plugins.critics[stage.name].items()
        critics = {name: cls(options) for name, (cls, options) in found}
    return AutoencoderObjective(modality, stage, config.run.seed, critics)


def _joint(
    config: Config, stage: StageConfig, pipeline: UnifiedPipeline, plugins: Plugins
) -> Objective:
    """With ``loss.ref``, the encoders as they stand now are the reference of eq. 3.18."""
    anchored = stage.loss.ref > 0 and stage.optimizer.vae_lr_ratio > 0
    learning = {n: m for n, m in pipeline.modalities.items() if anchored and not m.frozen}
    training = config.training
    pipeline.prior.recompute = training.activation_checkpointing
    pipeline.prior.attention = "sdpa" if training.attention == "auto" else training.attention
    if training.compile:
        pipeline.prior.compile()
    return JointObjective(
        pipeline.prior,
        pipeline.modalities,
        {name: task.layout for name, task in pipeline.tasks.items()},
        stage,
        config.flow,
        config.run.seed,
        {name: deepcopy(modality) for name, modality in learning.items()},
        _alignment(config, stage, pipeline, plugins),
        pipeline.path,
    )


def _alignment(
    config: Config, stage: StageConfig, pipeline: UnifiedPipeline, plugins: Plugins
) -> Alignment | None:
    """With ``alignment``, its encoder and a new projection."""
    if stage.alignment is None:
        return None
    torch.manual_seed(derive(config.run.seed, stage.name, "alignment"))
    name = aligned(stage.alignment, {n: type(m) for n, m in pipeline.modalities.items()})
    told = stage.alignment.model_copy(update={"modality": name})
    make = plugins.encoders[stage.name]
    return Alignment.build(told, pipeline.modalities[name], config.prior.width, make)


OBJECTIVES: Mapping[str, Callable[[Config, StageConfig, UnifiedPipeline, Plugins], Objective]] = {
    "autoencoder": _autoencoder,
    "joint": _joint,
}
