"""The optimizer, and who learns when.

The learning rate is a function of the step alone: a linear warmup, then a cosine over the stage's
`steps` down to ``final_lr_ratio * lr``. A cap on the steps cuts the cosine short and does not bend
it, so that a run that is stopped and continued is the run that was not stopped.

Parameters come in two groups: ``main`` learns at lr, ``vae`` (the autoencoders, in a joint stage)
at ``lr * vae_lr_ratio``. In interval mode (paper 4.3) the second group learns for some steps and
rests for some. Resting parameters require no gradient and have none, and an optimizer passes over a
parameter without gradient: its state, its weight decay and its average all stand still.

``optimizer.type`` names what makes the optimizer: ``adamw``, `Muon`, PyTorch's Adafactor, or a
class or function of one's own. It is called as PyTorch's optimizers are, with groups of parameters
(dictionaries with ``params``, ``weight_decay``, ``hidden``: see `hidden_matrices`, and ``ratio``)
and then with ``lr`` and the options by name. What it learns has to lie in its ``state``, as
tensors: a checkpoint holds no more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from unified.config.plugins import Plugins, optimizer_factory
from unified.config.schema import Config, IntervalConfig, OptimizerConfig

Groups = Mapping[str, Sequence[nn.Parameter]]


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """The learning rate of step `step` (from 0) of a stage of `steps`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = min(1.0, (step - config.warmup_steps) / max(1, steps - config.warmup_steps))
    floor = config.final_lr_ratio
    return config.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))


def vae_learns(step: int, interval: IntervalConfig | None) -> bool:
    """Whether the autoencoders learn at `step`: always, or in the first part of each cycle."""
    return interval is None or step % (interval.train + interval.freeze) < interval.train


def ratio(group: str, config: OptimizerConfig) -> float:
    """The learning rate of a group relative to ``lr``. ValueError for a group that is unknown."""
    ratios = {"main": 1.0, "vae": config.vae_lr_ratio}
    if group not in ratios:
        raise ValueError(f"unknown parameter group {group}; there are {sorted(ratios)}")
    return ratios[group]


def learning_groups(groups: Groups, config: OptimizerConfig) -> dict[str, list[nn.Parameter]]:
    """The groups that learn at all: those with parameters and with a rate above 0."""
    return {name: list(group) for name, group in groups.items() if ratio(name, config) and group}


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group `lr` times its own ratio."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["ratio"]


def set_learning(parameters: Iterable[nn.Parameter], learning: bool) -> None:
    """Let these parameters learn, or rest."""
    for parameter in parameters:
        parameter.requires_grad_(learning)


# ---- making one ----------------------------------------------------------------------------------


def hidden_matrices(module: nn.Module) -> set[int]:
    """The ids of the weights of linear layers inside a list of blocks (`nn.ModuleList`), such as
    the prior's: neither embeddings, nor what leads into the blocks or out of them."""
    blocks = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
    layers = [layer for part in blocks for layer in part.modules()]
    return {id(layer.weight) for layer in layers if isinstance(layer, nn.Linear)}


def build_optimizer(
    groups: Groups,
    config: OptimizerConfig,
    hidden: Collection[int] = (),
    make: Callable[..., Any] | None = None,
) -> torch.optim.Optimizer:
    """The configured optimizer over `groups`; `hidden` are the ids of `hidden_matrices`. Weight
    decay is for matrices; biases and norm scales have none. `make` is the `optimizer_factory` of
    `config`, for one that is a path to code."""
    settings = []
    for (name, parameters), decayed, inside in product(
        groups.items(), (True, False), (True, False)
    ):
        members = [p for p in parameters if (p.ndim >= 2, id(p) in hidden) == (decayed, inside)]
        decay = config.weight_decay if decayed else 0.0
        rate = {"weight_decay": decay, "ratio": ratio(name, config), "hidden": inside}
        if members:
            settings.append({"params": members, **rate})
    made: torch.optim.Optimizer = (make or optimizer_factory(config))(settings)
    return made


