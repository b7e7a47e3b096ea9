"""Which way dependencies point, and what no source file may do, read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from unified.config.registry import SHIPPED

ROOT = Path(__file__).parents[1]
PLUGINS = ("modalities", "tasks", "demos")

#: A room of the core imports from itself and from those above it in this list, never below.
ROOMS = [
    {"errors", "tables", "randomness"},
    {"config"},
    {"latents"},
    {"sequence"},
    {"flow"},
    {"model.kernels"},
    {"model"},
    {"generation"},
    {"likelihood"},
    {"data"},
    {"shortcuts"},
    {"pipeline"},
    {"runs"},
    {"training", "training.objectives"},
    {"evaluation", "evaluation.benchmarks"},
    {"cola", "planning", "data.tools"},
    {"commands"},
    {"cli"},
]


def sources() -> dict[str, ast.Module]:
    """Dotted name as installed -> syntax tree, for every source file."""
    found = {}
    for folder in ("unified", *PLUGINS):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts if folder == "unified" else ("unified", *parts)
            found[".".join(parts).removesuffix(".__init__")] = ast.parse(path.read_text())
    return found


SOURCES = sources()


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imported(tree: ast.Module) -> Iterator[str]:
    """Every module name that a file imports, also inside functions. What a type checker alone
    reads is no dependency."""
    types = {n for part in ast.walk(tree) if is_for_types(part) for n in ast.walk(part)}
    for node in ast.walk(tree):
        if node in types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute, so that this test can read them"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part(module: str, depth: int = 1) -> str:
    """``unified.data.shards`` -> ``data``; with depth 2, ``unified.tasks.captioning`` ->
    ``tasks.captioning``."""
    return ".".join(module.split(".")[1 : 1 + depth])


def edges() -> Iterator[tuple[str, str]]:
    for module, tree in SOURCES.items():
        for target in imported(tree):
            if target.startswith("unified."):
                yield module, target


def test_the_sources_are_found():
    tops = {part(module) for module in SOURCES}
    assert {"sequence", "tasks", "modalities"} <= tops
    assert ("unified.tasks.captioning", "unified.sequence.task") in set(edges())


def test_the_core_imports_no_plugin():
    wrong = [e for e in edges() if part(e[0]) not in PLUGINS and part(e[1]) in PLUGINS]
    assert not wrong


@pytest.mark.parametrize("plugin", ["modalities", "tasks"])
def test_plugins_import_neither_demos_nor_each_other(plugin):
    others = set(PLUGINS) - {plugin}
    assert not [e for e in edges() if part(e[0]) == plugin and part(e[1]) in others]


def test_one_modality_does_not_import_another():
    inside = [e for e in edges() if part(e[0]) == part(e[1]) == "modalities"]
    assert not [e for e in inside if part(e[0], 2) != part(e[1], 2)]


def room(module: str) -> str:
    """The package a module lies in, or the file that stands alone: ``unified.data.tools.pack`` ->
    ``data.tools``."""
    known = set().union(*ROOMS)
    names = [part(module, depth) for depth in (2, 1)]
    found = next((name for name in names if name in known), None)
    assert found, f"{module} has no place in ROOMS: give it one"
    return found


def test_the_core_is_layered():
    floor = {name: number for number, names in enumerate(ROOMS) for name in names}
    core = [(m, t) for m, t in edges() if part(m) not in (*PLUGINS, "configs", "") and t in SOURCES]
    wrong = [(m, t) for m, t in core if floor[room(m)] < floor[room(t)]]
    assert not wrong


#: names that stand for the same thing wherever they are: a plugin's own modality and autoencoder
SAME_MEANING = {"__init__", "modality", "vae"}
#: names that are used twice, until one of them is given up
TWICE = {"Plan", "Request", "Tally", "measures"}
#: how many files a package may have, and how many the root
MOST_FILES, MOST_AT_THE_ROOT = 17, 8


def framework() -> Iterator[tuple[Path, ast.Module]]:
    """Every file of the framework proper, without demonstrations."""
    for folder in ("unified", "modalities", "tasks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path, ast.parse(path.read_text())


def repeated(places: Iterable[tuple[str, object]]) -> dict[str, list[str]]:
    """Name -> where it occurs, of those that occur more than once."""
    found: dict[str, list[str]] = {}
    for name, place in places:
        found.setdefault(name, []).append(str(place))
    return {name: many for name, many in found.items() if len(many) > 1 and name not in TWICE}


def test_a_public_class_name_means_one_thing():
    classes = (
        (node.name, path.relative_to(ROOT))
        for path, tree in framework()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert not repeated(classes)


def test_a_file_name_means_one_thing():
    files = ((path.stem, path) for path, _ in framework() if path.stem not in SAME_MEANING)
    assert not repeated(files)


def test_packages_are_small():
    sizes = Counter(path.parent for path, _ in framework())
    assert sizes[ROOT / "unified"] <= MOST_AT_THE_ROOT
    assert not {str(p): n for p, n in sizes.items() if n > MOST_FILES and p.name != "training"}


def docstrings(tree: ast.Module) -> set[int]:
    """The ids of all string constants that stand alone: docstrings."""
    return {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}


@pytest.mark.parametrize("module", SOURCES)
def test_no_device_is_spelt_out(module):
    tree = SOURCES[module]
    prose = docstrings(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            assert "cuda" not in node.value.lower(), f"line {node.lineno}"
        if isinstance(node, ast.Attribute):
            assert node.attr != "cuda", f"line {node.lineno}"


#: where the shipped modalities and tasks may be named: the official format, the table of short
#: names, and the shortcuts
NAMING = ("unified.cola", "unified.config.registry", "unified.shortcuts")


def test_no_modality_and_no_task_is_named_in_the_core():
    plugins = {"text", "image", "continuation", "captioning", "text_to_image", "editing"}
    assert plugins == {name for group in ("modality", "task") for name in SHIPPED[group]}
    named = {}
    for module, tree in SOURCES.items():
        prose = docstrings(tree)
        strings = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in prose]
        core = part(module) not in PLUGINS and not module.startswith(NAMING)
        found = {n.lineno: n.value for n in strings if n.value in plugins} if core else {}
        named |= {module: found} if found else {}
    assert not named


@pytest.mark.parametrize("module", SOURCES)
def test_nothing_is_unpickled(module):
    tree = SOURCES[module]
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve"}
    assert not forbidden & {name.partition(".")[0] for name in imported(tree)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert given.get("weights_only") == "True", f"line {node.lineno}"
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("np.load", "numpy.load"):
            assert "allow_pickle" not in {k.arg for k in node.keywords}, f"line {node.lineno}"


@pytest.mark.parametrize(
    "module", ["unified", "unified.config.schema", "unified.config.plugins", "unified.cli"]
)
def test_light_modules_need_no_torch(module):
    code = (
        f"import sys, {module}; heavy = {{'torch', 'diffusers', 'transformers'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", f"{code}; assert not heavy, heavy"], check=True)
