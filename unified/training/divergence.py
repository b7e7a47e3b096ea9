"""Whether a loss grows without end, judged by running means of its terms.

When the means have settled, they and their weights are set down. From then on the sum of just
those terms at just those weights is compared with what it was, in units of its size (the sum of
absolute values, since terms may be negative). So a term that joins late, or a weight that rises by
design, is no growth.
"""

from __future__ import annotations

from collections.abc import Mapping

#: weight of a step in the running means, and the steps after which they are set down
SMOOTHING, SETTLED = 0.02, 100

#: ``now`` (term -> running mean), and as set down: ``then`` and ``weights``
Trend = dict[str, dict[str, float]]


def follow(
    trend: Trend, step: int, losses: Mapping[str, float], weights: Mapping[str, float]
) -> None:
    """Add the losses of step `step` (from 0)."""
    now = trend.setdefault("now", {})
    for term, loss in losses.items():
        before = now.get(term, loss)
        now[term] = before + SMOOTHING * (loss - before)
    if step < SETTLED:
        trend["then"], trend["weights"] = dict(now), {term: weights[term] for term in now}


def growth(trend: Trend) -> float:
    """How much the sum has grown since it settled, in units of its size then: 0 is not at all."""
    then, weights = trend.get("then", {}), trend.get("weights", {})
    size = sum(abs(weights[term] * then[term]) for term in then)
    grown = sum(weights[term] * (trend["now"][term] - then[term]) for term in then)
    return grown / size if size else 0.0
