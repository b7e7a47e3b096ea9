"""Reading and writing configurations: YAML, ``extends:``, dotted overrides.

    extends: quickstart.yaml         # beside this file, or among the shipped ones
    training: {save_every: 100}      # mappings are merged, lists and values replaced
    tasks: {captioning: null}        # null takes out a task, a modality or a data source

An override sets one key: ``training.precision=fp32``, ``stages.0.steps=10``, or by the stage's
name ``stages.text_vae.steps=10``. Values are YAML, except that 3e-4 is a number (YAML 1.1 wants
3.0e-4) and a key written twice is an error. Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from unified.config.schema import Config
from unified.errors import Keys, did_you_mean, validated

Tree = dict[str, Any]
#: which file or override wrote a key
Origins = dict[Keys, str]
#: mappings from names of the user's own, whose entries null takes out
_REMOVABLE = (("modalities",), ("tasks",), ("data", "sources"))


def load_config(source: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration at the path `source`, or the shipped one of that name.

    FileNotFoundError if there is neither; ValueError names the file and the key that is wrong.
    """
    path = find_config(source)
    tree, origins = _inherit(path, ())
    for override in overrides:
        keys = _override(tree, override)
        origins = {k: who for k, who in origins.items() if k[: len(keys)] != keys}
        origins[keys] = f"the override {override}"
    _remove_nulls(tree)
    return validated(Config, tree, origin=lambda keys: _origin(origins, keys, str(path)))


def parse_settings(settings: Sequence[str]) -> Tree:
    """``key=value`` pairs as a mapping; values are YAML."""
    tree: Tree = {}
    for setting in settings:
        _override(tree, setting)
    return tree


def dump_config(config: Config) -> str:
    """The configuration as YAML that `load_config` reads back to an equal one."""
    tree = config.model_dump(mode="json")
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def save_config(config: Config, path: str | Path) -> None:
    Path(path).write_text(dump_config(config), encoding="utf-8")


def find_config(name: str | Path, beside: Path = Path()) -> Path:
    """The file `name`, relative to `beside`, or the shipped one; ``.yaml`` may be left out."""
    written = Path(name).expanduser()
    for folder in (beside, shipped()):
        for path in (folder / written, folder / f"{written}.yaml"):
            if path.is_file():
                return path
    near = did_you_mean(written.stem, (p.stem for p in shipped().glob("*.yaml")))
    raise FileNotFoundError(
        f"no configuration {str(name)!r}: neither a file in {beside.absolute()} nor shipped; {near}"
    )


def shipped() -> Path:
    """The folder of the shipped configurations."""
    return Path(str(files("unified.configs")))


# ---- inheritance -------------------------------------------------------------------------------


def _inherit(path: Path, chain: tuple[Path, ...]) -> tuple[Tree, Origins]:
    """The tree of a file merged over those it extends, and who wrote each key."""
    chain = (*chain, path.resolve())
    if chain[-1] in chain[:-1]:
        raise ValueError(f"extends goes in a circle: {' -> '.join(p.name for p in chain)}")
    tree = _read(path)
    parent = tree.pop("extends", None)
    origins = dict.fromkeys(_paths(tree), str(path))
    if parent is None:
        return tree, origins
    if not isinstance(parent, str):
        raise ValueError(f"{path}: extends is {parent!r} but should be the name of one file")
    base, inherited = _inherit(find_config(parent, path.parent), chain)
    return merge(base, tree), inherited | origins


def merge(base: Tree, over: Tree) -> Tree:
    """`over` laid over `base`: mappings are merged key by key, all else is replaced."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        both = isinstance(below, dict) and isinstance(value, dict)
        merged[key] = merge(below, value) if both else value  # type: ignore[arg-type]
    return merged


def _remove_nulls(tree: Tree) -> None:
    for path in _REMOVABLE:
        node: Any = tree
        for key in path:
            node = node.get(key) if isinstance(node, dict) else None
        if isinstance(node, dict):
            for name in [n for n, value in node.items() if value is None]:
                del node[name]


def _paths(node: Any, at: Keys = ()) -> Iterator[Keys]:
    yield at
    children = dict(enumerate(node)) if isinstance(node, list) else node
    for key, value in children.items() if isinstance(children, dict) else ():
        yield from _paths(value, (*at, str(key)))


def _origin(origins: Origins, keys: Keys, default: str) -> str:
    """Who wrote `keys`, or the nearest key above it."""
    known = (origins[keys[:n]] for n in range(len(keys), 0, -1) if keys[:n] in origins)
    return next(known, default)


# ---- overrides ---------------------------------------------------------------------------------


def _override(tree: Tree, override: str) -> Keys:
    """Set ``key=value`` in `tree`; returns the keys, with a stage's name as its index."""
    dotted, equals, text = override.partition("=")
    if not (dotted.strip() and equals):
        raise ValueError(f"an override should read key=value, found {override!r}")
    value = _parse(text, f"the override {override}")
    node: Any = tree
    keys: list[str] = []
    *parents, last = dotted.strip().split(".")
    for key in parents:
        index = _index(node, key, override)
        keys.append(str(index))
        if isinstance(node, dict) and node.get(key) is None:
            node[key] = {}
        node = node[index]
    index = _index(node, last, override)
    node[index] = value
    return (*keys, str(index))


def _index(node: Any, key: str, override: str) -> str | int:
    """`key` as an index into `node`: items of a list go by number or by their ``name``."""
    if isinstance(node, dict):
        return key
    if not isinstance(node, list):
        raise ValueError(f"{override}: {key!r} would be a key of {node!r}, which has no keys")
    named = {item.get("name"): i for i, item in enumerate(node) if isinstance(item, dict)}
    if key in named:
        return named[key]
    if key.isdecimal() and int(key) < len(node):
        return int(key)
    known = [*(n for n in named if isinstance(n, str)), *map(str, range(len(node)))]
    raise ValueError(f"{override}: no item {key!r}; {did_you_mean(key, known)}")


# ---- YAML --------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen and isinstance(key.value, str):
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value} is written twice", problem_mark=key.start_mark
                )
            seen |= {key.value} if isinstance(key.value, str) else set()
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes a string that `_Loader` would take for a number."""


for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )


def _read(path: Path) -> Tree:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} should be YAML in UTF-8, found other bytes") from None
    tree = _parse(text, str(path))
    if not isinstance(tree, dict):
        raise ValueError(f"{path} should hold a mapping of keys, found {tree!r:.60}")
    return tree


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{source}{line}: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{source}: {error}") from None
