"""From the parts of a configuration to plugin classes and tasks, and whether they fit together.

The schema (`unified.config.schema`) leaves a plugin's own keys unread; here the part's ``type`` is
resolved and the rest is validated by the class's own ``Config``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from unified.config.registry import Group, resolve, trusted
from unified.config.schema import Config, FlowConfig, OptimizerConfig, PluginPart, StageConfig
from unified.errors import Keys, did_you_mean, validated

if TYPE_CHECKING:
    from unified.flow.path import Path
    from unified.latents.critic import Critic
    from unified.latents.modality import Modality, PluginConfig
    from unified.sequence.task import Task


def plugin(
    group: Group, part: PluginPart, at: Keys, trust_remote_code: bool = False, source: str = ""
) -> tuple[Any, PluginConfig]:
    """(class, its configuration) of one part; `at` is the part's place, for error messages."""
    cls: Any = resolve(group, part.type, trust_remote_code)
    return cls, validated(cls.Config, part.options, at, source)


def modality_plugins(
    config: Config, trust_remote_code: bool = False, source: str = ""
) -> dict[str, tuple[type[Modality], PluginConfig]]:
    """Name -> (class, its configuration), ready for ``cls.build(configuration, corpus)``."""
    return {
        name: plugin("modality", part, ("modalities", name), trust_remote_code, source)
        for name, part in config.modalities.items()
    }


def critic_plugins(
    modality: type[Modality], stage: StageConfig, at: Keys = (), source: str = ""
) -> dict[str, tuple[type[Critic], PluginConfig]]:
    """Name -> (class, its configuration) of a stage's critics; `at` is the stage's place."""
    found = {}
    for name, options in stage.loss.critics.items():
        where = f"stage {stage.name}, loss.critics"
        _known(name, modality.critics, where, "critic", f"which {modality.__name__} lacks")
        cls = modality.critics[name]
        found[name] = cls, validated(cls.Config, options, (*at, "loss", "critics", name), source)
    return found


def build_tasks(
    config: Config, trust_remote_code: bool = False, source: str = ""
) -> dict[str, Task]:
    """Name -> task, for every configured task."""
    tasks = {}
    for name, part in config.tasks.items():
        cls, options = plugin("task", part, ("tasks", name), trust_remote_code, source)
        tasks[name] = cls(options)
    return tasks


def build_path(config: FlowConfig, trust_remote_code: bool = False) -> Path:
    """The path that ``flow.path`` names. ValueError for a class that is none (`Path.check`)."""
    cls = resolve("path", config.path, trust_remote_code)
    try:
        path: Path = cls()
    except TypeError as error:
        raise ValueError(f"the path {config.path!r} cannot be made: {error}") from None
    path.check(config.path)
    return path


def optimizer_factory(
    config: OptimizerConfig, trust_remote_code: bool = False, where: str = "optimizer"
) -> Callable[..., Any]:
    """What makes the optimizer of groups of parameters, with lr, betas and options in place.

    ValueError, which calls the part of the configuration `where`, for an option that it does not
    have or that is given elsewhere, and for betas where it has none.
    """
    factory = resolve("optimizer", config.type, trust_remote_code)
    parameters = inspect.signature(factory).parameters
    groups, *names = [*parameters] or [""]
    elsewhere = {groups, "lr", "betas", "weight_decay"}
    anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for option in config.options:
        if option in elsewhere:
            raise ValueError(f"{where}.options has {option!r}, which is not given there")
        if not anything:
            why = f"which {config.type} lacks"
            _known(option, {*names} - elsewhere, f"{where}.options", "option", why)
    given: dict[str, Any] = {"lr": config.lr, **config.options}
    if "betas" in names:
        given["betas"] = config.betas
    elif config.betas != OptimizerConfig().betas:
        raise ValueError(f"{where}.betas is {config.betas}, but {config.type} has no betas")
    return partial(factory, **given)


def validate_plugins(config: Config, source: str = "", trust_remote_code: bool = False) -> None:
    """Check that the parts fit together; ValueError names the two that do not.

    Plugins' own keys are known ones; tasks and stages name modalities and sources that exist;
    something is learned in every joint stage. `source` is the file, for error messages.
    """
    modalities = modality_plugins(config, trust_remote_code, source)
    tasks = build_tasks(config, trust_remote_code, source)
    for name, task in tasks.items():
        for segment in task.layout.segments:
            _known(segment.modality, config.modalities, f"task {name}", "modality")
        for drawn in task.config.sources:
            _known(drawn, config.data.sources, f"task {name}", "data source")
        if task.config.ratio < 0:
            raise ValueError(f"task {name} has ratio {task.config.ratio}; it should be 0 or more")
    build_path(config.flow, trust_remote_code)
    for metric in config.training.metrics:
        trusted("metric", metric, trust_remote_code)
    for modality in config.flow.timesteps:
        _known(modality, config.modalities, "flow.timesteps", "modality")
    _validate_stages(config, sum(task.config.ratio for task in tasks.values()))
    for index, stage in enumerate(config.stages):
        optimizer_factory(stage.optimizer, trust_remote_code, f"stage {stage.name}, optimizer")
        _validate_alignment(config, stage, trust_remote_code)
        if stage.modality is not None:
            critic_plugins(modalities[stage.modality][0], stage, ("stages", str(index)), source)


def _validate_stages(config: Config, ratios: float) -> None:
    for stage in config.stages:
        where = f"stage {stage.name}"
        if stage.modality is not None:
            _known(stage.modality, config.modalities, where, "modality")
        for modality in stage.loss.modality:
            _known(modality, config.modalities, f"{where}, loss.modality", "modality")
        for name in stage.sources:
            _known(name, config.data.sources, where, "data source")
        shares = ratios if stage.objective == "joint" else sum(stage.sources.values())
        if shares <= 0:
            parts = "tasks" if stage.objective == "joint" else "sources"
            raise ValueError(
                f"{where} has a zero-weight objective: no {parts} with a ratio above 0"
            )


def _validate_alignment(config: Config, stage: StageConfig, trust_remote_code: bool) -> None:
    """The features to align exist, and so does what they are aligned with."""
    alignment = stage.alignment
    if alignment is None:
        return
    where = f"stage {stage.name}, alignment"
    _known(alignment.modality, config.modalities, where, "modality")
    depth = config.prior.multi_stream_depth + config.prior.single_stream_depth
    if alignment.layer > depth:
        raise ValueError(
            f"{where}.layer is {alignment.layer}, but the prior has {depth} blocks: 1 to {depth}"
        )
    trusted("encoder", alignment.encoder, trust_remote_code)


def _known(
    name: str, known: Iterable[str], where: str, what: str, why: str = "which is not configured"
) -> None:
    if name not in known:
        raise ValueError(f"{where} names the {what} {name!r}, {why}; {did_you_mean(name, known)}")
