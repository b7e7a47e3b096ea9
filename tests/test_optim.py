"""Optimizers: what each is made of, that runs continue bit for bit, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from toy_stage import WIDTH, ToyObjective, lines, on_the_cpu, stage_config, toy, training_config

from unified.config.plugins import optimizer_factory, resolve_plugins
from unified.config.schema import Config, OptimizerConfig
from unified.planning.draft import Draft
from unified.planning.figures import PlanRequest
from unified.planning.gpus import GPUS
from unified.planning.memory import Step, optimizer_state, per_device
from unified.training import checkpoint
from unified.training.loop import Stage, train_stage
from unified.training.objectives.joint import JointObjective
from unified.training.optim import (
    adamw,
    build_optimizer,
    check_optimizers,
    hidden_matrices,
    make_state,
    set_learning_rate,
)
from unified.training.run import train

SHIPPED = ("adamw", "muon", "adafactor")
LEARNING = {"lr": 0.02, "vae_lr_ratio": 0.5, "warmup_steps": 2}


@pytest.fixture
def accelerator() -> Accelerator:
    return on_the_cpu()


class Deep(ToyObjective):
    """The toy with a hidden layer: what leads into and out of it is not hidden."""

    def __init__(self, seed: int = 0):
        super().__init__(seed)
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)])

    def forward(self, batch: Any) -> dict[str, Tensor]:
        z_NW = self.encoder(batch.x)
        for block in self.blocks:
            z_NW = z_NW + torch.tanh(block(z_NW))
        error_N = ((self.main(z_NW) - batch.x.flip(-1)) ** 2).sum(-1)
        return {"fit": error_N.sum(), "size": ((z_NW**2).sum(-1) * batch.marked).sum()}

    def groups(self) -> dict[str, list[nn.Parameter]]:
        groups = super().groups()
        return {**groups, "main": [*groups["main"], *self.blocks.parameters()]}


def deep(folder: Path, kind: str, steps: int = 6, **changes: Any) -> Stage:
    """A stage of `Deep` with this optimizer, whose autoencoder rests at times."""
    optimizer = {**LEARNING, "type": kind, **changes}
    config = stage_config(optimizer=optimizer, interval={"train": 2, "freeze": 2}, steps=steps)
    stage = toy(folder, config, training_config())
    stage.objective = Deep()
    return stage


def everything(folder: Path) -> dict[str, Tensor]:
    path = checkpoint.newest(folder / "checkpoints", "toy")
    assert path is not None
    groups = {g: checkpoint.read(path, g) for g in ("model", "ema", "optimizer")}
    return {f"{g}/{n}": t for g, tensors in groups.items() for n, t in tensors.items()}


# ---- what each is made of -----------------------------------------------------------------------


def test_hidden_are_the_matrices_of_blocks_alone() -> None:
    model = Deep()
    named = {name for name, p in model.named_parameters() if id(p) in hidden_matrices(model)}
    assert named == {"blocks.0.weight", "blocks.1.weight"}
    pipeline = tiny.pipeline()
    whole = nn.ModuleDict(pipeline.modules)
    found = {n for n, p in whole.named_parameters() if id(p) in hidden_matrices(whole)}
    assert "prior.blocks.0.streams.shared.mlp.proj_in.weight" in found
    assert "text_vae.network.encoder.blocks.0.qkv_proj.weight" in found
    outside = ("wte", "patch_embedder", "final_layer", "in_layer", "project_in", "project_out")
    assert not [n for n in found if any(part in n for part in outside) or n.endswith("bias")]


def test_muon_is_muon_for_hidden_matrices_and_adamw_for_the_rest() -> None:
    """Against PyTorch's two optimizers, each with its own parameters."""
    model, other = Deep(), Deep()
    config = OptimizerConfig(type="muon", lr=0.01, weight_decay=0.1, options={"momentum": 0.9})
    mine = build_optimizer(model.groups(), config, hidden_matrices(model))
    theirs = [
        torch.optim.Muon(
            [b.weight for b in other.blocks],
            lr=0.01, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw",
        ),
        adamw([other.main.weight], lr=0.01, weight_decay=0.1, betas=(0.9, 0.95)),
        adamw(
            [other.main.bias, *(b.bias for b in other.blocks)],
            lr=0.01, weight_decay=0.0, betas=(0.9, 0.95),
        ),
    ]  # fmt: skip
    set_learning_rate(mine, 0.01)
    for step in range(3):
        for m in (model, other):
            for i, p in enumerate(p for n, p in m.named_parameters() if n[:4] in ("main", "bloc")):
                rng = torch.Generator().manual_seed(100 * step + i)
                p.grad = torch.randn(p.shape, generator=rng)
        for optimizer in (mine, *theirs):
            optimizer.step()
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert a.equal(b), name


