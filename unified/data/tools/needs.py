"""What a configuration asks of its data, and whether an example gives it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch

from unified.config.plugins import Plugins
from unified.config.schema import Config
from unified.data.examples import BadExampleError, Example
from unified.data.shards import RawExample
from unified.latents.modality import Modality


@dataclass(frozen=True)
class Needs:
    """Of one source: the modalities that read it, and what each use takes out of an example."""

    modalities: Mapping[str, Modality]
    uses: Mapping[str, Callable[[Example], Any]]

    def judge(self, raw: RawExample) -> tuple[list[str], list[str]]:
        """(what is wrong with the example, the uses that it is good for).

        A member that cannot be read is told once, and not again by the uses that miss it.
        """
        example = _ReadOnce(raw, self.modalities)
        wrong = [_failure(itemgetter(name), example) for name in list(example)]
        failures = {use: _failure(take, example) for use, take in self.uses.items()}
        lost = {use: reason for use, reason in failures.items() if reason is not None}
        missed = [f"no good for {', '.join(lost)}: {next(iter(lost.values()))}"] if lost else []
        return [reason for reason in wrong if reason] or missed, [
            u for u in failures if u not in lost
        ]


def needs(config: Config, plugins: Plugins) -> dict[str, Needs]:
    """Source -> what its tasks and autoencoder stages need; no weight is allocated."""
    modalities = without_weights(plugins)
    uses: dict[str, dict[str, Callable[[Example], Any]]] = {n: {} for n in config.data.sources}
    for name, task in plugins.tasks.items():
        for source in task.config.sources:
            uses[source][f"task {name}"] = task.fill
    for stage in config.stages:
        for source in stage.sources if stage.modality else ():
            uses[source][f"stage {stage.name}"] = itemgetter(stage.modality)
    return {source: Needs(modalities, found) for source, found in uses.items()}


def without_weights(plugins: Plugins) -> dict[str, Modality]:
    """The modalities of a configuration, which can read items and no more."""
    with torch.device("meta"):
        return {
            name: plugin.build(options, None)
            for name, (plugin, options) in plugins.modalities.items()
        }


class _ReadOnce(Example):
    """An example that reads each item once, however many tasks ask for it."""

    def __init__(self, raw: RawExample, modalities: Mapping[str, Modality]):
        super().__init__(raw, modalities)
        self._read: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._read:
            self._read[name] = super().__getitem__(name)
        return self._read[name]


def _failure(take: Callable[[Example], Any], example: Example) -> str | None:
    """Why `take` cannot use the example, if it cannot."""
    try:
        take(example)
    except BadExampleError as error:
        return str(error.__cause__)  # without shard and key
    except ValueError as error:
        return str(error)
    return None
