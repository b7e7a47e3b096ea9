"""Bytes per device of one training step, by part.

    weights       float32, of what learns and of what rests (frozen autoencoders, references)
    gradients     float32, from the second microbatch of a step on
    buckets       the copy of the gradients that processes average (more than one device)
    optimizer     what the optimizer keeps of every parameter (two moments, for AdamW)
    ema           the averages, float32
    gathered      sharded: two units whole (the one at work and the next) with their gradients, and
                  the prior's parameters outside its blocks
    activations   alive when the forward pass ends; under autocast also the weights in bfloat16
    temporaries   what the peak of the step has above all that

Activations and temporaries are found by running the objective on fake tensors
(`unified.planning.imagined`), forward and backward, and the optimizer's state by letting it take a
step on them. Sharding divides weights that learn, gradients, optimizer and EMA by the number of
devices; what rests stays whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from unified.planning.imagined import DEVICE, Attention, Ledger, numbers
from unified.training.objectives.joint import JointBatch, JointObjective
from unified.training.optim import build_optimizer, hidden_matrices, learning_groups, make_state

FLOAT32 = 4


@dataclass(frozen=True)
class Step:
    """What a microbatch adds while it is computed, in bytes: `saved` is alive when the forward pass
    ends, `peak` at most."""

    saved: int
    peak: int


@dataclass(frozen=True)
class Memory:
    """Bytes per device, by part; see the module's docstring."""

    weights: int
    gradients: int
    buckets: int
    optimizer: int
    ema: int
    gathered: int
    activations: int
    temporaries: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def forward_only(objective: JointObjective, batch: JointBatch, precision: str) -> int:
    """Bytes that the forward pass of one microbatch leaves alive, on imagined modules."""
    return _run(objective, batch, precision, Attention(), backward=False).saved


def imagined_step(
    objective: JointObjective, batch: JointBatch, precision: str, keeps_mask: bool = False
) -> Step:
    """One microbatch forward and backward, on imagined modules whose gradients are there already.

    `keeps_mask` is how attention works on the CPU; see `Attention`.
    """
    return _run(objective, batch, precision, Attention(keeps_mask), backward=True)


def _run(
    objective: JointObjective,
    batch: JointBatch,
    precision: str,
    attention: Attention,
    backward: bool,
) -> Step:
    learners = [p for group in objective.groups().values() for p in group]
    for parameter in learners if backward else ():
        parameter.grad = torch.zeros_like(parameter)
    ledger = Ledger()
    ledger.ignore([*objective.parameters(), *objective.buffers()])
    ledger.ignore(p.grad for p in learners if p.grad is not None)
    autocast = torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "bf16")
    with attention, ledger:
        with autocast:
            losses = list(objective(batch).values())
        saved = ledger.alive
        if backward:
            torch.stack(losses).sum().backward()
    return Step(saved, ledger.peak)


def count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def optimizer_state(
    objective: JointObjective, make: Callable[..., Any] | None = None
) -> Mapping[str, int]:
    """Bytes of what the stage's optimizer keeps, by its names for it; single numbers are left out.

    The modules of `objective` are imagined, and so is the state; `make` is as `build_optimizer`
    has it.
    """
    config = objective.stage.optimizer
    groups, hidden = learning_groups(objective.groups(), config), hidden_matrices(objective)
    optimizer = build_optimizer(groups, config, hidden, make)
    with numbers():
        make_state(optimizer, [p for group in groups.values() for p in group])
    kept: Counter[str] = Counter()
    for state in optimizer.state.values():
        kept.update({name: t.nbytes for name, t in state.items() if t.ndim})
    return kept


def per_device(
    objective: JointObjective,
    step: Step,
    ema: bool,
    state: Mapping[str, int],
    devices: int = 1,
    sharded: bool = False,
) -> Memory:
    """Memory per device of training `objective`, replicated over `devices` or fully sharded;
    `state` is its `optimizer_state`."""
    learning = count(p for group in objective.groups().values() for p in group)
    resting = count(objective.parameters()) - learning
    parts = devices if sharded else 1
    mine = -(-learning // parts) * FLOAT32
    return Memory(
        weights=mine + resting * FLOAT32,
        gradients=mine,
        buckets=mine if devices > 1 and not sharded else 0,
        optimizer=sum(-(-size // (parts * FLOAT32)) * FLOAT32 for size in state.values()),
        ema=mine if ema else 0,
        gathered=_gathered(objective) if sharded and devices > 1 else 0,
        activations=step.saved,
        temporaries=step.peak - step.saved,
    )


def _gathered(objective: JointObjective) -> int:
    """Bytes of what is whole for a while: the two largest of the units that are gathered together
    (a block of the prior, an autoencoder that learns), with their gradients, and the rest of the
    prior."""
    blocks = [count(block.parameters()) for block in objective.prior.blocks]
    units: Sequence[int] = [
        *blocks,
        *(count(objective.modality(m).parameters()) for m in sorted(objective.learning)),
    ]
    rest = count(objective.prior.parameters()) - sum(blocks)
    return (2 * sum(sorted(units)[-2:]) + rest) * FLOAT32