def test_muon_is_one_optimizer_with_one_state() -> None:
    model = Deep()
    optimizer = build_optimizer(
        model.groups(), OptimizerConfig(type="muon"), hidden_matrices(model)
    )
    learners = [p for g in optimizer.param_groups for p in g["params"]]
    make_state(optimizer, learners)
    keys = {tuple(optimizer.state[p]) for p in learners}
    assert keys == {("momentum_buffer",), ("step", "exp_avg", "exp_avg_sq")}
    again = build_optimizer(model.groups(), OptimizerConfig(type="muon"), hidden_matrices(model))
    again.load_state_dict(optimizer.state_dict())
    for p in learners:
        p.grad = torch.ones_like(p)
    again.step()
    assert all(int(s["step"]) == 2 for s in again.state.values() if "step" in s)
    assert again.state.keys() == set(learners)


@pytest.mark.parametrize("kind", SHIPPED)
def test_a_state_that_is_made_moves_nothing_and_has_the_shapes_of_a_step(kind: str) -> None:
    model = Deep()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    config = OptimizerConfig(type=kind)
    made, stepped = (build_optimizer(model.groups(), config, hidden_matrices(model)) for _ in "ab")
    make_state(made, model.main.parameters())
    assert all(t.equal(before[n]) for n, t in model.state_dict().items())
    assert made.state.keys() == set(model.main.parameters())
    assert all(p.grad is None for p in model.parameters())
    assert {g["lr"] for g in made.param_groups} == {config.lr}
    for p in model.main.parameters():
        p.grad = torch.ones_like(p)
    stepped.step()
    for p in model.main.parameters():
        one, two = made.state[p], stepped.state[p]
        assert {k: v.shape for k, v in one.items()} == {k: v.shape for k, v in two.items()}


def test_options_reach_the_optimizer() -> None:
    model = Deep()

    def settings(kind: str, **options: Any) -> dict[str, Any]:
        config = OptimizerConfig(type=kind, options=options)
        return build_optimizer(model.groups(), config, hidden_matrices(model)).param_groups[0]

    assert settings("adamw", eps=1e-6)["eps"] == 1e-6
    assert settings("muon", ns_steps=3)["ns_steps"] == 3
    assert settings("adafactor", d=2.0)["d"] == 2.0
    assert settings("adafactor")["beta2_decay"] == -0.8


# ---- training with it ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SHIPPED)
def test_a_loss_falls(kind: str, tmp_path: Path, accelerator: Accelerator) -> None:
    train_stage(deep(tmp_path, kind, steps=120), accelerator)
    losses = [line["loss"] for line in lines(tmp_path) if "loss" in line]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


@pytest.mark.parametrize("kind", SHIPPED)
def test_what_rests_has_no_new_state_and_does_not_move(
    kind: str, tmp_path: Path, accelerator: Accelerator
) -> None:
    """The autoencoder learns in steps 1 and 2 and rests in 3 and 4."""
    saved = {}
    for step in (2, 4):
        stage = deep(tmp_path / str(step), kind)
        stage.training.max_steps = step
        train_stage(stage, accelerator)
        found = everything(tmp_path / str(step))
        saved[step] = {n: t for n, t in found.items() if "encoder." in n}
    assert saved[2].keys() == saved[4].keys()
    assert all(saved[4][name].equal(tensor) for name, tensor in saved[2].items())


@pytest.mark.parametrize("stop", [1, 3])
@pytest.mark.parametrize("kind", SHIPPED)
def test_a_run_that_is_continued_is_the_run_that_was_not_stopped(
    kind: str, stop: int, tmp_path: Path, accelerator: Accelerator
) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    train_stage(deep(straight, kind), accelerator)
    first = deep(broken, kind)
    first.training.max_steps = stop
    train_stage(first, accelerator)
    train_stage(deep(broken, kind), accelerator)
    one, two = everything(straight), everything(broken)
    assert one.keys() == two.keys()
    assert all(one[name].equal(two[name]) for name in one)
    states = {"adamw": "exp_avg_sq", "muon": "momentum_buffer", "adafactor": "row_var"}
    assert f"optimizer/{states[kind]}/blocks.0.weight" in one


