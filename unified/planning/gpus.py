"""What a GPU can do at most, from its vendor's data sheet.

Arithmetic is dense, so half of what a sheet prints "with sparsity". A data sheet's GB are taken as
10^9 bytes.

* A100 SXM: NVIDIA A100 Tensor Core GPU data sheet (312 TFLOP/s in bfloat16, 19.5 in float32).
* H100 SXM, H200 SXM: their data sheets (1,979 TFLOP/s in bfloat16 with sparsity, 67 in float32).
* B200: NVIDIA Blackwell architecture technical brief, HGX B200 (4,500 TFLOP/s in bfloat16 with
  sparsity, 80 in float32), and the DGX B200 data sheet (1,440 GB over eight GPUs).
"""

from __future__ import annotations

from dataclasses import dataclass

from unified.errors import did_you_mean

CUSTOM = "custom"


@dataclass(frozen=True)
class GPU:
    """Peak TFLOP/s by precision, and GB of memory."""

    name: str
    tflops: dict[str, float]
    memory_gb: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("a100-40", {"bf16": 312, "fp32": 19.5}, 40),
        GPU("a100-80", {"bf16": 312, "fp32": 19.5}, 80),
        GPU("h100", {"bf16": 989.5, "fp32": 67}, 80),
        GPU("h200", {"bf16": 989.5, "fp32": 67}, 141),
        GPU("b200", {"bf16": 2250, "fp32": 80}, 180),
    )
}


def find_gpu(name: str, peak_tflops: float | None = None, memory_gb: float | None = None) -> GPU:
    """The GPU of that name; ``custom`` is what its two numbers say. ValueError for other names,
    and for numbers that are missing, not positive, or given to a GPU that has its own."""
    numbers = {"--peak-tflops": peak_tflops, "--memory-gb": memory_gb}
    if name != CUSTOM:
        if name not in GPUS:
            raise ValueError(f"unknown GPU {name!r}; {did_you_mean(name, [*GPUS, CUSTOM])}")
        told = [option for option, value in numbers.items() if value is not None]
        if told:
            raise ValueError(
                f"{told[0]} describes a GPU of your own, but {name} is asked for;"
                f" use --gpu {CUSTOM}"
            )
        return GPUS[name]
    for option, value in numbers.items():
        if value is None or not value > 0:
            found = "is missing" if value is None else f"is {value:g}"
            raise ValueError(f"--gpu {CUSTOM} needs {option}, a number above 0, which {found}")
    assert peak_tflops is not None
    assert memory_gb is not None
    return GPU(name, {"bf16": peak_tflops, "fp32": peak_tflops}, memory_gb)
