"""What shortcuts of generation save, and what they change, on a trained model of the emoji.

    python benchmarks/shortcuts.py outputs/quickstart/final           # a table; --json for JSON
    python benchmarks/shortcuts.py DIR --setting settle=0.1 --setting "solver=ab2 num_steps=8"

Every setting makes the same things from the same noise: images of held-out captions, captions of
held-out images, continuations of held-out prose, each task of the three that the model has. It is
set beside the model's own settings, which come first. A row of the table is one setting, with the
tasks in that order; with ``--json`` it is one setting of one task.

* `time` is that of the whole way from items to items, over the first row's. Settings take turns,
  and the best turn of each counts. `positions` is how many the prior has denoised, over the first's
* `distance` is how far the first block of latents is from that of a fine integration with the
  model's own guidance, ``|z - z_fine| / |z_fine|``, on average over outputs; `text distance` the
  edit distance from the text that it gives
* what follows is measured as the quickstart measures it: the style that was asked for, a painted
  image nearest to its own among ten of its style, the edit distance between the names of a caption
  and of the emoji. Each stands beside its change from the first row, with the 95% interval of the
  mean of paired differences
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import machine
import torch
from torch import Tensor

from unified.config.loading import load_config, parse_settings
from unified.config.schema import Config, GenerationConfig
from unified.demos.emoji import IMAGE, TEXT, Emoji, common, named, read_emoji, says_style
from unified.demos.emoji_evaluation import (
    CANDIDATES,
    CAPTIONING,
    CONTINUATION,
    PAINTING,
    PROMPT_WORDS,
)
from unified.errors import validated
from unified.evaluation.nearest import latent_vectors, nearest_centroids, retrieved
from unified.evaluation.statistics import bootstrap, normalised_edit_distance
from unified.generation.items import Inference, Wish
from unified.pipeline import UnifiedPipeline
from unified.training.stages import Sources

#: the model's own settings, then each shortcut by itself, then several together
SETTINGS = [
    "",
    "guidance_interval=[0.2,1]",
    "guidance_interval=[0.4,1]",
    "guidance_interval=[0,0.8]",
    "unconditional_every=2",
    "unconditional_every=4",
    "settle=0.02",
    "settle=0.05",
    "num_steps=8",
    "solver=heun num_steps=8",
    "solver=heun num_steps=4",
    "solver=ab2",
    "solver=ab2 num_steps=8",
    "solver=ab2 num_steps=6",
    "solver=ab2 unconditional_every=2",
    "solver=ab2 num_steps=8 unconditional_every=2",
    "solver=ab2 num_steps=8 guidance_interval=[0.2,1]",
]
#: how finely the flow is integrated for what the others are compared with
FINE = "solver=ab2 time_shift=1 num_steps={}"

#: measure -> its value for each output
Measured = dict[str, list[float]]


@dataclass(frozen=True)
class Case:
    """One task: what is asked for, and what is measured of the outputs."""

    task: str
    wishes: list[Wish]
    measure: Callable[[list[Any]], Measured]


# ---- what is asked for --------------------------------------------------------------------------


class Cases:
    """The cases of a model, with `count` examples of each held-out split that `config` names."""

    def __init__(self, model: UnifiedPipeline, config: Config, count: int):
        self.model, self.count, self.sources = model, count, Sources(config)

    def __iter__(self) -> Iterator[Case]:
        made = {
            PAINTING: self.painting,
            CAPTIONING: self.captioning,
            CONTINUATION: self.continuation,
        }
        return (case() for task, case in made.items() if task in self.model.tasks)

    def painting(self) -> Case:
        everyone, own = self._held_out(PAINTING, read_emoji)
        some = [everyone[i] for i in own]
        image = self.model.modalities[IMAGE]
        wishes = [Wish({"C": e.caption}, image.observe(e.image).shape[1:]) for e in some]
        reference_RD, styles = self._vectors(everyone), [e.style for e in everyone]
        shown = read_emoji(self.sources(self._source(PAINTING)), self.model.modalities)
        known_RD, known = self._vectors(shown), [e.style for e in shown]

        def measure(images: list[Any]) -> Measured:
            seen = [image.observe(common(i)) for i in images]
            vectors_QD = latent_vectors(image, seen)
            found = nearest_centroids(vectors_QD, known_RD, known)
            nearest = retrieved(vectors_QD, reference_RD, own, styles, CANDIDATES)
            right = [float(f == e.style) for f, e in zip(found, some, strict=True)]
            return {"style": right, "retrieved": [float(n) for n in nearest]}

        return Case(PAINTING, wishes, measure)

    def captioning(self) -> Case:
        everyone, own = self._held_out(CAPTIONING, read_emoji)
        some: list[Emoji] = [everyone[i] for i in own]
        told = self.model.tasks[CAPTIONING].config.instruction
        size = self.model.config.generation.max_new_tokens

        def measure(texts: list[Any]) -> Measured:
            pairs = list(zip(texts, some, strict=True))
            return {
                "style": [float(says_style(t, e.style)) for t, e in pairs],
                "name distance": [normalised_edit_distance(named(t), e.name) for t, e in pairs],
            }

        return Case(CAPTIONING, [Wish({"I": e.image, "P": told}, size) for e in some], measure)

    def continuation(self) -> Case:
        text: Any = self.model.modalities[TEXT]
        passages, own = self._held_out(
            CONTINUATION, lambda source, _: [text.read(e.members["txt"]) for e in source]
        )
        prompts = [" ".join(passages[i].split()[:PROMPT_WORDS]) for i in own]
        size = self.model.config.generation.max_new_tokens
        return Case(CONTINUATION, [Wish({"C": p}, size) for p in prompts], lambda _: {})

    def _source(self, task: str) -> str:
        (source,) = self.model.tasks[task].config.sources
        return source

    def _held_out(self, task: str, read: Callable[..., list[Any]]) -> tuple[list[Any], list[int]]:
        """The examples of all held-out splits, and the places of the first `count` of each."""
        source, everyone, own = self._source(task), list[Any](), list[int]()
        splits = self.sources.config.data.sources[source].all_splits
        for split in (name for name in splits if name != "train"):
            found = read(self.sources(source, split), self.model.modalities)
            own += range(len(everyone), len(everyone) + min(len(found), self.count))
            everyone += found
        return everyone, own

    def _vectors(self, emoji: Sequence[Emoji]) -> Tensor:
        image = self.model.modalities[IMAGE]
        return latent_vectors(image, [image.observe(common(e.image)) for e in emoji])


# ---- what is made -------------------------------------------------------------------------------


class Recorded(Inference):
    """Inference that keeps the first block of latents of each wish."""

    first: dict[int, Tensor]

    def _items(self, batch: Any, latents: Mapping[int, Tensor]) -> dict[int, Any]:
        target, requests = self.target.kind, batch.session.requests
        for i, z in latents.items():
            given = requests[i].given
            # what a prompt gives is no part of a block that is compared
            self.first.setdefault(i, z[len(given[target].values) if target in given else 0 :])
        return super()._items(batch, latents)


@dataclass(frozen=True)
class Made:
    """Outputs, the first block of latents of each, and positions that the prior has denoised."""

    items: list[Any]
    latents: list[Tensor]
    positions: int


def make(model: UnifiedPipeline, case: Case, setting: str, batch: int) -> Made:
    """Everything that `case` asks for, `batch` at once, from noise that depends on its place."""
    settings = chosen(model, setting)
    runner = Recorded(model.modalities, model.tasks, model.prior, case.task)
    items: list[Any] = []
    latents: list[Tensor] = []
    counts: list[int] = []
    hook = model.prior.register_forward_hook(lambda _, args, __: counts.append(positions(args[0])))
    for start in range(0, len(case.wishes), batch):
        wishes = case.wishes[start : start + batch]
        runner.first = {}
        made: dict[int, Any] = {}
        for step in runner.stream(wishes, settings, [start + i for i in range(len(wishes))]):
            made |= step
        items += [made[i] for i in range(len(wishes))]
        latents += [runner.first[i] for i in range(len(wishes))]
    hook.remove()
    return Made(items, latents, sum(counts))


def positions(batch: Any) -> int:
    return batch.time_RL.numel()


def chosen(model: UnifiedPipeline, setting: str) -> GenerationConfig:
    """The model's own settings, but for the KEY=VALUE pairs of `setting`."""
    own = model.config.generation.model_dump()
    return validated(GenerationConfig, own | parse_settings(setting.split()))


