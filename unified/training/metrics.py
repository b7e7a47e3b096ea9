"""What a run reports: ``metrics.jsonl``, the trackers, and a progress bar or plain lines.

Every line of ``metrics.jsonl`` has ``stage`` and ``step`` (the number of finished steps). Training
lines have ``loss`` (the weighted total), ``loss/TERM`` (averages per position, unweighted), ``lr``
(``lr/GROUP`` of other groups), ``grad_norm`` (before clipping), speed, and ``seconds`` (of training
in this stage, without interruptions); validation lines have ``val/...`` instead. When a run
continues from a checkpoint, lines that lie after it are dropped, so that the file reads as if
nothing had happened.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from unified.latents.weights import write_text

#: seconds between two plain lines, where there is no terminal for a progress bar
PLAIN_EVERY = 10.0


def say(text: str) -> None:
    """One line to the standard error stream, above a progress bar if there is one."""
    tqdm.write(text, file=sys.stderr)


def memory_gb(device: torch.device) -> float:
    """The most memory so far: allocated on an accelerator, or resident for a process on the CPU."""
    if device.type != "cpu":
        return float(torch.accelerator.max_memory_allocated(device)) / 1e9
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


#: trackers that an extra of this package brings
EXTRAS = ("wandb", "trackio")
#: what a tracker must be told of an array [B, H, W, 3]
IMAGE_OPTIONS = {"tensorboard": {"dataformats": "NHWC"}}


@dataclass
class Speed:
    """What happened since the last report, which was at `start` seconds of training."""

    start: float
    examples: float = 0.0
    used: float = 0.0
    laid: float = 0.0
    waited: float = 0.0

    def report(self, now: float) -> dict[str, float]:
        seconds = max(1e-9, now - self.start)
        return {
            "examples_per_s": self.examples / seconds,
            "positions_per_s": self.used / seconds,
            "fill": self.used / max(1.0, self.laid),
            "data_wait": self.waited / seconds,
        }


def tracker_names(names: list[str]) -> list[str]:
    """`names`, once all of them are known to be installed (accelerate drops others silently)."""
    from accelerate.tracking import get_available_trackers

    available = sorted(tracker.value for tracker in get_available_trackers())
    for name in names:
        if name not in available:
            remedy = f": pip install 'unified-latents[{name}]', or" if name in EXTRAS else ";"
            raise ValueError(
                f"training.trackers asks for {name}, which is not installed{remedy} choose from"
                f" {', '.join(available)}"
            )
    return names


def rewind(path: Path, stage: str, step: int) -> None:
    """Drop the lines of `stage` after `step`, and a last line that was cut short."""
    if not path.is_file():
        return
    kept = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if line["stage"] != stage or line["step"] <= step:
            kept.append(text + "\n")
    write_text(path, "".join(kept))


class Metrics:
    """The reports of one stage. Only the main process (`active`) writes.

    `first` is the number of steps that earlier stages took: trackers count steps through all
    stages, and tag values by stage.
    """

    def __init__(self, path: Path, stage: str, steps: int, accelerator: Any, first: int = 0):
        self.path, self.stage, self.accelerator, self.first = path, stage, accelerator, first
        self.active = bool(accelerator.is_main_process)
        self.terminal = self.active and sys.stderr.isatty()
        self.bar = tqdm(total=steps, desc=stage, disable=not self.terminal)
        self.said = float("-inf")

    def start(self, step: int) -> None:
        """Continue at `step`: forget what was written after it."""
        if self.active:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            rewind(self.path, self.stage, step)
        self.bar.update(step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line, and hand it to the trackers."""
        if not self.active:
            return
        line = {"stage": self.stage, "step": step, **values}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        tagged = {f"{self.stage}/{key}": value for key, value in values.items()}
        self.accelerator.log(tagged, step=self.first + step)
        self._show(step, values)

    def write_samples(self, step: int, items: Mapping[str, Any]) -> None:
        """Hand texts and images to the trackers that can show them. Main process only."""
        tagged = {f"{self.stage}/{name}": item for name, item in items.items()}
        texts = {tag: item for tag, item in tagged.items() if isinstance(item, str)}
        if texts:
            self.accelerator.log(texts, step=self.first + step)
        images = {
            tag: np.asarray(item.convert("RGB"))[None]
            for tag, item in tagged.items()
            if isinstance(item, Image.Image)
        }
        for tracker in self.accelerator.trackers if images else ():
            if hasattr(tracker, "log_images"):
                options = IMAGE_OPTIONS.get(tracker.name, {})
                tracker.log_images(images, step=self.first + step, **options)

    def advance(self) -> None:
        """Move the bar by one step."""
        self.bar.update()

    def close(self) -> None:
        self.bar.close()

    def _show(self, step: int, values: Mapping[str, float]) -> None:
        """The losses on the bar; without a terminal, in a plain line every so often."""
        shown = {k: f"{v:.4g}" for k, v in values.items() if "loss" in k or k.startswith("val/")}
        if self.terminal:
            self.bar.set_postfix(shown)
        now = time.monotonic()
        done = step == self.bar.total or any(k.startswith("val/") for k in values)
        if not self.terminal and (done or now - self.said >= PLAIN_EVERY):
            self.said = now
            losses = "  ".join(f"{key} {value}" for key, value in shown.items())
            say(f"{self.stage} {step}/{self.bar.total}  {losses}")
