"""The optimizer, and who learns when.

The learning rate is a function of the step alone: a linear warmup, then a cosine over the stage's
`steps` down to ``final_lr_ratio * lr``. A cap on the steps cuts the cosine short and does not bend
it, so that a run that is stopped and continued is the run that was not stopped.

Parameters come in two groups: ``main`` learns at lr, ``vae`` (the autoencoders, in a joint stage)
at ``lr * vae_lr_ratio``. In interval mode (paper 4.3) the second group learns for some steps and
rests for some. Resting parameters require no gradient and have none, and AdamW passes over a
parameter without gradient: its moments, its weight decay and its average all stand still.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from unified.config.schema import IntervalConfig, OptimizerConfig

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


def build_optimizer(groups: Groups, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over `groups`. Weight decay is for matrices; biases and norm scales have none."""
    settings = []
    for name, parameters in groups.items():
        for decayed in (True, False):
            members = [p for p in parameters if (p.ndim >= 2) == decayed]
            decay = config.weight_decay if decayed else 0.0
            if members:
                rate = {"weight_decay": decay, "ratio": ratio(name, config)}
                settings.append({"params": members, **rate})
    return torch.optim.AdamW(settings, lr=config.lr, betas=config.betas, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group `lr` times its own ratio."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["ratio"]


def set_learning(parameters: Iterable[nn.Parameter], learning: bool) -> None:
    """Let these parameters learn, or rest."""
    for parameter in parameters:
        parameter.requires_grad_(learning)
