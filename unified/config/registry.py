"""Names to classes: how the core finds plugins without importing them.

A configuration or a checkpoint names a plugin by a short name. The names are a literal table plus
the entry points of installed packages (groups ``unified.modalities``, ``unified.tasks`` and so on);
nothing is registered by importing something. A dotted path ``"package.module:attribute"`` runs
code that the writer of the file chose, so it is honoured only with ``trust_remote_code=True``.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Literal, NamedTuple

from unified.errors import did_you_mean

Group = Literal["modality", "task", "path", "optimizer"]

SHIPPED: dict[str, dict[str, str]] = {
    "modality": {
        "text": "unified.modalities.text.modality:TextModality",
        "image": "unified.modalities.image.modality:ImageModality",
    },
    "task": {
        "continuation": "unified.tasks.continuation:Continuation",
        "captioning": "unified.tasks.captioning:Captioning",
        "text_to_image": "unified.tasks.text_to_image:TextToImage",
        "editing": "unified.tasks.editing:Editing",
    },
    "path": {
        "straight": "unified.flow.path:Straight",
        "cosine": "unified.flow.path:Cosine",
    },
    "optimizer": {
        "adamw": "unified.training.optim:adamw",
        "muon": "unified.training.optim:Muon",
        "adafactor": "torch.optim:Adafactor",
    },
}


class Kind(NamedTuple):
    """What the names of a group lead to: the group of entry points that adds some, what a thing of
    this kind is in words, and whether something is one."""

    entry_points: str
    what: str
    is_one: Callable[[Any], bool]


def _configurable(found: Any) -> bool:
    return isinstance(found, type) and hasattr(found, "Config")


def _path(found: Any) -> bool:
    return isinstance(found, type) and hasattr(found, "coefficients")


KINDS: dict[str, Kind] = {
    "modality": Kind("unified.modalities", "a class with a Config", _configurable),
    "task": Kind("unified.tasks", "a class with a Config", _configurable),
    "path": Kind("unified.paths", "a class derived from unified.flow.path:Path", _path),
    "optimizer": Kind("unified.optimizers", "a class or function that makes one", callable),
}


def names(group: Group) -> dict[str, str]:
    """Short name -> dotted path. A shipped name cannot be taken over by an installed package."""
    installed = {e.name: e.value for e in entry_points(group=KINDS[group].entry_points)}
    return installed | SHIPPED[group]


def resolve(group: Group, name: str, trust_remote_code: bool = False) -> Any:
    """What `name` stands for: a short name, or a dotted path where those are trusted.

    ValueError for an unknown name, for a dotted path without `trust_remote_code`, and for a path
    that leads to nothing of the group's kind.
    """
    if ":" not in name:
        known = names(group)
        if name not in known:
            raise ValueError(f"unknown {group} {name!r}; {did_you_mean(name, known)}")
        return _checked(group, known[name], _follow(group, known[name]))
    return _checked(group, name, trusted(group, name, trust_remote_code))


def trusted(what: str, path: str, trust_remote_code: bool) -> Any:
    """What ``"package.module:attribute"`` leads to, where paths to code are trusted.

    ValueError, which calls it a `what`, where they are not and for a path that leads nowhere.
    """
    if ":" not in path:
        raise ValueError(f"the {what} {path!r} should be a path to code: package.module:attribute")
    if not trust_remote_code:
        raise ValueError(
            f"the {what} {path!r} is a path to code, which runs only with trust_remote_code=True"
            " (--trust-remote-code): pass it if you trust whoever wrote that code"
        )
    return _follow(what, path)


def _follow(what: str, path: str) -> Any:
    module, _, attribute = path.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module exists, but something that it imports does not
        raise ValueError(f"the {what} {path!r} names a module that cannot be found") from None
    except AttributeError:
        raise ValueError(f"the {what} {path!r}: {module} has no {attribute!r}") from None


def _checked(group: Group, path: str, found: Any) -> Any:
    if not KINDS[group].is_one(found):
        raise ValueError(f"the {group} {path!r} should be {KINDS[group].what}, found {found!r}")
    return found
