"""From the parts of a configuration to plugin classes and tasks, and whether they fit together.

The schema (`unified.config.schema`) leaves a plugin's own keys unread; here the part's ``type`` is
resolved and the rest is validated by the class's own ``Config``. That happens once, where a
configuration or a pipeline folder is loaded, and trust in code that is named by its path is asked
for there: whoever comes after takes the `Plugins` that were found.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from unified.config.registry import Group, resolve, trusted
from unified.config.schema import (
    AlignmentConfig,
    Config,
    FlowConfig,
    OptimizerConfig,
    PluginPart,
    StageConfig,
)
from unified.errors import Keys, did_you_mean, validated

if TYPE_CHECKING:
    from unified.flow.path import Path
    from unified.latents.critic import Critic
    from unified.latents.modality import Modality, PluginConfig
    from unified.sequence.task import Task


@dataclass(frozen=True)
class Plugins:
    """All that a configuration names: classes with their own configurations, tasks, the path, and
    what makes or measures something in training."""

    #: name -> (class, its configuration), ready for ``cls.build(configuration, corpus)``
    modalities: Mapping[str, tuple[type[Modality], PluginConfig]]
    tasks: Mapping[str, Task]
    path: Path
    #: stage -> critic -> (class, its configuration)
    critics: Mapping[str, Mapping[str, tuple[type[Critic], PluginConfig]]] = field(
        default_factory=dict
    )
    #: stage -> what makes the encoder of its alignment
    encoders: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    #: stage -> what makes its optimizer (`optimizer_factory`)
    optimizers: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    #: path to code -> the function of ``training.metrics``
    metrics: Mapping[str, Callable[..., Any]] = field(default_factory=dict)


def resolve_plugins(config: Config, trust_remote_code: bool = False, source: str = "") -> Plugins:
    """The plugins of a configuration that something is to be trained or planned with.

    ValueError for a path to code that is not trusted, for keys that a plugin does not know, and for
    parts that do not fit together, naming the two: tasks and stages name modalities and sources
    that exist; something is learned in every joint stage. `source` is the file, for error messages.
    """
    model = resolve_model(config, trust_remote_code, source)
    _validate_tasks(config, model.tasks)
    for modality in config.flow.timesteps:
        _known(modality, config.modalities, "flow.timesteps", "modality")
    _validate_stages(config, sum(task.config.ratio for task in model.tasks.values()))
    critics, encoders, optimizers = {}, {}, {}
    for index, stage in enumerate(config.stages):
        where = f"stage {stage.name}, optimizer"
        optimizers[stage.name] = optimizer_factory(stage.optimizer, trust_remote_code, where)
        if stage.alignment is not None:
            classes = {name: cls for name, (cls, _) in model.modalities.items()}
            encoders[stage.name] = _encoder(config, stage, classes, trust_remote_code)
        if stage.modality is not None:
            judged, _ = model.modalities[stage.modality]
            critics[stage.name] = _critics(judged, stage, ("stages", str(index)), source)
    metrics = {path: trusted("metric", path, trust_remote_code) for path in config.training.metrics}
    return replace(
        model, critics=critics, encoders=encoders, optimizers=optimizers, metrics=metrics
    )


def resolve_model(config: Config, trust_remote_code: bool = False, source: str = "") -> Plugins:
    """The plugins of the model alone, which are all that a pipeline folder needs. ValueError for a
    path to code that is not trusted, and for keys that a plugin does not know."""

    def plugin(group: Group, part: PluginPart, at: Keys) -> tuple[Any, PluginConfig]:
        cls: Any = resolve(group, part.type, trust_remote_code)
        return cls, validated(cls.Config, part.options, at, source)

    modalities = {
        name: plugin("modality", part, ("modalities", name))
        for name, part in config.modalities.items()
    }
    tasks = {}
    for name, part in config.tasks.items():
        cls, options = plugin("task", part, ("tasks", name))
        tasks[name] = cls(options)
    return Plugins(modalities, tasks, build_path(config.flow, trust_remote_code))


def _critics(
    modality: type[Modality], stage: StageConfig, at: Keys, source: str
) -> dict[str, tuple[type[Critic], PluginConfig]]:
    """The critics of a stage; `at` is its place."""
    found = {}
    for name, options in stage.loss.critics.items():
        where = f"stage {stage.name}, loss.critics"
        _known(name, modality.critics, where, "critic", f"which {modality.__name__} lacks")
        cls = modality.critics[name]
        found[name] = cls, validated(cls.Config, options, (*at, "loss", "critics", name), source)
    return found


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


def _validate_tasks(config: Config, tasks: Mapping[str, Task]) -> None:
    for name, task in tasks.items():
        for segment in task.layout.segments:
            _known(segment.modality, config.modalities, f"task {name}", "modality")
        for drawn in task.config.sources:
            _known(drawn, config.data.sources, f"task {name}", "data source")
        if task.config.ratio < 0:
            raise ValueError(f"task {name} has ratio {task.config.ratio}; it should be 0 or more")


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


def aligned(
    alignment: AlignmentConfig, modalities: Mapping[str, type[Modality]], where: str = "alignment"
) -> str:
    """The modality whose features are aligned: the one that is named, or the only one whose items
    are no texts. ValueError where that is none, or several."""
    pictured = [name for name, cls in modalities.items() if not cls.is_text]
    if not alignment.modality and len(pictured) != 1:
        raise ValueError(
            f"{where}.modality should name the modality that is aligned, since"
            f" {len(pictured)} have items that are no texts; {did_you_mean('', modalities)}"
        )
    return alignment.modality or pictured[0]


def _encoder(
    config: Config,
    stage: StageConfig,
    modalities: Mapping[str, type[Modality]],
    trust_remote_code: bool,
) -> Callable[..., Any]:
    """What makes the encoder of a stage's alignment, once the features to align exist."""
    alignment = stage.alignment
    assert alignment is not None
    where = f"stage {stage.name}, alignment"
    _known(aligned(alignment, modalities, where), config.modalities, where, "modality")
    depth = config.prior.multi_stream_depth + config.prior.single_stream_depth
    if alignment.layer > depth:
        raise ValueError(
            f"{where}.layer is {alignment.layer}, but the prior has {depth} blocks: 1 to {depth}"
        )
    make: Callable[..., Any] = trusted("encoder", alignment.encoder, trust_remote_code)
    return make


def _known(
    name: str, known: Iterable[str], where: str, what: str, why: str = "which is not configured"
) -> None:
    if name not in known:
        raise ValueError(f"{where} names the {what} {name!r}, {why}; {did_you_mean(name, known)}")
