"""``unified data encode``: the latents of a joint stage's examples, made once and stored.

    OUT/
      TASK-SPLIT-00000.tar     one per shard of the source, in its order (TASK-SOURCE-... where a
                               task has several sources)
      model/                   the pipeline whose autoencoders made them, statistics fitted
      latents.yaml             what to add to the configuration, to train from here

Shards that are there already are left alone, so that the command continues what was interrupted,
and parts of the work can be done elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
import yaml
from tqdm import tqdm

from unified.config.schema import Config, StageConfig
from unified.data.examples import Example
from unified.data.source import Source
from unified.data.stored import LATENTS, fingerprint, phased, to_bytes
from unified.data.streams import TaskStream
from unified.data.tools.pack import write_shard
from unified.latents.modality import Modality
from unified.latents.modality import encode as encode_all
from unified.latents.ragged import Posteriors
from unified.latents.weights import write_text
from unified.pipeline import UnifiedPipeline
from unified.training.run import without_statistics
from unified.training.stages import Materials, Sources

#: the number of a shard, as a pattern of names
NUMBER = "[0-9]" * 5


@dataclass
class Encoded:
    """What was written: examples by task and split, and what was left out, with the reason."""

    examples: dict[str, int] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def add(self, name: str, count: int) -> None:
        self.examples[name] = self.examples.get(name, 0) + count


@torch.no_grad()
def encode(
    config: Config,
    pipeline: UnifiedPipeline,
    out: Path,
    *,
    dtype: torch.dtype = torch.float32,
    part: tuple[int, int] = (0, 1),
    batch_size: int = 16,
    trust_remote_code: bool = False,
) -> Encoded:
    """Write the latents of every source and split of every task of the (first) joint stage.

    `part` (i, n) does every n-th shard, from number i. ValueError for a configuration without a
    joint stage, or whose joint stage trains the autoencoders.
    """
    stage = joint_stage(config)
    materials = Materials(config, stage, pipeline, Sources(config))
    if not (out / "model").is_dir():
        materials.fit_statistics(without_statistics(materials))
        pipeline.save_pretrained(out / "model")
    else:  # another part began: its statistics count
        pipeline = UnifiedPipeline.from_pretrained(out / "model", trust_remote_code)
        materials = Materials(config, stage, pipeline, Sources(config))
    for modality in pipeline.modalities.values():
        modality.eval()
    encoders = {name: fingerprint(m) for name, m in pipeline.modalities.items()}
    done = Encoded()
    for label, stream, source, split in splits(materials):
        shards = materials.sources(source, split)
        for number in tqdm(range(part[0], len(shards.urls), part[1]), desc=label, disable=None):
            path = out / f"{label}-{split}-{number:05}.tar"
            if not path.is_file():
                url = shards.urls[number]
                found = encoded(shards, url, stream, encoders, dtype, batch_size, done)
                members = ((key, {LATENTS: data}) for key, data in found)
                done.add(f"{label}-{split}", write_shard(path, members))
    write_text(out / "latents.yaml", yaml.safe_dump(settings(materials, out), sort_keys=False))
    return done


def joint_stage(config: Config) -> StageConfig:
    """The stage whose examples are encoded."""
    stage = next((s for s in config.stages if s.objective == "joint"), None)
    if stage is None:
        raise ValueError("the configuration has no joint stage, whose latents could be stored")
    if stage.optimizer.vae_lr_ratio:
        raise ValueError(
            f"stage {stage.name} trains the autoencoders (optimizer.vae_lr_ratio is"
            f" {stage.optimizer.vae_lr_ratio:g}), so their latents change; only those of frozen"
            " ones can be stored"
        )
    return stage


def splits(materials: Materials) -> Iterator[tuple[str, TaskStream, str, str]]:
    """(name of the shards, stream, source, split) of everything to encode."""
    for name, stream, source, _ in materials.streams:
        assert isinstance(stream, TaskStream)
        for split in materials.config.data.sources[source].all_splits:
            yield name.replace("/", "-"), stream, source, split


def encoded(
    source: Source,
    url: str,
    stream: TaskStream,
    encoders: dict[str, str],
    dtype: torch.dtype,
    batch_size: int,
    done: Encoded,
) -> Iterator[tuple[str, bytes]]:
    """(key, member) of each good example of one shard."""
    own = {m: encoders[m] for m in stream.kinds.values()}
    raw = (source.read(entry) for entry in source.shard(url))
    while batch := list(islice(raw, batch_size)):
        good: list[tuple[str, dict[str, torch.Tensor]]] = []
        for example in (Example(r, stream.modalities) for r in batch):
            try:
                good.append((example.key, observed(stream, example)))
            except ValueError as error:
                done.left_out.append(str(error))
        for (key, _), posteriors in zip(good, together(stream, [o for _, o in good]), strict=True):
            yield key, to_bytes(posteriors, own, dtype)


def observed(stream: TaskStream, example: Example) -> dict[str, torch.Tensor]:
    """Kind and phase -> observation, for all phases at which the example may begin."""
    phases = range(stream.phases)
    return {
        phased(kind, lead if kind == stream.continues else 0): observation
        for lead in phases
        for kind, observation in stream.observe(example, lead)[0].items()
    }


def together(
    stream: TaskStream, observations: Sequence[dict[str, torch.Tensor]]
) -> list[dict[str, Posteriors]]:
    """The posteriors of several examples, each modality's encoded at once."""
    found: list[dict[str, Posteriors]] = [{} for _ in observations]
    for name in dict.fromkeys(stream.kinds.values()):
        modality: Modality = stream.modalities[name]
        places = [
            (i, kind)
            for i, each in enumerate(observations)
            for kind in each
            if stream.kinds[kind.partition("@")[0]] == name
        ]
        if places:
            posteriors = encode_all(modality, [observations[i][kind] for i, kind in places])
            for (i, kind), posterior in zip(places, posteriors, strict=True):
                found[i][kind] = posterior
    return found


def settings(materials: Materials, out: Path) -> dict[str, object]:
    """The part of a configuration that trains from these latents: sources, tasks, and where the
    autoencoders come from."""
    sources: dict[str, dict[str, object]] = {}
    tasks: dict[str, dict[str, object]] = {}
    for name, _, source, ratio in materials.streams:
        label, told = name.replace("/", "-"), materials.config.data.sources[source]
        shards = {
            split: [str(p) for p in sorted(out.absolute().glob(f"{label}-{split}-{NUMBER}.tar"))]
            for split in told.all_splits
        }
        further = {split: shards.pop(split) for split in told.splits if split in shards}
        sources[f"{label}-latents"] = {**shards, "splits": further}
        shares = tasks.setdefault(name.partition("/")[0], {"source": {}})["source"]
        shares[f"{label}-latents"] = ratio  # type: ignore[index]
    model = str((out / "model").absolute())
    init = {f"{name}_vae": model for name in materials.pipeline.modalities}
    return {"data": {"sources": sources}, "tasks": tasks, "init": init}
