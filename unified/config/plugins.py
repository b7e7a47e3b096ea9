"""From the parts of a configuration to plugin classes and tasks, and whether they fit together.

The schema (`unified.config.schema`) leaves a plugin's own keys unread; here the part's ``type`` is
resolved and the rest is validated by the class's own ``Config``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from unified.config.registry import Group, resolve, trusted
from unified.config.schema import AlignmentConfig, Config, PluginPart, StageConfig
from unified.errors import Keys, did_you_mean, validated

if TYPE_CHECKING:
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
    for modality in config.flow.timesteps:
        _known(modality, config.modalities, "flow.timesteps", "modality")
    _validate_stages(config, sum(task.config.ratio for task in tasks.values()))
    for index, stage in enumerate(config.stages):
        classes = {name: cls for name, (cls, _) in modalities.items()}
        _validate_alignment(config, stage, classes, trust_remote_code)
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


def _validate_alignment(
    config: Config,
    stage: StageConfig,
    modalities: Mapping[str, type[Modality]],
    trust_remote_code: bool,
) -> None:
    """The features to align exist, and so does what they are aligned with."""
    alignment = stage.alignment
    if alignment is None:
        return
    where = f"stage {stage.name}, alignment"
    _known(aligned(alignment, modalities, where), config.modalities, where, "modality")
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
