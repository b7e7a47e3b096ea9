"""Tensors in folders: safetensors files that are written whole and read strictly.

A folder of weights is ``model.safetensors``, or above 5 GB its shards and their
``model.safetensors.index.json``. A folder is written beside its place and renamed into it, so that
a reader sees all of it or none of it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@contextmanager
def written_whole(folder: Path | str) -> Iterator[Path]:
    """A fresh folder to write into, which takes the place of `folder` when the body succeeds."""
    folder = Path(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    old = folder.with_name(f".{folder.name}.old")
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Replace the file at `path` in one step."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Replace the file at `path` in one step."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(data)
    os.replace(partial, path)


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Name -> parameter or saved buffer; a tensor that has several names goes by its first."""
    names: dict[int, str] = {}
    tensors = module.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), name)
    return {name: tensors[name].detach() for name in names.values()}


def save_weights(module: nn.Module, folder: Path) -> None:
    """Write the module's tensors into `folder`, in shards of at most 5 GB."""
    save_tensors(named_tensors(module), folder)


def save_tensors(
    tensors: Mapping[str, Tensor], folder: Path, max_shard_size: int | str = "5GB"
) -> None:
    """Write `tensors` into `folder`: one file, or shards and their index."""
    from huggingface_hub import save_torch_state_dict

    contiguous = {name: t.detach().contiguous() for name, t in tensors.items()}
    save_torch_state_dict(contiguous, folder, max_shard_size=max_shard_size)


def read_file(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, on the CPU. ValueError if it is missing or broken."""
    if not path.is_file():
        raise ValueError(f"there is no weights file {path}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder that `save_weights` wrote, sharded or not."""
    if not (folder / INDEX).is_file():
        return read_file(folder / FILE)
    tensors: dict[str, Tensor] = {}
    for name in shards(folder / INDEX):
        tensors |= read_file(folder / name)
    return tensors


def shards(index: Path) -> list[str]:
    """The files that an index names, which lie in its folder. ValueError for a broken index."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if not names or any(Path(name).name != name for name in names):
            raise ValueError("its weight_map should name files of its folder")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{index} is no index of shards: {error}") from None
    return sorted(names)


def check_names(target: Mapping[str, Tensor], found: Mapping[str, Tensor], origin: Path) -> None:
    """ValueError naming the first tensor that only one of the two has."""
    missing, extra = sorted(target.keys() - found.keys()), sorted(found.keys() - target.keys())
    if missing or extra:
        what = f"lacks tensor {missing[0]}" if missing else f"has tensor {extra[0]}, unknown here"
        more = len(missing) + len(extra) - 1
        raise ValueError(f"{origin} {what}" + (f" (and {more} more differ)" if more else ""))


def check_shapes(target: Mapping[str, Tensor], found: Mapping[str, Tensor], origin: Path) -> None:
    """ValueError naming the first tensor that both have, in different shapes."""
    for name in target.keys() & found.keys():
        if target[name].shape != found[name].shape:
            raise ValueError(
                f"tensor {name} in {origin} has shape {list(found[name].shape)}, but the model"
                f" needs {list(target[name].shape)}"
            )


@torch.no_grad()
def assign(target: Mapping[str, Tensor], found: Mapping[str, Tensor], origin: Path) -> None:
    """Copy `found` into `target`: the same names and shapes, or a ValueError and nothing copied."""
    check_shapes(target, found, origin)
    check_names(target, found, origin)
    for name, tensor in target.items():
        tensor.copy_(found[name])


def assign_new(module: nn.Module, found: Mapping[str, Tensor], origin: Path) -> None:
    """Give a module without storage (on the meta device) `found` as its tensors, strictly."""
    target = named_tensors(module)
    check_names(target, found, origin)
    check_shapes(target, found, origin)
    cast = {name: found[name].to(tensor.dtype) for name, tensor in target.items()}
    module.load_state_dict(cast, assign=True)


def load_weights(module: nn.Module, folder: Path) -> None:
    """Read what `save_weights` wrote. ValueError for a missing, extra or misshapen tensor."""
    assign(named_tensors(module), read_weights(folder), folder / FILE)
