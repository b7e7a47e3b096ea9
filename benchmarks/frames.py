"""How deep the calls go, and how long the functions are.

    python benchmarks/frames.py                 # a table; --json for JSON, with the lists of frames

* ``generate``: frames from `UnifiedPipeline.text_to_image` to the prior's forward
* ``train``: frames from the command line (``unified train CONFIG``) to the errors of velocities,
  which the flow loss sums up
* ``functions``: how many there are in `unified/`, `modalities/` and `tasks/`, the lines below which
  nine in ten stay (docstrings and blank lines count), and the longest

A frame is a call that is still open, in a file of `unified/`, `modalities/` or `tasks/`; both ends
count, and what lies between in other packages does not. A tiny model is made, and takes one step.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from inspect import getattr_static
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

import machine

from unified import cli
from unified.config.loading import load_config, save_config
from unified.config.schema import Config
from unified.flow.matching import FlowMatching
from unified.model.prior import Prior
from unified.pipeline import UnifiedPipeline

ROOT = Path(__file__).parents[1]
FOLDERS = ("unified", "modalities", "tasks")
#: the quickstart, as small as it gets; bad examples are many in so small a tokenizer's rows
TINY = [
    "modalities.text.vocab_size=280",
    "modalities.text.dim=16",
    "modalities.text.ffn_dim=32",
    "modalities.text.num_heads=2",
    "modalities.image.channels=4",
    "modalities.image.network.block_out_channels=[16]",
    "prior={width: 16, heads: 2, head_dim: 8, rope_dim: 6, single_stream_depth: 1}",
    "tasks.continuation=null",
    "data.sources.prose=null",
    "data.sources.emoji.val=[]",
    "stages=[{name: joint, objective: joint, steps: 1, batch_size: 2, row_length: 512}]",
    "training={max_steps: 1, trackers: [], precision: fp32}",
    "generation={num_steps: 1, guidance_scale: 2.0}",
]


def own(frame: FrameType | None) -> list[str]:
    """``file:function`` of the frames of the framework, from the outermost in."""
    found = []
    while frame is not None:
        path = Path(frame.f_code.co_filename).resolve()
        places = [p for p in (ROOT / f for f in FOLDERS) if path.is_relative_to(p)]
        if places:
            found.append(f"{path.relative_to(ROOT)}:{frame.f_code.co_qualname}")
        frame = frame.f_back
    return found[::-1]


@contextmanager
def deepest(owner: Any, name: str) -> Iterator[list[str]]:
    """Collects the frames of the deepest call of the function `name` of a class or a module, itself
    the last."""
    function: Callable[..., Any] = getattr(owner, name)
    frames: list[str] = []

    def seen(*args: Any, **kwargs: Any) -> Any:
        code = function.__code__
        path = Path(code.co_filename).resolve().relative_to(ROOT)
        found = [*own(sys._getframe()), f"{path}:{code.co_qualname}"]
        if len(found) > len(frames):
            frames[:] = found
        return function(*args, **kwargs)

    before = getattr_static(owner, name)
    setattr(owner, name, staticmethod(seen) if isinstance(before, staticmethod) else seen)
    try:
        yield frames
    finally:
        setattr(owner, name, before)


def tiny(folder: Path) -> Config:
    return load_config("quickstart.yaml", [*TINY, f"run.dir={folder / 'run'}"])


def generating(config: Config) -> list[str]:
    """The frames from `text_to_image` to the prior."""
    pipeline = UnifiedPipeline.build(config, {"text": ["a red square on white"]})
    with deepest(Prior, "forward") as frames:
        pipeline.text_to_image(["a red square"], seed=0)
    return frames


def training(config: Config, folder: Path) -> list[str]:
    """The frames from the command line to the loss."""
    save_config(config, folder / "tiny.yaml")
    with deepest(FlowMatching, "loss") as frames:
        try:
            cli.main(["train", str(folder / "tiny.yaml")])
        except SystemExit as end:  # the command line says so also when all is well
            if end.code:
                raise
    return frames


def functions() -> list[tuple[int, str]]:
    """(lines, place) of every function, the longest first."""
    found = []
    for path in sorted(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                found.append((lines, f"{path.relative_to(ROOT)}:{node.name}"))
    return sorted(found, reverse=True)


def rows() -> list[dict[str, Any]]:
    """Both depths with their frames, and the lengths of functions."""
    with TemporaryDirectory() as parent, redirect_stdout(sys.stderr):
        config = tiny(Path(parent))
        depths = {"generate": generating(config), "train": training(config, Path(parent))}
    found: list[dict[str, Any]] = [
        {"what": what, "frames": len(frames), "list": frames} for what, frames in depths.items()
    ]
    lengths = functions()
    nine_in_ten, longest = lengths[len(lengths) // 10][0], lengths[0]
    return [
        *found,
        {
            "what": "functions",
            "count": len(lengths),
            "nine_in_ten": nine_in_ten,
            "longest": longest[0],
            "longest_place": longest[1],
        },
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    args = machine.parse(machine.parser(__doc__), arguments)
    found = rows()
    if args.json:
        machine.show(found, args)
        return
    machine.show([{k: v for k, v in row.items() if k != "list"} for row in found], args)
    for row in found[:-1]:
        print(f"\n{row['what']}\n" + "\n".join(f"  {frame}" for frame in row["list"]))


if __name__ == "__main__":
    main()
