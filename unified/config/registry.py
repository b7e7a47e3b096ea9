"""Names to classes: how the core finds plugins without importing them.

A configuration or a checkpoint names a plugin by a short name. The names are a literal table plus
the entry points of installed packages (groups ``unified.modalities`` and ``unified.tasks``);
nothing is registered by importing something. A dotted path ``"package.module:attribute"`` runs
code that the writer of the file chose, so it is honoured only with ``trust_remote_code=True``.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Literal

from unified.errors import did_you_mean

Group = Literal["modality", "task"]

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
}
ENTRY_POINTS = {"modality": "unified.modalities", "task": "unified.tasks"}


def names(group: Group) -> dict[str, str]:
    """Short name -> dotted path. A shipped name cannot be taken over by an installed package."""
    installed = {e.name: e.value for e in entry_points(group=ENTRY_POINTS[group])}
    return installed | SHIPPED[group]


def resolve(group: Group, name: str, trust_remote_code: bool = False) -> type:
    """The class that `name` stands for: a short name, or a dotted path where those are trusted.

    ValueError for an unknown name, for a dotted path without `trust_remote_code`, and for a path
    that leads to no plugin class.
    """
    if ":" not in name:
        known = names(group)
        if name not in known:
            raise ValueError(f"unknown {group} {name!r}; {did_you_mean(name, known)}")
        return _plugin_class(group, known[name], _follow(group, known[name]))
    return _plugin_class(group, name, trusted(group, name, trust_remote_code))


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


def _plugin_class(group: Group, path: str, found: Any) -> type:
    if not isinstance(found, type) or not hasattr(found, "Config"):
        raise ValueError(f"the {group} {path!r} should be a class with a Config, found {found!r}")
    return found
