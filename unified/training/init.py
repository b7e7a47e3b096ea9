"""Starting from parts of another model.

``init.NAME_vae`` and ``init.prior`` name a pipeline folder, or the folder of just that part. A part
is read as its own plugin reads it, with its statistics and, from a pipeline, with the files beside
it (a tokenizer, without which the embeddings of a text VAE mean nothing). Then its tensors are
copied by name. The sizes are the configuration's: a tensor of another shape is an error, tensors
that only one side has are reported.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from unified.latents.modality import Modality
from unified.latents.weights import check_shapes, named_tensors
from unified.pipeline import INDEX, UnifiedPipeline, read_prior

#: the suffix of a modality's part
VAE = "_vae"


@dataclass(frozen=True)
class LoadReport:
    """What became of the tensors of one part: `new` ones kept their random values, `unused` ones
    have no place here; `files` were taken along."""

    origin: str
    loaded: list[str]
    new: list[str]
    unused: list[str]
    files: list[str]

    def __str__(self) -> str:
        counts = f"{len(self.loaded)} loaded, {len(self.new)} new, {len(self.unused)} unused"
        names = [f"new: {n}" for n in self.new[:3]] + [f"unused: {n}" for n in self.unused[:3]]
        return f"{self.origin}: {counts} tensors" + (f" ({', '.join(names)})" if names else "")


def initialise(pipeline: UnifiedPipeline) -> dict[str, LoadReport]:
    """Load the parts that ``pipeline.config.init`` names, in place; part -> report.

    ValueError for a part that the model does not have or that cannot be read, for a tensor of
    another shape, and for a source none of whose tensors fit.
    """
    reports = {}
    for part, origin in pipeline.config.init.items():
        if part not in pipeline.modules:
            raise ValueError(
                f"init.{part} is given, but the model has no {part}; it has"
                f" {', '.join(pipeline.modules)}"
            )
        load = _load_prior if part == "prior" else _load_modality
        reports[part] = load(pipeline, part, Path(origin).expanduser())
    return reports


def as_json(reports: dict[str, LoadReport]) -> dict[str, dict[str, object]]:
    """The reports as plain values."""
    return {part: asdict(report) for part, report in reports.items()}


def part_folder(origin: Path, part: str) -> Path:
    """The folder of `part` in the pipeline `origin`, or `origin` itself if it is a part."""
    folder = origin / part if (origin / INDEX).is_file() else origin
    if not (folder / "config.json").is_file():
        raise ValueError(f"init.{part}: {folder} is no folder of a {part} (with config.json)")
    return folder


@torch.no_grad()
def transfer(target: nn.Module, source: nn.Module, origin: Path, files: list[str]) -> LoadReport:
    """Copy the tensors that both modules have, by name."""
    ours, theirs = named_tensors(target), named_tensors(source)
    check_shapes(ours, theirs, origin)
    loaded = [name for name in ours if name in theirs]
    if not loaded:
        raise ValueError(f"{origin} has no tensor that fits, e.g. {next(iter(ours), 'none')}")
    for name in loaded:
        ours[name].copy_(theirs[name])
    new = [name for name in ours if name not in theirs]
    unused = [name for name in theirs if name not in ours]
    return LoadReport(str(origin), loaded, new, unused, files)


def _load_prior(pipeline: UnifiedPipeline, part: str, origin: Path) -> LoadReport:
    folder = part_folder(origin, part)
    return transfer(pipeline.prior, read_prior(folder), folder, [])


def _load_modality(pipeline: UnifiedPipeline, part: str, origin: Path) -> LoadReport:
    """Both sides go through files, which is where a modality keeps what is not a tensor."""
    name, folder = part.removesuffix(VAE), part_folder(origin, part)
    built = pipeline.modalities[name]
    with TemporaryDirectory() as root:
        ours, theirs = Path(root) / "ours", Path(root) / "theirs"
        ours.mkdir()
        built.save_pretrained(ours, name)
        files = _take_along(ours, part, origin) if folder != origin else []
        shutil.copytree(ours, theirs)
        shutil.rmtree(theirs / part)
        shutil.copytree(folder, theirs / part)
        target: Modality = type(built).from_pretrained(ours, name)
        report = transfer(target, type(built).from_pretrained(theirs, name), folder, files)
    pipeline.modalities[name] = target
    return report


def _take_along(ours: Path, part: str, origin: Path) -> list[str]:
    """Replace what a modality keeps outside its part folder by the files of `origin`."""
    kept = [p.relative_to(ours) for p in sorted(ours.rglob("*")) if p.is_file()]
    taken = [p for p in kept if p.parts[0] != part and (origin / p).is_file()]
    for path in taken:
        shutil.copyfile(origin / path, ours / path)
    return [str(path) for path in taken]
