"""What the other benchmarks share: the machine's own speed, memory, timing, and how they print.

    python benchmarks/machine.py --dtype bf16     # the machine's matmul GFLOP/s; --json for JSON

A time alone says little: neighbours of a shared machine move it by up to ten times. So each
benchmark measures matmuls in its own process, around what it times, and gives its speed as a
*share* of theirs: (model FLOP/s) / (matmul FLOP/s) at one precision and number of threads. Matrices
are 1024 x 1024 on a CPU and 8192 x 8192 on an accelerator, which smaller ones do not fill; there
fp32 is float32, without TF32.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
#: side of the matrices whose product is the limit of a CPU and of any other device, and the
#: shortest burst of products
SIDE, WIDE_SIDE, BURST = 1024, 8192, 0.05
GIB = 1 << 30


def matmul_flops(dtype: torch.dtype, seconds: float = 1.0, device: str = "cpu") -> float:
    """FLOP/s of products of square matrices: the best burst within about so many `seconds`."""
    side = SIDE if device == "cpu" else WIDE_SIDE
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out, best, end = torch.empty_like(a), 0.0, time.perf_counter() + seconds
    while not best or time.perf_counter() < end:
        wait()
        count, start = 0, time.perf_counter()
        while (spent := time.perf_counter() - start) < BURST or not count:
            torch.mm(a, b, out=out)
            wait()
            count += 1
        best = max(best, count * 2 * side**3 / spent)
    return best


def wait() -> None:
    """Until an accelerator, if there is one, has done what it was told."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


@dataclass
class Limit:
    """A device's matmul FLOP/s at the precision `name`, looked at `seconds` long each time."""

    name: str
    seconds: float = 1.0
    device: str = "cpu"
    seen: list[float] = field(default_factory=list)

    def look(self) -> None:
        """Measure once more."""
        self.seen.append(matmul_flops(DTYPES[self.name], self.seconds, self.device))

    def share(self, flops: float, seconds: float) -> float:
        """What part of the fastest matmuls so far `flops` in `seconds` is."""
        return flops / seconds / max(self.seen)

    @property
    def columns(self) -> dict[str, float]:
        """The first and the last look, in GFLOP/s."""
        first, last = self.seen[0] / 1e9, self.seen[-1] / 1e9
        return {"matmul_gflops_before": first, "matmul_gflops_after": last}


def autocast(name: str, device: str = "cpu") -> AbstractContextManager[Any]:
    """The precision `name` as training has it: bf16 is autocast over weights in float32."""
    return torch.autocast(device, torch.bfloat16) if name == "bf16" else nullcontext()


def best_of(run: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of so many runs."""
    return min(seconds(run) for _ in range(repeats))


def seconds(run: Callable[[], object]) -> float:
    """Seconds of one run, until the device is done."""
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


# ---- memory -------------------------------------------------------------------------------------


def resident(what: str) -> int:
    """Bytes of this process: ``VmRSS`` now, ``VmHWM`` at most (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {what}: memory is measured on Linux only")


def forget_peak() -> int:
    """Let the peaks of memory begin anew; what is resident now, in bytes."""
    if torch.accelerator.is_available():
        torch.accelerator.reset_peak_memory_stats()
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def peak_rss_gb() -> float:
    """The peak of resident memory, in GiB."""
    return resident("VmHWM") / GIB


def memory_columns(before: int) -> dict[str, float]:
    """The peak of resident memory, and its part above the `before` that `forget_peak` gave; with an
    accelerator also the peak of what was allocated there."""
    found = {"peak_rss_gb": peak_rss_gb(), "rss_above_gb": peak_rss_gb() - before / GIB}
    if torch.accelerator.is_available():
        found["peak_device_gb"] = torch.accelerator.max_memory_allocated() / GIB
    return found


# ---- the command line ---------------------------------------------------------------------------


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with what every benchmark has: ``--threads`` and ``--json``."""
    made = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    made.add_argument("--threads", type=int, help="of PyTorch; by default what PyTorch takes")
    made.add_argument("--json", action="store_true", help="an object in place of a table")
    return made


def add_model_options(to: argparse.ArgumentParser, sizes: Sequence[str]) -> None:
    """Which model, where, at which precision, how often, and how long matmuls are measured."""
    to.add_argument("--size", choices=sizes, default=sizes[0])
    add_device_options(to)
    to.add_argument("--repeats", type=int, default=3, help="the best of so many runs counts")
    to.add_argument("--matmul-seconds", type=float, default=1.0, help="before, and again after")


def add_compile_option(to: argparse.ArgumentParser) -> None:
    """Whether the prior's blocks are compiled, and in which mode of `torch.compile`."""
    to.add_argument(
        "--compile", nargs="?", const="default", metavar="MODE",
        help="compile the prior's blocks",
    )  # fmt: skip


def add_graphs_option(to: argparse.ArgumentParser) -> None:
    """Whether steps of generation are recorded and replayed, on a device that can."""
    to.add_argument(
        "--graphs", action=argparse.BooleanOptionalAction, default=True,
        help="record a step of a block and replay it, on devices that can",
    )  # fmt: skip


def add_device_options(to: argparse.ArgumentParser) -> None:
    """Where, and at which precision."""
    to.add_argument("--device", choices=devices(), default="cpu")
    to.add_argument("--dtype", choices=list(DTYPES), default="fp32")


def devices() -> list[str]:
    """The kinds of device that are here."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return ["cpu"] if found is None else ["cpu", found.type]


def parse(options: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, with ``--threads`` in force."""
    args = options.parse_args(arguments)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    return args


def describe(dtype: str | None = None, device: str = "cpu") -> dict[str, Any]:
    """What a figure was measured on."""
    found = {"threads": torch.get_num_threads(), "dtype": dtype}
    if device != "cpu":
        found["device"] = torch.get_device_module(device).get_device_name()
    return {k: v for k, v in found.items() if v} | {"torch": torch.__version__, "cpu": cpu_name()}


def cpu_name() -> str:
    """The processor's name, as Linux has it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def show(rows: Sequence[Mapping[str, Any]], args: argparse.Namespace) -> None:
    """Print `rows` under a line on the machine: a table, or with ``--json`` one object."""
    machine = describe(getattr(args, "dtype", None), getattr(args, "device", "cpu"))
    if args.json:
        print(json.dumps({"machine": machine, "rows": list(rows)}, indent=2))
        return
    print(", ".join(f"{key} {value}" for key, value in machine.items()) + "\n")
    print(table(rows))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown; a row may lack what another has."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    return "\n".join(
        lines + ["| " + " | ".join(cell(r.get(n)) for n in names) + " |" for r in rows]
    )


def cell(value: object) -> str:
    """Three significant digits of a number with a fraction."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def randn(shape: Sequence[int], seed: int) -> Tensor:
    """Normal numbers that are the same every time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    add_device_options(options)
    options.add_argument("--seconds", type=float, default=3.0)
    args = parse(options, arguments)
    found = matmul_flops(DTYPES[args.dtype], args.seconds, args.device)
    show([{"matmul_gflops": found / 1e9}], args)


if __name__ == "__main__":
    main()
