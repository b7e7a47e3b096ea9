"""What a training step costs besides the networks: the Python around them, by stage.

    python benchmarks/host.py                       # this code, as JSON
    python benchmarks/host.py --before 92f7f70      # and an earlier commit, in the same run

The sizes are those of ``quickstart.yaml``, the batch is 256, one thread, no accelerator. Networks
are *stand-ins* that return zeros of the right shape (`stand_ins` in the output names them), so that
what is left is the work of the host. Arithmetic over whole items, which runs where the networks do,
is timed apart. The median of `--steps` steps counts, after `--warmup`, for each stage:

    main_us_per_example     training process, from a batch received to the optimizer called, without
                            what stands below
    noise_us_per_example    drawing what is random
    items_us_per_example    arithmetic over whole items: bytes as numbers, differences of pixels,
                            cross entropy of tokens
    worker_us_per_example   data worker: bytes of a shard to a batch, without
    decode_us_per_example   decoding images and bringing them to size
    tensors_per_step        tensors that cross from a worker to the training process

Times are those of the thread's processor clock, which neighbours of a shared machine do not move
as they move a wall clock.

An earlier commit is checked out beside this one and measured by the same code in a process of its
own, the two in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

ROOT = Path(__file__).parents[1]
BATCH = 256
STAGES = ("text_vae", "image_vae", "joint")


class Clock:
    """Seconds spent inside of wrapped functions, by name; nested ones count once."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self._inside = False

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return function(*args, **kwargs)
            self._inside, start = True, time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self._inside = False
                self.spent[name] = self.spent.get(name, 0.0) + time.thread_time() - start

        return timed

    def take(self) -> dict[str, float]:
        """What was spent since the last time."""
        spent, self.spent = self.spent, {}
        return spent


@contextmanager
def patched(changes: Mapping[str, Callable[[Callable[..., Any]], Any]]) -> Iterator[None]:
    """Things named by dotted path, changed by functions of what they were."""
    import pkgutil

    started = []
    for path, change in changes.items():
        owner = pkgutil.resolve_name(path.rpartition(".")[0])
        started.append(
            patch.object(owner, path.rpartition(".")[2], change(pkgutil.resolve_name(path)))
        )
        started[-1].start()
    try:
        yield
    finally:
        for one in started:
            one.stop()


# ---- stand-ins -----------------------------------------------------------------------------------


