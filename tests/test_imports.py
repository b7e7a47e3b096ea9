"""Which way dependencies point, and what no source file may do, read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLUGINS = ("modalities", "tasks", "demos")

#: A module of the core imports from its own layer and those above it in this list, never below.
LAYERS = [
    {"errors", "units"},
    {"visibility", "registry", "config", "configuring", "randomness"},
    {"precision", "weights", "linear", "graphs"},
    {"tiles"},
    {"modality", "critic"},
    {"sequence", "flow", "solvers", "sampler", "layers", "attention", "task", "plugins"},
    {"cache", "prior"},
    {"guidance"},
    {"generate", "likelihood", "data"},
    {"training", "evaluation", "inference", "pipeline"},
    {"official"},
    {"planning", "show"},
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


def imported(tree: ast.Module) -> Iterator[str]:
    """Every module name that a file imports, also inside functions and for types."""
    for node in ast.walk(tree):
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
    assert {"visibility", "tasks", "modalities"} <= tops
    assert ("unified.tasks.captioning", "unified.task") in set(edges())


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


def layer(module: str) -> int:
    for number, names in enumerate(LAYERS):
        if part(module) in names:
            return number
    raise AssertionError(f"{module} has no place in LAYERS: give it one")


def test_the_core_is_layered():
    core = [m for m in SOURCES if part(m) not in PLUGINS and part(m) not in ("", "configs")]
    wrong = [
        (module, target)
        for module, target in edges()
        if module in core and part(target) in set().union(*LAYERS) and layer(module) < layer(target)
    ]
    assert not wrong
    assert all(layer(module) >= 0 for module in core)


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


@pytest.mark.parametrize("module", ["unified", "unified.config", "unified.plugins", "unified.cli"])
def test_light_modules_need_no_torch(module):
    code = (
        f"import sys, {module}; heavy = {{'torch', 'diffusers', 'transformers'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", f"{code}; assert not heavy, heavy"], check=True)
