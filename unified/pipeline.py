"""A model in one folder that users of diffusers recognise.

    model_index.json     class, version, the plugins and their options, which weights are held
    text_vae/  ...       each modality's own files: NAME_vae/ and what else it needs (tokenizer/)
    prior/               config.json, model.safetensors (in shards above 5 GB)

All tensors are safetensors, read strictly. Plugins are named by short name; a path to code is
followed only with ``trust_remote_code=True``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from unified import shortcuts
from unified.config.plugins import Plugins, build_path, resolve_model
from unified.config.schema import Config, GenerationConfig, PriorConfig
from unified.errors import validated
from unified.flow.path import Path as FlowPath
from unified.generation.items import Inference, Seed, Wish
from unified.latents.modality import Modality
from unified.latents.weights import load_weights, save_weights, written_whole
from unified.likelihood import DensityConfig, Score, score
from unified.likelihood.score import Scorer
from unified.model.prior import Prior
from unified.sequence.layout import Layout
from unified.sequence.task import Task

INDEX = "model_index.json"
#: what a configuration says about a run and its machine, and not about the model
OF_THE_RUN = {"run", "data", "init", "prior"}

Weights = Literal["ema", "raw"]


class UnifiedPipeline:
    """The modalities, the tasks and the prior of one model; `weights` says which its prior has.

    `path` is what its flow follows; without one, the one that the configuration names.
    """

    def __init__(
        self,
        config: Config,
        modalities: Mapping[str, Modality],
        tasks: Mapping[str, Task],
        prior: Prior,
        weights: Weights = "raw",
        path: FlowPath | None = None,
    ):
        self.config, self.weights = config, weights
        self.modalities, self.tasks, self.prior = dict(modalities), dict(tasks), prior
        self.path = path or build_path(config.flow)

    @classmethod
    def build(
        cls,
        config: Config,
        corpora: Mapping[str, Iterable[Any]] | None = None,
        trust_remote_code: bool = False,
    ) -> UnifiedPipeline:
        """A new model with random weights; `corpora` is modality -> items to fit tokenizers on."""
        return cls.build_from(resolve_model(config, trust_remote_code), config, corpora)

    @classmethod
    def build_from(
        cls, plugins: Plugins, config: Config, corpora: Mapping[str, Iterable[Any]] | None = None
    ) -> UnifiedPipeline:
        """`build`, with the plugins that `config` names."""
        modalities = {
            name: plugin.build(options, (corpora or {}).get(name))
            for name, (plugin, options) in plugins.modalities.items()
        }
        prior = Prior(config.prior, {name: m.channels for name, m in modalities.items()})
        return cls(config, modalities, plugins.tasks, prior, path=plugins.path)

    @property
    def plugins(self) -> Plugins:
        """What the model is made of."""
        modalities = {n: (type(m), m.config) for n, m in self.modalities.items()}
        return Plugins(modalities, self.tasks, self.path)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Part -> module, under the names of the folders: ``text_vae``, ..., ``prior``."""
        parts: dict[str, nn.Module] = {f"{n}_vae": m for n, m in self.modalities.items()}
        return {**parts, "prior": self.prior}

    def __repr__(self) -> str:
        """What the model is: its parts and sizes, its tasks, and what each needs and makes."""
        device = next(self.prior.parameters()).device
        lines = [f"{type(self).__name__} on {device}, weights: {self.weights}"]
        for name, module in self.modules.items():
            count = sum(p.numel() for p in module.parameters())
            lines.append(f"  {name:12} {count:>13,} parameters")
        for name, task in self.tasks.items():
            given = ", ".join(s.name or s.kind for s in task.given)
            made = task.layout[task.generates]
            lines.append(f"  {name}: {given} -> {made.name or made.kind} ({made.modality})")
        return "\n".join(lines)

    def to(self, device: torch.device | str) -> UnifiedPipeline:
        """Move every part to `device`."""
        for module in self.modules.values():
            module.to(device)
        return self

    # ---- generation ----------------------------------------------------------------------------

    def generate(
        self,
        task: str,
        given: Sequence[Mapping[str, Any]],
        size: Any = None,
        seed: Seed = None,
        generator: torch.Generator | None = None,
        **settings: Any,
    ) -> list[Any]:
        """One item per entry of `given` (items by the name or the letter of a segment), by any task
        of this model.

        `size` is in the target modality's own unit. Output i depends on its seed alone, not on
        its batch: `seed` is one number, from which each output derives its own, or a list of one
        per output; a `generator` draws them; without either they differ from call to call. The
        `settings` are those of `GenerationConfig` (`num_steps`, `guidance_scale`, `temperature`,
        ...) and default to the configuration's `generation`. ValueError for a task or a segment
        that the model does not have, for settings that do not exist or make no sense, and for input
        that cannot be represented.
        """
        made: dict[int, Any] = {}
        for items in self.stream(task, given, size, seed, generator, **settings):
            made |= items
        return [made[index] for index in range(len(given))]

    def stream(
        self,
        task: str,
        given: Sequence[Mapping[str, Any]],
        size: Any = None,
        seed: Seed = None,
        generator: torch.Generator | None = None,
        **settings: Any,
    ) -> Iterator[dict[int, Any]]:
        """As `generate`, yielding after every block ``{index: its item so far}``."""
        runner, chosen, seeds = self._runner(task, len(given), seed, generator, settings)
        return runner.stream(self._wishes(runner, given, size, settings), chosen, seeds)

    # names that people know, for tasks that come along
    continue_text = shortcuts.continue_text
    caption = shortcuts.caption
    text_to_image = shortcuts.text_to_image

    # ---- likelihood ----------------------------------------------------------------------------

    def score(
        self,
        responses: Sequence[str],
        prompts: Sequence[str] | None = None,
        num_samples: int = 8,
        estimator: str = "elbo",
        seed: int = 0,
        ends: bool = True,
        task: str | None = None,
        **density: Any,
    ) -> list[Score]:
        """How likely each text of `responses` is, after its prompt if there are prompts.

        A response `ends` where it ends: its end mark is scored too. `task` is one that goes on with
        a text, by default the model's only one, or ``continuation``. `density` holds settings of
        `DensityConfig`. See `unified.likelihood.score`.
        """
        scorer = self.scorer(task, **density)
        modality = scorer.modality
        given = [None] * len(responses) if prompts is None else list(shortcuts.texts(prompts))
        if len(given) != len(responses):
            raise ValueError(f"{len(given)} prompts for {len(responses)} responses; give one each")
        return [
            score(
                scorer,
                None if prompt is None else modality.beginning(prompt),
                modality.beginning(response),
                num_samples,
                estimator,  # type: ignore[arg-type]
                seed,
                ends,
            )
            for prompt, response in zip(given, shortcuts.texts(responses), strict=True)
        ]

    def scorer(self, task: str | None = None, **density: Any) -> Scorer:
        """Densities of texts under a task that goes on with them; see `score`."""
        chosen = self.task(task or shortcuts.scored_task(self))
        layout = chosen.layout
        target = layout[chosen.generates]
        modality = self.modalities[target.modality]
        config = validated(DensityConfig, density)
        return Scorer(self.prior, modality, layout, target.kind, config)

    def _runner(
        self,
        task: str,
        count: int,
        seed: Seed,
        generator: torch.Generator | None,
        settings: Mapping[str, Any],
    ) -> tuple[Inference, GenerationConfig, Seed]:
        self.task(task)
        if seed is not None and generator is not None:
            raise ValueError("give a seed or a generator, not both")
        if generator is not None:
            seed = torch.randint(1 << 62, (count,), generator=generator).tolist()
        given = {key: value for key, value in settings.items() if value is not None}
        chosen = validated(GenerationConfig, self.config.generation.model_dump() | given)
        runner = Inference(self.modalities, self.tasks, self.prior, task, self.path)
        return runner, chosen, seed

    def task(self, name: str) -> Task:
        """The task of that name. ValueError if this model has none."""
        if name not in self.tasks:
            raise ValueError(f"this model has no task {name!r}; it has {', '.join(self.tasks)}")
        return self.tasks[name]

    def new_tokens(self, asked: int | None = None) -> int:
        """The most tokens that a text gets: what is asked for, or what the configuration says."""
        return self.config.generation.max_new_tokens if asked is None else asked

    def usual_size(self, task: str) -> int | None:
        """The size for which a person need not be asked: `new_tokens` of a text made of blocks, and
        of anything else the modality's own (None)."""
        chosen = self.task(task)
        target = chosen.layout[chosen.generates]
        text = self.modalities[target.modality].is_text and target.block is not None
        return self.new_tokens() if text else None

    def _wishes(
        self,
        runner: Inference,
        given: Sequence[Mapping[str, Any]],
        size: Any,
        settings: Mapping[str, Any],
    ) -> list[Wish]:
        """Names as letters, and the `max_new_tokens` that a call gives for a target made of blocks
        as its size."""
        tokens = settings.get("max_new_tokens")
        if tokens is not None and (size is not None or runner.target.block is None):
            raise ValueError(
                f"max_new_tokens {tokens} is the size of a text that has no other size"
            )
        size = tokens if size is None else size
        return [Wish(by_kind(runner.layout, items), size) for items in given]

    # ---- folders -------------------------------------------------------------------------------

    def save_pretrained(self, folder: Path | str) -> None:
        """Write the model to `folder`: all of it, or nothing.

        An existing pipeline there is replaced; ValueError for a folder that holds anything else.
        """
        folder = Path(folder)
        if folder.exists() and not (folder / INDEX).is_file() and any(folder.iterdir()):
            raise ValueError(f"{folder} holds other files and no pipeline; give a new folder")
        with written_whole(folder) as partial:
            for name, modality in self.modalities.items():
                modality.save_pretrained(partial, name)
            self._save_prior(partial / "prior")
            index = {
                "_class_name": type(self).__name__,
                "_unified_version": version("unified-latents"),
                "weights": self.weights,
                **self.config.model_dump(mode="json", exclude=OF_THE_RUN),
            }
            write_json(partial / INDEX, index)

    def _save_prior(self, folder: Path) -> None:
        folder.mkdir()
        config = {**self.prior.config.model_dump(mode="json"), "channels": self.prior.channels}
        write_json(folder / "config.json", config)
        save_weights(self.prior, folder)

    @classmethod
    def from_pretrained(
        cls,
        name: Path | str,
        trust_remote_code: bool = False,
        device: torch.device | str | None = None,
    ) -> UnifiedPipeline:
        """Read a pipeline folder, or download one by its hub id (``owner/name``).

        ValueError, naming file and tensor, for weights that are missing, unknown or of another
        shape, and for plugins given as paths to code without `trust_remote_code`.
        """
        folder, config, _ = read_index(name)
        config = config.model_copy(update={"prior": prior_settings(folder / "prior")[0]})
        plugins = resolve_model(config, trust_remote_code, str(folder / INDEX))
        return cls.read_from(plugins, config, folder, device)

    @classmethod
    def read_from(
        cls,
        plugins: Plugins,
        config: Config,
        folder: Path,
        device: torch.device | str | None = None,
    ) -> UnifiedPipeline:
        """`from_pretrained`, of a local folder whose plugins these are; `config` is what the
        pipeline says of itself."""
        prior = read_prior(folder / "prior")
        modalities = {n: p.from_pretrained(folder, n) for n, (p, _) in plugins.modalities.items()}
        check_channels(prior, modalities, folder)
        weights = read_json(folder / INDEX).get("weights", "raw")
        pipeline = cls(config, modalities, plugins.tasks, prior, weights, plugins.path)
        return pipeline if device is None else pipeline.to(device)

    def push_to_hub(self, repo_id: str, private: bool | None = None) -> str:
        """Upload the pipeline folder to the Hugging Face hub; returns its address."""
        from tempfile import TemporaryDirectory

        from huggingface_hub import HfApi

        api = HfApi()
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with TemporaryDirectory() as parent:
            folder = Path(parent) / "pipeline"
            self.save_pretrained(folder)
            return str(api.upload_folder(repo_id=repo, folder_path=folder))


