"""Estimates of log p(x) from K posterior samples (paper eqs. 3.11-3.12 and 10.8-10.9).

With z_k ~ q(z | x) and ``log w_k = log p(x | z_k) + log p(z_k) - log q(z_k | x)``,

    ELBO-K = mean of log w_k        IWAE-K = log of the mean of w_k

Both are lower bounds in expectation if log w is exact, and IWAE-K rises to log p(x) with K. Noise
in log w, such as a Hutchinson trace's, leaves ELBO-K unbiased, but raises IWAE-K: it is averaged
after the exponential.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["elbo", "iwae"]


@dataclass(frozen=True)
class Estimate:
    """log p(x) in nats, and its standard error (nan for a single sample)."""

    value: float
    standard_error: float


def estimate(log_w_K: Tensor, estimator: Estimator = "elbo") -> Estimate:
    """ELBO-K or IWAE-K of `log_w_K` [K]. ValueError for K = 0 or weights that are not numbers."""
    count = len(log_w_K)
    if count == 0:
        raise ValueError("an estimate needs at least 1 posterior sample, found 0")
    if log_w_K.isnan().any():
        raise ValueError("a log weight is not a number: the density could not be computed")
    log_w_K = log_w_K.double()
    if estimator == "elbo":
        error = log_w_K.std() / math.sqrt(count) if count > 1 else torch.tensor(math.nan)
        return Estimate(float(log_w_K.mean()), float(error))
    if estimator != "iwae":
        raise ValueError(f"unknown estimator {estimator!r}; choose elbo or iwae")
    value = torch.logsumexp(log_w_K, 0) - math.log(count)
    relative = (log_w_K - value).exp()
    error = relative.std() / math.sqrt(count) if count > 1 else torch.tensor(math.nan)
    return Estimate(float(value), float(error))
