"""A training run: the stages of a configuration, one after the other.

Every finished stage leaves a whole pipeline in ``stages/``, and the next one begins from there, so
a run that was stopped is continued by the same command, from its last checkpoint. What a stage
leaves behind, and what ends up in ``final/``, are the averaged weights (EMA) where there are any.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from unified.config.plugins import Plugins, resolve_plugins
from unified.config.schema import Config
from unified.model.attention import check_trains
from unified.model.precision import current_device, resolve
from unified.pipeline import UnifiedPipeline, write_json
from unified.randomness import derive
from unified.training import checkpoint
from unified.training.export import origin, restored
from unified.training.folder import RunFolder, flatten
from unified.training.init import as_json, initialise
from unified.training.loop import Stage, planned_steps, train_stage
from unified.training.metrics import say, tracker_names
from unified.training.optim import check_optimizers
from unified.training.parallel import distributed_settings, from_main
from unified.training.stages import Materials, Sources

if TYPE_CHECKING:
    from accelerate import Accelerator


def train(config: Config, source: str = "", trust_remote_code: bool = False) -> Path:
    """Train, or continue, the run in ``config.run.dir``; returns the finished pipeline's folder.

    `source` is the configuration's file, for error messages. ValueError for a configuration whose
    parts do not fit, and for a folder that holds a run of another configuration.
    """
    plugins = resolve_plugins(config, trust_remote_code, source)
    check_optimizers(config, plugins)
    folder = RunFolder(config.run.dir)
    folder.check(config)
    first = next_stage(config, folder)
    if first == len(config.stages) and folder.final.is_dir():
        say(f"the run in {folder.path} is finished: {folder.final}")
        return folder.final
    sources = Sources(config)
    sources.check()
    accelerator = start_accelerator(config, folder)
    with folder.claimed() if accelerator.is_main_process else nullcontext():
        pipeline = starting_point(config, first, folder, sources, accelerator, plugins)
        if accelerator.is_main_process:
            folder.write_config(config)
        for stage in config.stages[first:]:
            materials = Materials(config, stage, pipeline, sources, plugins)
            run_stage(materials, folder, accelerator)
            if config.training.sharding != "none":  # whole again, from what the stage left
                done = folder.stages / stage.name
                pipeline = UnifiedPipeline.read_from(plugins, config, done, accelerator.device)
        if accelerator.is_main_process:
            pipeline.save_pretrained(folder.final)
            say(f"finished: {folder.final}")
        accelerator.wait_for_everyone()
    accelerator.end_training()
    return folder.final


def next_stage(config: Config, folder: RunFolder) -> int:
    """Index of the stage to run; the number of stages if all have taken their steps.

    ValueError for a stage made longer after a later one began: that one stands on its weights.
    """
    if not config.stages:
        raise ValueError("the configuration has no stages, so there is nothing to train")
    finished = folder.finished
    for index, stage in enumerate(config.stages):
        if finished.get(stage.name, -1) < planned_steps(stage, config.training):
            names = [later.name for later in config.stages[index + 1 :]]
            begun = [n for n in names if n in finished or checkpoint.newest(folder.checkpoints, n)]
            if begun:
                raise ValueError(
                    f"stage {stage.name} finished at step {finished.get(stage.name, 0)} and cannot"
                    f" be made longer, since stage {begun[0]} has begun from there; choose another"
                    " run.dir"
                )
            return index
    return len(config.stages)


def start_accelerator(config: Config, folder: RunFolder) -> Accelerator:
    """The processes, precision and trackers of the run; ValueError as `check_processes`
    and `check_trains` say."""
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    device = current_device()
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ  # its launcher may start just one
    precision = resolve(config.training.precision, device)
    if config.training.precision == "auto":
        say(f"precision: {precision}")
    accelerator = Accelerator(
        mixed_precision={"fp32": "no", "bf16": "bf16"}[precision],
        cpu=device.type == "cpu",
        log_with=tracker_names(config.training.trackers) or None,
        project_config=ProjectConfiguration(str(folder.path), logging_dir=str(folder.trackers)),
        kwargs_handlers=distributed_settings(),
    )
    check_processes(accelerator, config.training.sharding)
    check_trains(config.training.attention, device, precision)
    launched = accelerator.num_processes
    if (launched > 1 or by_accelerate) and accelerator.is_main_process:
        say(f"processes: {launched}, sharding {config.training.sharding}")
    settings = dict(flatten(config.model_dump(mode="json")))
    plain = {k: v if isinstance(v, int | float | str) else str(v) for k, v in settings.items()}
    accelerator.init_trackers(
        "unified", plain, init_kwargs={"tensorboard": {"purge_step": reached(config, folder) + 1}}
    )
    return accelerator


def check_processes(accelerator: Accelerator, sharding: str) -> None:
    """ValueError if the processes that were launched did not find each other, if one alone is to
    shard the model, or several by accelerate's own settings."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise ValueError(
            f"{launched} processes were launched, but accelerate formed a group of"
            f" {accelerator.num_processes}; launch them with torchrun --nproc_per_node {launched}"
        )
    if launched == 1 and sharding != "none":
        raise ValueError(
            f"training.sharding is {sharding}, but this is one process alone; launch several with"
            " torchrun, or set it to none"
        )
    kind = accelerator.distributed_type.value
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        raise ValueError(
            f"accelerate is set to {kind}; leave its settings at data-parallel, and shard the model"
            " with training.sharding"
        )