def test_a_checkpoint_of_adamw_has_the_tensors_it_always_had(
    tmp_path: Path, accelerator: Accelerator
) -> None:
    """Those of checkpoints that are read since the first: a count and two moments a parameter."""
    train_stage(toy(tmp_path), accelerator)
    found = {n: t for n, t in everything(tmp_path).items() if n.startswith("optimizer/")}
    shapes = {n: p.shape for n, p in ToyObjective().named_parameters() if "frozen" not in n}
    wanted = {f"optimizer/{k}/{n}": s for k in ("exp_avg", "exp_avg_sq") for n, s in shapes.items()}
    wanted |= {f"optimizer/step/{n}": torch.Size() for n in shapes}
    assert {n: t.shape for n, t in found.items()} == wanted
    assert {t.dtype for t in found.values()} == {torch.float32}


def test_a_state_of_another_optimizer_is_refused(tmp_path: Path, accelerator: Accelerator) -> None:
    train_stage(deep(tmp_path, "adamw"), accelerator)
    with pytest.raises(ValueError, match=r"toy-6 (lacks|has) tensor optimizer/"):
        train_stage(deep(tmp_path, "adafactor"), accelerator)


@pytest.mark.parametrize("kind", ["muon", "adafactor"])
def test_a_whole_run_is_continued_bit_for_bit(kind: str, tmp_path: Path) -> None:
    """The tiny model, with autoencoders that learn."""
    shard = tmp_path / "squares.tar"
    tiny.write_shard(shard, tiny.squares())
    optimizer = {"type": kind, "lr": 1e-2, "warmup_steps": 1, "vae_lr_ratio": 0.5}
    stages = [
        tiny.autoencoder("text", optimizer={**optimizer, "vae_lr_ratio": 0}, steps=1),
        tiny.joint(optimizer=optimizer, row_length=128, steps=4),
    ]

    def run(folder: str, steps: int | None) -> Path:
        training = {**tiny.tree()["training"], "max_steps": steps, "save_every": 2}
        changes = {"stages": stages, "training": training}
        return train(tiny.config(tmp_path / folder, str(shard), **changes))

    run("straight", None)
    run("broken", 2)
    run("broken", None)
    for group in ("model", "ema", "optimizer"):
        one, two = (
            checkpoint.read(tmp_path / f / "checkpoints" / "joint-4", group)
            for f in ("straight", "broken")
        )
        assert one.keys() == two.keys()
        assert all(one[name].equal(two[name]) for name in one)


# ---- one's own, and what is refused -------------------------------------------------------------