def stand_ins(names: Mapping[str, str]) -> dict[str, Callable[[Any], Any]]:
    """Networks as functions that return zeros; something in them learns, so that losses have a
    gradient. `names` says where each is found."""
    import torch

    learns = torch.nn.Parameter(torch.zeros(()))

    def prior(self: Any, batch: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {m: z.new_zeros(z.shape) + learns for m, z in batch.latents.items()}

    def encoder(self: Any, ids_BT: Any, lengths_B: Any = None) -> tuple[Any, Any]:
        c = self.config
        shape = (len(ids_BT), ids_BT.shape[1] // c.patch_size, c.latent_dim)
        return torch.zeros(shape) + learns, torch.zeros(shape)

    def decoder(self: Any, z_BLC: Any, *args: Any, **kwargs: Any) -> Any:
        c = self.config
        rows, length = z_BLC.shape[:2]
        return torch.zeros(()).expand(rows, length * c.patch_size, c.vocab_size)

    def image_encode(self: Any, x_B3HW: Any) -> tuple[Any, Any]:
        b, _, h, w = x_B3HW.shape
        shape = (b, self.channels, h // self.cell, w // self.cell)
        return torch.zeros(shape) + learns, torch.zeros(shape)

    def image_decode(self: Any, z_BChw: Any) -> Any:
        b, _, h, w = z_BChw.shape
        return torch.zeros(()).expand(b, 3, h * self.cell, w * self.cell)

    found = {
        "prior": prior,
        "text encoder": encoder,
        "text decoder": decoder,
        "image encoder": image_encode,
        "image decoder": image_decode,
    }
    return {names[what]: lambda _, f=f: f for what, f in found.items()}  # type: ignore[misc]


# ---- one code base -------------------------------------------------------------------------------


class Host:
    """The stages of the quickstart, as this code base runs them. An earlier one says in a class of
    its own where its parts are (`host_before`)."""

    networks: ClassVar[dict[str, str]] = {
        "prior": "unified.model.prior.Prior.forward",
        "text encoder": "unified.modalities.text.vae.Encoder.forward",
        "text decoder": "unified.modalities.text.vae.Decoder.forward",
        "image encoder": "unified.modalities.image.vae.Codec.encode",
        "image decoder": "unified.modalities.image.vae.Codec.decode",
    }
    noise = (
        "unified.randomness.Chance.normal",
        "unified.randomness.Chance.uniform",
        "unified.flow.matching.FlowMatching._timesteps",
    )
    arithmetic = (
        "torch.nn.functional.cross_entropy",
        "unified.modalities.image.pixels.to_unit",
        "unified.modalities.image.losses.absolute_error",
        "unified.modalities.image.losses.gradient_error",
    )
    decoding = (
        "unified.modalities.image.modality.ImageModality.read",
        "unified.modalities.image.modality.ImageModality._fitted",
    )

    def load_config(self, *overrides: str) -> Any:
        from unified.config.loading import load_config

        return load_config("quickstart.yaml", list(overrides))

    def plugins(self, config: Any) -> tuple[Any, ...]:
        """What sources and materials are told of the plugins."""
        from unified.config.plugins import resolve_plugins

        return (resolve_plugins(config),)

    def mixture(self, materials: Any, stage: Any, objective: Any) -> Any:
        return materials.mixture(stage.batch_size, stage.name, collate=objective.collate)

    def make(self, mixture: Any, step: int) -> Any:
        """What a worker makes of a step."""
        return mixture._prepare[mixture._draw(step).requests].parts

    def tensors(self, made: Any) -> int:
        from unified.latents.tensors import tensors_of

        return sum(len(tensors_of(part)) for part in made)


class Given:
    """Data that hands out what was made before."""

    bad = truncated = 0

    def __init__(self, made: list[Any]):
        self.made = made

    def batch(self, step: int) -> Any:
        return self.made[step]

    def state_dict(self) -> dict[str, Any]:
        return {}


def measure(host: Host, steps: int, warmup: int) -> list[dict[str, float | str]]:
    """The figures of every stage."""
    import torch
    from accelerate import Accelerator

    from unified.pipeline import UnifiedPipeline
    from unified.training.stages import Materials, Sources

    torch.set_num_threads(1)
    batches = [f"stages.{name}.batch_size={BATCH}" for name in STAGES]
    config = host.load_config("data.workers=0", "training.precision=fp32", *batches)
    sources = Sources(config)
    torch.manual_seed(0)
    plugins = host.plugins(config)
    corpora = {name: sources.corpus(name, *plugins) for name in config.modalities}
    pipeline = UnifiedPipeline.build(config, corpora)
    clock, rows = Clock(), []
    groups = {"noise": host.noise, "items": host.arithmetic, "decode": host.decoding}
    timers = {
        path: lambda f, name=name: clock.wrap(name, f)
        for name, paths in groups.items()
        for path in paths
    }
    with patched(stand_ins(host.networks)), patched(timers):
        for stage in config.stages:
            materials = Materials(config, stage, pipeline, sources, *plugins)
            rows.append(_stage(host, materials, Accelerator(cpu=True), clock, steps, warmup))
    return rows


def _stage(
    host: Host, materials: Any, accelerator: Any, clock: Clock, steps: int, warmup: int
) -> dict[str, float | str]:
    from unified.training.folder import RunFolder
    from unified.training.loop import Loop, Stage

    config, stage = materials.config, materials.stage
    objective = materials.objective()
    mixture = host.mixture(materials, stage, objective)
    worker: dict[str, list[float]] = {"worker": [], "decode": []}
    made = []
    clock.take()
    for step in range(warmup + steps):
        start = time.thread_time()
        made.append(host.make(mixture, step))
        whole = time.thread_time() - start
        decode = sum(clock.take().values())
        worker["worker"].append(whole - decode)
        worker["decode"].append(decode)
    with tempfile.TemporaryDirectory() as folder:
        given = Given(made)
        loop = Loop(Stage(stage, config.training, objective, given, RunFolder(folder)), accelerator)
        found = _steps(loop, clock, warmup + steps)
    per_example = 1e6 / BATCH
    return {
        "stage": stage.name,
        **{
            f"{name}_us_per_example": round(statistics.median(values[warmup:]) * per_example, 1)
            for name, values in {**found, **worker}.items()
        },
        "tensors_per_step": host.tensors(made[-1]),
    }


def _steps(loop: Any, clock: Clock, steps: int) -> dict[str, list[float]]:
    """Seconds of each step, from its batch received to the optimizer called."""
    found: dict[str, list[float]] = {"main": [], "noise": [], "items": []}
    called = [0.0]
    loop.optimizer.step = lambda *a, **k: called.__setitem__(0, time.thread_time())
    for step in range(steps):
        clock.take()
        start = time.thread_time()
        loop.step(step, loop._prepare(step))
        apart = clock.take()
        for name in ("noise", "items"):
            found[name].append(apart.get(name, 0.0))
        found["main"].append(called[0] - start - sum(apart.values()))
    return found


# ---- both ----------------------------------------------------------------------------------------


def run(root: Path, host: str, steps: int, warmup: int) -> Any:
    """`measure` in a process of its own, of the code in the checkout `root`."""
    stage = root / "build" / "host"
    subprocess.run(["make", "-s", "stage", f"STAGE={stage}"], cwd=root, check=True)
    code = (
        f"import sys, json; sys.path[:0] = [{str(stage)!r}, {str(ROOT / 'benchmarks')!r}];"
        f"import host, host_before; found = host.measure({host}(), {steps}, {warmup});"
        "print(json.dumps(found))"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=stage
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


@contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """A copy of this repository at `commit`."""
    with tempfile.TemporaryDirectory() as parent:
        path = Path(parent) / "before"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "-q", "--detach", str(path), commit], check=True)
        try:
            yield path
        finally:
            subprocess.run([*git, "remove", "--force", str(path)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--before", metavar="COMMIT", help="measure this commit too")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--warmup", type=int, default=10)
    args = parser.parse_args()
    found: dict[str, Any] = {
        "batch": BATCH,
        "threads": 1,
        "stand_ins": [*Host.networks, "each returns zeros"],
    }
    if args.before:
        with checkout(args.before) as path:
            found["before"] = run(path, "host_before.Before", args.steps, args.warmup)
    found["stages"] = run(ROOT, "host.Host", args.steps, args.warmup)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