def check_optimizers(config: Config, plugins: Plugins) -> None:
    """Let the optimizer of every stage take a step. ValueError, of one sentence, for one that
    cannot be made of its options, that keeps what a checkpoint does not hold, or that the sharding
    of the run forbids."""
    for stage in config.stages:
        where = f"stage {stage.name}, optimizer {stage.optimizer.type}"
        matrix, vector = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(2))
        groups, make = {"main": [matrix, vector]}, plugins.optimizers[stage.name]
        try:
            made = build_optimizer(groups, stage.optimizer, {id(matrix)}, make)
            before = settings_of(made)
            make_state(made, [matrix, vector])
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{where}: {error}") from None
        states = [pair for state in made.state.values() for pair in state.items()]
        lost = [name for name, value in states if not isinstance(value, Tensor)]
        lost += [name for name, value in settings_of(made).items() if before.get(name) != value]
        if lost:
            raise ValueError(
                f"{where} keeps {lost[0]} where no checkpoint holds it: it should be a tensor in"
                " the optimizer's state"
            )
        if config.training.sharding != "none" and isinstance(made, WHOLE):
            raise ValueError(
                f"{where} looks at whole matrices, but training.sharding"
                f" {config.training.sharding} cuts them: set it to none, or choose adamw"
            )


def settings_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The settings of all groups, by place and name."""
    groups = enumerate(optimizer.param_groups)
    return {f"{i}.{k}": v for i, group in groups for k, v in group.items() if k != "params"}


@torch.no_grad()
def make_state(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Let the optimizer make its state of these parameters and of no others, as a first step makes
    it: with its own names, shapes and devices. The values, and the parameters', are what a step of
    no gradient at no rate leaves: a checkpoint is to take their place."""
    rates = [group["lr"] for group in optimizer.param_groups]
    optimizer.state.clear()
    optimizer.zero_grad(set_to_none=True)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


# ---- those that are shipped ----------------------------------------------------------------------

#: AdamW in one kernel for all parameters of a group
adamw: Callable[..., torch.optim.Optimizer] = partial(torch.optim.AdamW, fused=True)


class Muon(torch.optim.Optimizer):
    """Muon for the matrices of the hidden layers, AdamW for the rest; one optimizer with one state.

    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) moves a matrix along the
    orthogonalised average of its gradients. It is meant for hidden layers, so groups that say
    ``hidden`` take it (`hidden_matrices`), and AdamW has embeddings, heads, convolutions, biases
    and norms. By default its steps are as large as AdamW's (``match_rms_adamw``: Liu et al. 2025,
    arXiv 2502.16982), so that one learning rate and one weight decay serve both.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str = "match_rms_adamw",
    ):
        groups = list(params)
        parts: dict[bool, Callable[[Any], torch.optim.Optimizer]] = {
            True: partial(
                torch.optim.Muon,
                lr=lr,
                momentum=momentum,
                nesterov=nesterov,
                ns_steps=ns_steps,
                adjust_lr_fn=adjust_lr_fn,
            ),
            False: partial(adamw, lr=lr, betas=betas, eps=eps),
        }
        found = {hidden: [g for g in groups if g["hidden"] == hidden] for hidden in parts}
        #: each part steps its own groups, which it has filled with its settings
        self.parts = {h: make(found[h]) for h, make in parts.items() if found[h]}
        super().__init__([g for part in self.parts.values() for g in part.param_groups], {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of both. The parts hold nothing: state and groups are this optimizer's."""
        assert closure is None
        for hidden, part in self.parts.items():
            part.state = self.state
            part.param_groups = [g for g in self.param_groups if g["hidden"] == hidden]
            part.step()


#: optimizers that look at a whole matrix, which a process has only a part of when it is sharded
WHOLE = (Muon, torch.optim.Muon, torch.optim.Adafactor)