OWN = """
import torch


class Plain(torch.optim.Optimizer):
    def __init__(self, params, lr, push=1.0):
        super().__init__(params, {"lr": lr, "push": push})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    if not state:
                        state["sum"] = torch.zeros(2, *p.shape)
                    state["sum"][0] += p.grad
                    p.sub_(group["lr"] * group["push"] * state["sum"][0])


class Counting(Plain):
    def step(self):
        super().step()
        for state in self.state.values():
            state["count"] = 1


class Grouped(Plain):
    def step(self):
        super().step()
        self.param_groups[0]["seen"] = 1


def make(groups, lr, betas, power=2):
    return torch.optim.SGD(groups, lr=lr, momentum=betas[0] ** power)


def nothing():
    return None
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_optimizer.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    return "own_optimizer:Plain"


def test_one_s_own_runs_with_trust_and_continues_by_its_own_shapes(
    own: str, tmp_path: Path, accelerator: Accelerator
) -> None:
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        train_stage(deep(tmp_path / "run", own), accelerator)
    shutil.rmtree(tmp_path / "run", ignore_errors=True)

    def run(folder: str, steps: int) -> None:
        stage = deep(tmp_path / folder, own, lr=1e-3)
        stage.optimizer = optimizer_factory(stage.config.optimizer, trust_remote_code=True)
        stage.training.max_steps = steps
        train_stage(stage, accelerator)

    run("straight", 6)
    run("broken", 3)
    run("broken", 6)
    one, two = everything(tmp_path / "straight"), everything(tmp_path / "broken")
    assert one["optimizer/sum/main.weight"].shape == (2, WIDTH, WIDTH)
    assert all(one[name].equal(two[name]) for name in one)


def test_a_function_gets_the_betas_that_it_asks_for(own: str) -> None:
    config = OptimizerConfig(type="own_optimizer:make", betas=(0.5, 0.9), options={"power": 3})
    make = optimizer_factory(config, trust_remote_code=True)
    made = build_optimizer(Deep().groups(), config, make=make)
    assert made.param_groups[0]["momentum"] == 0.125
    assert own


def checked(optimizer: dict[str, Any], training: dict[str, Any] | None = None) -> Config:
    stages = [tiny.joint(optimizer=optimizer)]
    config = tiny.config(stages=stages, training={**tiny.tree()["training"], **(training or {})})
    check_optimizers(config, resolve_plugins(config, trust_remote_code=True))
    return config


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("optimizer", "says"),
    [
        ({"type": "adamv"}, "unknown optimizer 'adamv'; did you mean adamw?"),
        (
            {"type": "muon", "options": {"momentun": 0.9}},
            "stage joint, optimizer.options names the option 'momentun', which muon lacks; did you"
            " mean momentum?",
        ),
        ({"options": {"lr": 0.1}}, "optimizer.options has 'lr', which is not given there"),
        ({"options": {"params": []}}, "optimizer.options has 'params', which is not given there"),
        (
            {"type": "adafactor", "betas": [0.9, 0.999]},
            r"optimizer.betas is \(0.9, 0.999\), but adafactor has no betas",
        ),
        (
            {"type": "muon", "options": {"momentum": -1}},
            "stage joint, optimizer muon: momentum should be >= 0 but is: -1",
        ),
        ({"options": {"eps": "big"}}, "stage joint, optimizer adamw: "),
        ({"type": "own_optimizer:Counting"}, "keeps count where no checkpoint holds it"),
        ({"type": "own_optimizer:Grouped"}, "keeps 0.seen where no checkpoint holds it"),
        ({"type": "own_optimizer:nothing"}, "optimizer own_optimizer:nothing: "),
        ({"type": "own_optimizer:OWN"}, "has no 'OWN'"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(optimizer: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        checked(optimizer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["muon", "adafactor"])
def test_whole_matrices_are_not_sharded(kind: str, tmp_path: Path) -> None:
    says = f"optimizer {kind} looks at whole matrices, but training.sharding full cuts them"
    with pytest.raises(ValueError, match=says):
        checked({"type": kind}, {"sharding": "full"})
    assert checked({"type": "adamw"}, {"sharding": "full"})
    stages = [tiny.joint(optimizer={"type": kind})]
    training = {**tiny.tree()["training"], "sharding": "full"}
    with pytest.raises(ValueError, match=says):
        train(tiny.config(tmp_path / "run", stages=stages, training=training))
    assert not (tmp_path / "run").exists()


# ---- what it takes ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imagined() -> JointObjective:
    """The objective of a stage in which everything learns, on fake tensors."""
    stage = tiny.joint(optimizer={"vae_lr_ratio": 1.0})
    config = tiny.config(stages=[stage], tasks={"continuation": tiny.TASKS["continuation"]})
    request, plugins = PlanRequest(GPUS["h100"]), resolve_plugins(config)
    return Draft(config, config.stages[0], request, "fp32", plugins).objective


def test_a_plan_counts_what_the_optimizer_keeps(imagined: JointObjective) -> None:
    def planned(kind: str, **parallel: Any) -> int:
        optimizer = OptimizerConfig(type=kind, vae_lr_ratio=1.0)
        imagined.stage = imagined.stage.model_copy(update={"optimizer": optimizer})
        make = optimizer_factory(optimizer, trust_remote_code=True)
        state = optimizer_state(imagined, make)
        return per_device(imagined, Step(0, 0), True, state, **parallel).optimizer

    model = nn.ModuleDict(tiny.pipeline().modules)
    learners, hidden = list(model.parameters()), hidden_matrices(model)
    for kind in SHIPPED:
        made = build_optimizer({"main": learners}, OptimizerConfig(type=kind), hidden)
        make_state(made, learners)
        states = [t for state in made.state.values() for t in state.values()]
        assert planned(kind) == sum(t.nbytes for t in states if t.ndim), kind
    whole = planned("adamw")
    assert 0 <= 6 * planned("adamw", devices=6, sharded=True) - whole < 6 * 8
    assert planned("torch.optim:NAdam") == whole == planned("adamw", devices=6)
    assert planned("adafactor") < planned("muon") < whole
