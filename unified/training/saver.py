"""Who writes checkpoints, and when: all processes together, at once or in the background.

In the background, the tensors are copied first (to the CPU), and the next steps run while they are
written. A checkpoint that cannot be written, say because the disk is full, is reported and the run
goes on: what was there before is still there.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_saver import async_save

from unified.training import checkpoint
from unified.training.metrics import say
from unified.training.parallel import from_main


class Saver:
    """Writes the checkpoints of one stage into `folder`, and keeps the newest `keep` and the best.

    `is_main` is true on the one process that names and removes folders.
    """

    def __init__(self, folder: Path, keep: int, background: bool, is_main: bool):
        self.folder, self.keep, self.background, self.is_main = folder, keep, background, is_main
        self._pending: tuple[Path, Future[None]] | None = None

    @cached_property
    def _group(self) -> Any:
        """Processes of their own for the background, so that its messages cross no others."""
        return dist.new_group(backend="gloo") if dist.is_initialized() else None

    @cached_property
    def _thread(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def save(self, trained: checkpoint.Trained) -> bool:
        """Write ``STAGE-STEP``; whether it was written, which in the background only `wait` knows
        (and this is True)."""
        self.wait()
        step, stage = trained.progress.step, trained.stage
        partial = self.folder / f".{stage}-{step}.partial"
        if not from_main(self.is_main and self._begin(partial)):
            return False
        seal = self._sealing(partial, stage, asdict(trained.progress))
        if self.background:
            written: Any = async_save(
                trained.tensors(),
                storage_writer=HuggingFaceStorageWriter(str(partial), save_distributed=True),
                process_group=self._group,
                no_dist=not dist.is_initialized(),
            )
            self._pending = partial, self._thread.submit(lambda: seal(written.result()))
            return True
        return self._report(partial, lambda: seal(checkpoint.write(partial, trained.tensors())))

    def wait(self) -> bool:
        """Wait for what the background still writes; whether it was written."""
        if self._pending is None:
            return True
        (partial, pending), self._pending = self._pending, None
        return self._report(partial, pending.result)

    def _sealing(
        self, partial: Path, stage: str, progress: Mapping[str, Any]
    ) -> Callable[[object], None]:
        """What the main process does once all tensors are written (whatever that returns)."""

        def seal(_: object) -> None:
            if self.is_main:
                path = self.folder / f"{stage}-{progress['step']}"
                checkpoint.seal(partial, path, stage, progress)
                checkpoint.prune(self.folder, stage, progress["best_step"], self.keep)

        return seal

    def _begin(self, partial: Path) -> bool:
        """Make the folder to write into; whether there is room for it."""
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        except OSError as error:
            self._failed(partial, error)
            return False
        return True

    def _report(self, partial: Path, write: Callable[[], Any]) -> bool:
        """Whether `write` succeeds; if not, the reason is said."""
        try:
            write()
        except (OSError, CheckpointException) as error:
            self._failed(partial, error)
            return False
        finally:
            _meet()
        return True

    def _failed(self, partial: Path, error: BaseException) -> None:
        """Say so, and leave no half of it behind."""
        if not self.is_main:
            return
        shutil.rmtree(partial, ignore_errors=True)
        step = partial.stem.rpartition("-")[2]
        say(
            f"the checkpoint of step {step} could not be written to {self.folder}:"
            f" {_reason(error)}; training goes on, and the checkpoints before it are there"
        )


def _meet() -> None:
    if dist.is_initialized():
        dist.barrier()


def _reason(error: BaseException) -> str:
    """The cause in a line; a distributed failure names the process it happened on."""
    failures = getattr(error, "failures", None)
    if not failures:
        return str(error)
    process, failure = next(iter(failures.items()))
    return f"{failure[0]} (process {process})"
