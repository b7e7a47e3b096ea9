"""The run folder: one folder is one run, and one run is one configuration.

    config.yaml        the resolved configuration
    metrics.jsonl      one line a logged step
    trackers/          what TensorBoard and others read
    initial/           the pipeline before its first step
    init_report.json   what `init` loaded, where it is used
    stages/STAGE/      the pipeline after each stage (finished.json: how many steps each took)
    checkpoints/       where the current stage continues from
    samples/STAGE-STEP/
    final/             the finished pipeline

The same command on an existing run folder continues the run, so its configuration must be the same
but for what does not change the weights that a step arrives at.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from unified.config.loading import dump_config, load_config
from unified.config.schema import Config
from unified.latents.weights import write_text

#: dotted keys that may change between the sittings of one run: its length, and what it reports
MAY_CHANGE = re.compile(
    r"run\.dir|stages\.\d+\.steps|data\.(prefetch|workers|cache_dir|cache_gb|allow_pipes)|"
    r"generation\..*|training\.(max_steps|save_every|"
    r"log_every|validate_every|sample_every|trackers.*|metrics.*|sharding|shard_size|divergence|"
    r"activation_checkpointing|attention|compile|keep_checkpoints|background_checkpoints)"
)


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, leaf) of nested mappings and lists."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in pairs:
        if isinstance(inner, dict | list) and inner:
            yield from flatten(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One phrase for each key that may not change and did."""
    before, after = dict(flatten(old)), dict(flatten(new))
    keys = [*before, *(k for k in after if k not in before)]
    changed = [k for k in keys if before.get(k) != after.get(k) and not MAY_CHANGE.fullmatch(k)]
    return [f"{k} ({before.get(k)!r} then, {after.get(k)!r} now)" for k in changed]


class RunFolder:
    """The paths of a run, and the configuration that is stored there."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.trackers = self.path / "trackers"
        self.initial = self.path / "initial"
        self.stages = self.path / "stages"
        self.checkpoints = self.path / "checkpoints"
        self.samples = self.path / "samples"
        self.final = self.path / "final"

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Within it, no other run can use the folder. ValueError if one does already."""
        from filelock import FileLock, Timeout

        self.path.mkdir(parents=True, exist_ok=True)
        lock = self.path / ".lock"
        try:
            with FileLock(lock, blocking=False):
                try:
                    yield
                finally:
                    lock.unlink(missing_ok=True)
        except Timeout:
            raise ValueError(
                f"another process is training in {self.path}; wait for it, or choose another"
                " run.dir"
            ) from None

    def check(self, config: Config) -> None:
        """ValueError if the folder holds a run of another configuration."""
        if not self.config.is_file():
            return
        old = load_config(self.config)
        changed = differences(old.model_dump(mode="json"), config.model_dump(mode="json"))
        if changed:
            raise ValueError(
                f"{self.path} holds a run of another configuration: {', '.join(changed[:3])}"
                f"{' and more' if len(changed) > 3 else ''}; choose another run.dir, or the same"
                " configuration to continue it"
            )

    def stored_config(self) -> Config:
        """The configuration of the run. ValueError for a folder without one."""
        if not self.config.is_file():
            raise ValueError(f"{self.path} is not a run folder: it has no config.yaml")
        return load_config(self.config)

    def write_config(self, config: Config) -> None:
        """Store the resolved configuration."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.config, dump_config(config))

    @property
    def finished(self) -> dict[str, int]:
        """Finished stage -> the steps it took."""
        record = self.stages / "finished.json"
        return dict(json.loads(record.read_text("utf-8"))) if record.is_file() else {}

    def finish(self, stage: str, steps: int) -> None:
        """Record, once its pipeline is in ``stages/``, that a stage is finished."""
        record = {**self.finished, stage: steps}
        write_text(self.stages / "finished.json", json.dumps(record, indent=2) + "\n")
