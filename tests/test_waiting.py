"""Between a batch and the optimizer nothing waits for the device, so the host runs ahead of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_alignment import alignment
from torch import Tensor
from toy_stage import on_the_cpu
from waiting import WaitedError, never_waiting

from unified.config.plugins import resolve_plugins
from unified.training.folder import RunFolder
from unified.training.loop import Loop, Stage
from unified.training.stages import Materials, Sources

ADVERSARIAL = {"critics": {"adversarial": {"width": 8, "layers": 2}}}
LEARNING = {"vae_lr_ratio": 0.5}


@pytest.fixture
def shard(tmp_path: Path) -> str:
    sizes = ((16, 16), (8, 16), (16, 8))
    members = tiny.squares(tiny.CAPTIONS)
    for i, caption in enumerate(tiny.CAPTIONS):
        image = tiny.square(caption).resize(sizes[i % len(sizes)])
        members[2 * i] = (members[2 * i][0], tiny.as_png(image))
    return tiny.write_shard(tmp_path / "s.tar", members)


def loop(folder: Path, shard: str, stage: dict[str, Any], **training: Any) -> Loop:
    """The loop of a stage, with its real data."""
    told = {**tiny.tree()["training"], "ema": {"decay": 0.9}, **training}
    flow = {"clean_prefix_rate": 0.3}
    settings = tiny.config(folder / "run", shard, stages=[stage], training=told, flow=flow)
    plugins = resolve_plugins(settings, trust_remote_code=True)
    stage_, pipeline = settings.stages[0], tiny.pipeline(settings)
    materials = Materials(settings, stage_, pipeline, Sources(settings), plugins)
    objective = materials.objective()
    data = materials.mixture(stage_.batch_size, stage_.name, collate=objective.collate)
    made = Stage(stage_, settings.training, objective, data, RunFolder(folder / "run"))
    return Loop(made, on_the_cpu())


STAGES: dict[str, dict[str, Any]] = {
    "joint": tiny.joint(optimizer={"vae_lr_ratio": 0}),
    "packed": tiny.joint(optimizer={"vae_lr_ratio": 0}, row_length=96, accumulate=2),
    "means": tiny.joint(optimizer={"vae_lr_ratio": 0}, posterior="mean"),
    "all learn": tiny.joint(
        optimizer=LEARNING, loss={"ref": 0.1}, interval={"train": 1, "freeze": 1}
    ),
    "aligned": tiny.joint(alignment=alignment(layer=1)),
    "text": tiny.autoencoder("text"),
    "image": tiny.autoencoder("image", accumulate=2),
    "judged": tiny.autoencoder("image", loss=ADVERSARIAL),
}


@pytest.mark.parametrize("name", STAGES)
def test_a_step_waits_for_nothing(
    tmp_path: Path, shard: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three of them, after one in which the optimizer makes its moments."""
    running = loop(tmp_path, shard, STAGES[name])
    works = [running.prepare(step) for step in range(4)]
    running.step(0, works[0])
    before = [p.detach().clone() for p in running.learners]
    with never_waiting(monkeypatch):
        outcomes = [running.step(step, works[step]) for step in (1, 2, 3)]
    assert any(not p.equal(old) for p, old in zip(running.learners, before, strict=True))
    for outcome in outcomes:
        losses, _, norm = outcome.read()
        assert all(map(torch.isfinite, map(torch.tensor, [*losses.values(), norm])))
    running.stage.data.close()


ASKS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.detach().sum()),
    "bool": lambda x: bool(x.sum() > 0),
    "if": lambda x: 1 if (x > 0).any() else 0,
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.detach().numpy(),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "mask": lambda x: x[x > 0],
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.detach().unique(),
    "unique_consecutive": lambda x: x.detach().unique_consecutive(),
    "equal": lambda x: torch.equal(x, x + 1),
    "repeat": lambda x: x.flatten().repeat_interleave(torch.ones(x.numel(), dtype=torch.int64)),
    "index": lambda x: [0, 1][(x.sum() > 0).long()],
    "backward": lambda x: x.register_hook(lambda gradient: gradient.nonzero()),
    "made on the host": lambda x: x * torch.tensor(2.0),
}


@pytest.mark.parametrize("how", ASKS)
def test_the_watch_sees_who_asks(
    tmp_path: Path, shard: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A question in the midst of a step, by every way there is."""
    running = loop(tmp_path, shard, STAGES["joint"])
    work = running.prepare(0)
    objective = running.stage.objective
    forward = objective.forward

    def asking(batch: Any) -> dict[str, Tensor]:
        sums = forward(batch)
        together = torch.stack(list(sums.values()))
        ASKS[how](together)
        return dict(zip(sums, together.unbind(), strict=True))

    monkeypatch.setattr(objective, "forward", asking)
    with pytest.raises(WaitedError), never_waiting(monkeypatch):
        running.step(0, work)
    running.stage.data.close()


def test_the_watch_lets_pass_what_need_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    x, of, other = torch.rand(6), torch.tensor([2, 4]), torch.tensor([1, 0])
    with never_waiting(monkeypatch):
        picked = x.index_select(0, of)[other].masked_fill(torch.rand(2) > 0.5, 0)
        torch.arange(2).repeat_interleave(of, output_size=6)
        x.to(torch.float64, non_blocking=True)
    assert picked.shape == (2,)
    assert x.tolist()
