"""Bounds on a likelihood that is known, with exact and with estimated traces.

    python benchmarks/likelihood.py             # a table; --json for JSON

A flow with Gaussian marginals N(m, S) in three dimensions is the prior, and the decoder chooses one
of three symbols by a softmax of one projection of z. So log p(x) is a one-dimensional integral.
The posterior is wrong on purpose. ELBO-K and IWAE-K are averaged over many groups of K samples:
with the exact trace both stay below log p(x) in expectation; Hutchinson's noise in log w lifts
IWAE-K, since it is averaged after the exponential.
"""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

import torch
from torch import Tensor

from unified.likelihood import DensityConfig, estimate, log_density
from unified.randomness import generator

MEAN = torch.tensor([0.5, -1.0, 0.2], dtype=torch.float64)
FACTOR = torch.tensor([[0.8, 0.0, 0.0], [0.3, 0.5, 0.0], [-0.2, 0.1, 1.2]], dtype=torch.float64)
COVARIANCE = FACTOR @ FACTOR.T
#: logits of the three symbols are ``scale * (direction . z)``
DIRECTION = torch.tensor([1.0, 0.5, -0.7], dtype=torch.float64)
SCALES = torch.tensor([1.0, -0.4, -0.8], dtype=torch.float64)
SYMBOL = 0
#: the posterior: the prior's mean, moved, and its factor, widened
SHIFT, WIDTH = torch.tensor([0.5, 0.2, -0.3], dtype=torch.float64), 1.25


def velocity(z: Tensor, t: Tensor) -> Tensor:
    """``E[eps - z_0 | z_t]`` for z_0 ~ N(m, S): linear in z, with Gaussian marginals."""
    eye = torch.eye(3, dtype=z.dtype)
    gain = (t * eye - (1 - t) * COVARIANCE) @ torch.linalg.inv(
        t**2 * eye + (1 - t) ** 2 * COVARIANCE
    )
    return -MEAN + (z - (1 - t) * MEAN) @ gain.T


def log_decoder(projection: Tensor) -> Tensor:
    return (projection[:, None] * SCALES).log_softmax(-1)[:, SYMBOL]


def exact() -> float:
    """log p(x): the decoder depends on one Gaussian projection of z."""
    mean = float(DIRECTION @ MEAN)
    std = math.sqrt(float(DIRECTION @ COVARIANCE @ DIRECTION))
    u = torch.linspace(-14, 14, 40001, dtype=torch.float64)
    log_p = log_decoder(mean + std * u) - 0.5 * u**2 - 0.5 * math.log(2 * math.pi)
    return float(torch.logsumexp(log_p, 0) + math.log(28 / 40000))


def log_weights(count: int, config: DensityConfig, seed: int = 0) -> Tensor:
    """log w of `count` posterior samples (eq. 10.8)."""
    rng = generator(seed)
    factor = WIDTH * FACTOR
    posterior = torch.distributions.MultivariateNormal(MEAN + SHIFT, scale_tril=factor)
    z = MEAN + SHIFT + torch.randn(count, 3, generator=rng, dtype=torch.float64) @ factor.T
    prior = log_density(velocity, z, config, generator(seed, "probes")).log_prob
    return log_decoder(z @ DIRECTION) + prior - posterior.log_prob(z)


def averaged(log_w: Tensor, k: int, estimator: Any) -> tuple[float, float]:
    """Mean over groups of `k` samples, and its standard error."""
    values = torch.tensor([estimate(group, estimator).value for group in log_w.split(k)])
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))


def measure(samples: int, levels: list[int], seed: int) -> list[dict[str, Any]]:
    """One row per way to compute the trace, and K."""
    traces: dict[str, dict[str, Any]] = {
        "exact": {"trace": "exact"},
        "rademacher": {"probes": "rademacher"},
        "gaussian": {"probes": "gaussian"},
        "gaussian, 8 probes": {"probes": "gaussian", "num_probes": 8},
    }
    rows = []
    for name, options in traces.items():
        log_w = log_weights(samples, DensityConfig(num_steps=24, **options), seed)
        for k in levels:
            elbo, iwae = (averaged(log_w, k, e) for e in ("elbo", "iwae"))
            rows.append({"trace": name, "k": k, "elbo": elbo, "iwae": iwae})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--samples", type=int, default=65536)
    parser.add_argument("--k", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows, truth = measure(args.samples, args.k, args.seed), exact()
    if args.json:
        print(json.dumps({"log_likelihood": truth, "rows": rows}, indent=2))
        return
    print(f"log p(x) = {truth:.4f}; distance to it, in nats, with its standard error\n")
    print("| trace | K | ELBO-K | IWAE-K |\n|---|---|---|---|")
    for row in rows:
        cells = [f"{row[e][0] - truth:+.4f} ({row[e][1]:.4f})" for e in ("elbo", "iwae")]
        print(f"| {row['trace']} | {row['k']} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