def by_kind(layout: Layout, items: Mapping[str, Any]) -> dict[str, Any]:
    """`items` by the letters of their segments. ValueError for one that is given twice, or for what
    is no segment."""
    found: dict[str, Any] = {}
    for word, item in items.items():
        kind = layout.find(word).kind
        if kind in found:
            raise ValueError(f"segment {kind} is given twice, the second time as {word}")
        found[kind] = item
    return found


def find_folder(name: Path | str) -> Path:
    """The pipeline folder `name`, downloaded first if it is no local folder but a hub id."""
    if (Path(name) / INDEX).is_file():
        return Path(name)
    if Path(name).exists() or str(name).count("/") != 1 or str(name)[0] in "./~":
        raise ValueError(f"{name} is neither a pipeline folder (with {INDEX}) nor a hub id")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.txt"]
    try:
        return Path(snapshot_download(str(name), allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name} is no local folder, and downloading it from the hub failed: {error}"
        ) from error


def read_index(name: Path | str) -> tuple[Path, Config, Weights]:
    """(folder, what the model is, its weights' kind) of a pipeline, without reading its weights;
    the configuration says nothing of the prior."""
    folder = find_folder(name)
    index = read_json(folder / INDEX)
    weights = index.pop("weights", "raw")
    described = {key: value for key, value in index.items() if not key.startswith("_")}
    return folder, validated(Config, described, origin=str(folder / INDEX)), weights


def read_prior(folder: Path) -> Prior:
    """The prior in its part folder."""
    prior = Prior(*prior_settings(folder))
    load_weights(prior, folder)
    return prior


def prior_settings(folder: Path) -> tuple[PriorConfig, dict[str, int]]:
    """The prior's configuration, and modality -> width of its latents."""
    fields = read_json(folder / "config.json")
    channels = fields.pop("channels", {})
    return validated(PriorConfig, fields, origin=str(folder / "config.json")), channels


def check_channels(prior: Prior, modalities: Mapping[str, Modality], folder: Path) -> None:
    """ValueError if the prior was made for latents of other widths."""
    widths = {name: m.channels for name, m in modalities.items()}
    if widths != prior.channels:
        raise ValueError(f"the prior in {folder} has channels {prior.channels}, not {widths}")


def read_json(path: Path) -> dict[str, Any]:
    """The object in the file `path`; ValueError if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} should hold an object, found {type(found).__name__}")
    return found


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` as indented JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
