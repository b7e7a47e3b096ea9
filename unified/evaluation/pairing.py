"""Does a condition matter? The loss of true pairs against that of permuted ones.

Every example lends its condition (all that is given, e.g. the caption of an image) to another one.
Timestep and noise stay the same, so the difference of an example's two losses is due to the
condition alone. A prior that ignores conditions gives differences of zero.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

from unified.evaluation.flow_loss import Encoded, EncodedItems, TargetLoss
from unified.evaluation.statistics import Interval, bootstrap
from unified.randomness import generator


def partners(groups: Sequence[Hashable], across: bool, seed: int = 0) -> list[int]:
    """For every example another one: of another group if `across`, else of its own.

    Within groups this is a permutation; across groups everyone lends as evenly as sizes allow.
    ValueError for an example that has no partner.
    """
    order = torch.randperm(len(groups), generator=generator(seed, "partners", across)).tolist()
    chosen = [-1] * len(groups)
    for group in dict.fromkeys(groups):
        members = [i for i in order if groups[i] == group]
        others = [i for i in order if groups[i] != group]
        lenders = others if across else members[1:] + members[:1]
        if not lenders or lenders == members:
            where = "outside" if across else "inside"
            raise ValueError(f"group {group!r} has no partner {where} it, to permute pairs with")
        for place, i in enumerate(members):
            chosen[i] = lenders[place % len(lenders)]
    return chosen


def repaired(encoded: Encoded, partner: Sequence[int], target: str) -> dict[str, EncodedItems]:
    """The same targets, each with everything else taken from its partner."""
    return {kind: items if kind == target else items.of(partner) for kind, items in encoded.items()}


def condition_matters(own: TargetLoss, other: TargetLoss) -> Interval:
    """Mean of (loss with another's condition) - (loss with the own one), with its interval.

    Above 0 the condition helps. Both losses must come from the same seed. An example's draws are
    averaged first, since they are not independent: one value an example is resampled.
    """
    return bootstrap((other.model_ED - own.model_ED).mean(1))
