"""What is installed: a wheel away from the checkout, and a type checker that sees every package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).parents[1]
SETUP = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
FOLDERS = ("unified", *SETUP["package-dir"].values())


def run(*command: str | Path, **options) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


# ---- the wheel -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder that a wheel of this checkout is installed into, without its dependencies."""
    pytest.importorskip("setuptools", "77", reason="building a wheel needs setuptools 77")
    tmp = tmp_path_factory.mktemp("wheel")
    source = tmp / "source"  # a copy: a build leaves files behind, and old ones would be packed
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder)
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")
    alone = ("--no-deps", "--no-index")
    run(*pip, "wheel", *alone, "--no-build-isolation", "-w", tmp, source)
    (wheel,) = tmp.glob("*.whl")
    run(*pip, "install", *alone, "--target", tmp / "site", wheel)
    return tmp / "site"


def installed(site: Path, *command: str | Path) -> str:
    """The output of a command that imports `unified` from `site`, run beside it."""
    return run(*command, cwd=site.parent, env=os.environ | {"PYTHONPATH": str(site)})


def test_the_wheel_holds_every_module_and_data_file(site):
    for folder in FOLDERS:
        target = site / "unified" / ("" if folder == "unified" else folder)
        wanted = [p for p in (ROOT / folder).rglob("*") if p.suffix != ".pyc" and p.is_file()]
        missing = [p for p in wanted if not (target / p.relative_to(ROOT / folder)).is_file()]
        assert not missing


def test_the_wheel_carries_its_licence(site):
    licences = {p.name for p in site.glob("unified_latents-*.dist-info/licenses/**/*")}
    assert {"LICENSE", "NOTICE.md"} <= licences


def test_python_finds_the_installed_packages(site):
    modules = ["unified.tasks.captioning", "unified.configs", "unified.config.loading"]
    code = f"import {', '.join(modules)}; print(*[{', '.join(f'{m}.__file__' for m in modules)}])"
    assert all(str(site) in path for path in installed(site, sys.executable, "-c", code).split())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--help",), "generate"),
        (("show", "task", "captioning"), "P # # # #"),
    ],
)
def test_the_installed_command_works(site, arguments, says):
    assert says in installed(site, site / "bin" / "unified", *arguments)


@pytest.mark.slow
def test_the_installed_command_trains_on_the_data_that_it_brings(site):
    """The shipped quickstart, all its stages, with tiny networks and one step each."""
    text = {**tiny.TEXT, "max_tokens": 4096}  # few tokens to spell with, so long passages
    parts = {"modalities": {"text": text, "image": tiny.IMAGE}, "prior": tiny.PRIOR}
    parts["training"] = {"max_steps": 1, "precision": "fp32", "trackers": []}
    parts["training"] |= {"validation_examples": 4}
    overrides = [f"{key}={json.dumps(value)}" for key, value in parts.items()]
    command = (site / "bin" / "unified", "train", "quickstart", "run.dir=trained", *overrides)
    assert installed(site, *command).strip() == str(Path("trained", "final"))
    assert (site.parent / "trained" / "final" / "model_index.json").is_file()
    asked = ("--checkpoint", "trained/final", "--prompt", "a flat emoji of a lime", "--steps", "2")
    picture = ("generate", "text_to_image", *asked, "--output", "lime.png")
    assert installed(site, site / "bin" / "unified", *picture) == "lime.png\n"


# ---- types ---------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_the_type_checker_sees_every_package(tmp_path):
    """An error planted in each package is found in the tree that ``make types`` checks."""
    pytest.importorskip("mypy")
    stage = tmp_path / "stage"
    run("make", "-s", "stage", f"STAGE={stage}", cwd=ROOT)
    for package in SETUP["packages"]:
        planted = stage.joinpath(*package.split("."), "planted.py")
        planted.write_text('number: int = "not a number"\n')
    options = ("--follow-imports=skip", "--cache-dir", tmp_path / "cache")
    mypy = (sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", *options)
    found = subprocess.run([*mypy, "-p", "unified"], cwd=stage, capture_output=True, text=True)
    for package in SETUP["packages"]:
        assert f"{package.replace('.', '/')}/planted.py:1: error" in found.stdout, package


def test_the_packages_are_all_there_are():
    folders = {f: f"unified.{f}" if f != "unified" else f for f in FOLDERS}
    found = {
        ".".join([name, *path.parent.relative_to(ROOT / folder).parts])
        for folder, name in folders.items()
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert found == set(SETUP["packages"])
