"""Likelihoods of the latent-variable model: the flow's density, bounds, scores of responses."""

from unified.config.schema import DensityConfig
from unified.likelihood.bounds import Estimate, estimate
from unified.likelihood.cnf import log_density
from unified.likelihood.score import Score, score

__all__ = ["DensityConfig", "Estimate", "Score", "estimate", "log_density", "score"]