# ---- the table ----------------------------------------------------------------------------------


def compare(
    model: UnifiedPipeline, case: Case, settings: Sequence[str], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """One row for each setting."""
    fine = make(model, case, FINE.format(args.fine_steps), args.batch)
    made: dict[str, Made] = {}
    times: dict[str, list[float]] = {setting: [] for setting in settings}

    def turn(setting: str) -> None:
        made[setting] = make(model, case, setting, args.batch)

    for _ in range(args.repeats):
        for setting in settings:
            times[setting].append(machine.seconds(lambda s=setting: turn(s)))
    first = made[settings[0]]
    measured = {setting: case.measure(m.items) for setting, m in made.items()}
    return [
        {
            "task": case.task,
            "setting": setting or "(the model's own)",
            "time": min(times[setting]) / min(times[settings[0]]),
            "positions": made[setting].positions / first.positions,
            **distances(made[setting], fine),
            **changes(measured[setting], measured[settings[0]]),
        }
        for setting in settings
    ]


def distances(made: Made, fine: Made) -> dict[str, float]:
    """How far outputs are from those of a fine integration."""
    pairs = zip(made.latents, fine.latents, strict=True)
    found = {"distance": mean([float((z - f).norm() / f.norm()) for z, f in pairs])}
    texts = [(a, b) for a, b in zip(made.items, fine.items, strict=True) if isinstance(a, str)]
    if texts:
        found["text distance"] = mean([normalised_edit_distance(a, b) for a, b in texts])
    return found


def changes(measured: Measured, first: Measured) -> dict[str, float]:
    """The mean of each measure, and the mean of its paired differences with its interval."""
    found: dict[str, float] = {}
    for name, values in measured.items():
        change = bootstrap(torch.tensor(values) - torch.tensor(first[name]))
        found[name] = mean(values)
        found[f"{name} change"] = change.mean
        found[f"{name} low"], found[f"{name} high"] = change.low, change.high
    return found


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def by_setting(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The rows of one setting in one: tasks in turn, and changes with their intervals."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["setting"], []).append(row)
    return [
        {
            "setting": setting,
            **{
                name: " / ".join(f"{row[name]:.3f}" for row in group if name in row)
                for name in ("time", "positions", "distance", "text distance")
            },
            **{
                f"{row['task']}: {name}": interval(row, name)
                for row in group
                for name in (key.removesuffix(" low") for key in row if key.endswith(" low"))
            },
        }
        for setting, group in groups.items()
    ]


def interval(row: Mapping[str, Any], name: str) -> str:
    """The change of a measure; of what nothing changed, the measure itself."""
    change, low, high = (row[f"{name} {part}"] for part in ("change", "low", "high"))
    return f"{change:+.3f} [{low:+.3f}, {high:+.3f}]" if low < high else f"{row[name]:.3f}"


def options() -> argparse.ArgumentParser:
    made = machine.parser(__doc__)
    made.add_argument("model", help="a pipeline folder")
    made.add_argument("--config", default="quickstart.yaml", help="names the data of its sources")
    made.add_argument("--setting", action="append", help="beside the model's own; repeatable")
    made.add_argument("--task", action="append", help="only this one; repeatable")
    made.add_argument("--count", type=int, default=60, help="examples of each held-out split")
    made.add_argument("--batch", type=int, default=20, help="made at once")
    made.add_argument("--repeats", type=int, default=3, help="turns, of which the best counts")
    made.add_argument("--fine-steps", type=int, default=128, help="of the fine integration")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    args = machine.parse(options(), arguments)
    model = UnifiedPipeline.from_pretrained(args.model)
    settings = SETTINGS if args.setting is None else ["", *args.setting]
    for setting in settings:
        chosen(model, setting)  # what makes no sense is said before minutes are spent
    rows = [
        row
        for case in Cases(model, load_config(args.config), args.count)
        if args.task is None or case.task in args.task
        for row in compare(model, case, settings, args)
    ]
    machine.show(rows if args.json else by_setting(rows), args)


if __name__ == "__main__":
    main()