def reached(config: Config, folder: RunFolder) -> int:
    """Steps that the run has behind it, over all stages."""
    first = next_stage(config, folder)
    done = [folder.finished[stage.name] for stage in config.stages[:first]]
    current = [sound(folder, stage.name) for stage in config.stages[first : first + 1]]
    return sum(done) + sum(current)


def starting_point(
    config: Config,
    first: int,
    folder: RunFolder,
    sources: Sources,
    accelerator: Accelerator,
    plugins: Plugins,
) -> UnifiedPipeline:
    """The pipeline that stage `first` begins with: what the one before left, or a new one.

    The configuration is written after it, so that a mistake found until then can be corrected in
    the same folder; what an attempt without one left behind is made anew.
    """
    start = origin(folder, config, config.stages[first].name)
    begun = start.is_dir() and folder.config.is_file()
    if accelerator.is_main_process and not begun:
        build(config, folder, sources, plugins)
    accelerator.wait_for_everyone()
    return UnifiedPipeline.read_from(plugins, config, start, accelerator.device)


def build(config: Config, folder: RunFolder, sources: Sources, plugins: Plugins) -> None:
    """Write a new model, with the parts that ``init`` names, to ``initial/``."""
    torch.manual_seed(derive(config.run.seed, "build"))
    corpora = {name: sources.corpus(name, plugins) for name in config.modalities}
    pipeline = UnifiedPipeline.build_from(plugins, config, corpora)
    reports = initialise(pipeline)
    for part, report in reports.items():
        say(f"init.{part}: {report}")
    pipeline.save_pretrained(folder.initial)
    if reports:
        write_json(folder.path / "init_report.json", as_json(reports))


def run_stage(materials: Materials, folder: RunFolder, accelerator: Accelerator) -> None:
    """Train one stage and leave the pipeline in ``stages/``."""
    config, stage, pipeline = materials.config, materials.stage, materials.pipeline
    materials.fit_statistics(without_statistics(materials, folder))
    materials.see_stored()
    objective = materials.objective().to(accelerator.device)
    progress = train_stage(
        Stage(
            stage,
            config.training,
            objective,
            materials.mixture(
                stage.batch_size,
                stage.name,
                accelerator.process_index,
                accelerator.num_processes,
                collate=objective.collate,
            ),
            folder,
            config.run.seed,
            sum(folder.finished.get(s.name, 0) for s in config.stages if s.name != stage.name),
            config.data.prefetch,
            materials.validate(objective, accelerator),
            materials.sample,
            materials.plugins.optimizers[stage.name],
        ),
        accelerator,
    )
    pipeline.weights = "ema" if config.training.ema else "raw"
    if accelerator.is_main_process:
        if config.training.sharding != "none":
            pipeline = whole(materials, folder, progress.step)
        pipeline.save_pretrained(folder.stages / stage.name)
        folder.finish(stage.name, progress.step)
    accelerator.wait_for_everyone()


def whole(materials: Materials, folder: RunFolder, step: int) -> UnifiedPipeline:
    """The pipeline after `step` steps of a sharded stage, from its checkpoint."""
    config, name = materials.config, materials.stage.name
    if step:
        return restored(materials.plugins, config, folder.checkpoints / f"{name}-{step}")
    return UnifiedPipeline.read_from(materials.plugins, config, origin(folder, config, name))


def sound(folder: RunFolder, stage: str) -> int:
    """Steps of the checkpoint that `stage` will continue from, the same on every process; 0 where
    there is none."""
    main = os.environ.get("RANK", "0") == "0"
    path = checkpoint.newest_sound(folder.checkpoints, stage)[0] if main else None
    return int(from_main(path.name.rpartition("-")[2] if path else 0))


def without_statistics(materials: Materials, folder: RunFolder | None = None) -> set[str]:
    """The modalities whose latent statistics are fitted now: once, when the first joint stage
    starts. A prior that is loaded knows the latents of modalities that are loaded with it by the
    statistics it was trained with, so theirs are kept."""
    config, stage = materials.config, materials.stage
    joint = [s.name for s in config.stages if s.objective == "joint"]
    if stage.name != next(iter(joint), None):
        return set()
    if folder is not None and sound(folder, stage.name) > 0:
        return set()
    kept = {m for m in config.modalities if "prior" in config.init and f"{m}_vae" in config.init}
    return set(config.modalities) - kept
