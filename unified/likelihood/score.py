"""How likely a response is after a prompt, block by block (paper 3.1.2, 10.2-10.3).

Noisy copies of all blocks stand beside the clean text, as in training, and each sees the clean
blocks before it:

    row:  [ clean z(1) z(2) ... z(B) | noisy z(1) z(2) ... z(B) ]

so one ODE gives ``log p(z(b) | z(<b))`` of every block at once. The score of block b is

    decoder  log p(x(b) | z(<=b))  +  prior  log p(z(b) | z(<b))  -  posterior  log q(z(b) | x)

averaged over posterior samples (10.21). In a block that the prompt ends in, the prompt's latents
are held clean and only the response's are counted. Densities are those of the encoder's own space:
the Jacobian of the latent normalisation is in the prior and in the posterior term, and cancels in
the sum.

A text that does not fill its last block is closed and padded as in training. The latents beyond its
end count in the prior and the posterior but stand for nothing that is scored, so that the sum stays
a bound: it is what a text of that beginning, with any end, has at least.

Shape legend: K posterior samples, B blocks, b latents of a block, L = B b, C channels, D = b C.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from unified.config.schema import DensityConfig
from unified.latents.modality import Modality, encode
from unified.latents.ragged import Latent
from unified.likelihood.bounds import Estimate, Estimator, estimate
from unified.likelihood.cnf import log_density
from unified.model.prior import Prior
from unified.randomness import derive, generator, noise
from unified.sequence.layout import Layout
from unified.sequence.packing import NoisyPlaces, PackedBatch, Sample, pack
from unified.sequence.visibility import Visibility


@dataclass(frozen=True)
class Terms:
    """Nats per posterior sample and block, [K, B] each."""

    prior: Tensor
    posterior: Tensor
    decoder: Tensor

    @property
    def log_w(self) -> Tensor:
        """Log importance weights [K]: the sum over blocks."""
        return (self.prior - self.posterior + self.decoder).sum(1)


@dataclass(frozen=True)
class Score:
    """A response after a prompt. All in nats; `blocks` holds each block's mean terms.

    `response` is the sum of the blocks' scores given the prompt's latents (10.19); `conditional` is
    `joint` minus `prefix`, two estimates of whole texts (10.12), and no bound.
    """

    tokens: int
    blocks: list[dict[str, float]]
    response: Estimate
    joint: Estimate
    prefix: Estimate | None
    conditional: float

    def perplexity(self, nats: float) -> float:
        """Per token, natural exponent."""
        return math.exp(min(-nats / self.tokens, 700.0))

    def as_json(self) -> dict[str, Any]:
        total = {name: sum(b[name] for b in self.blocks) for name in self.blocks[0]}
        return {
            **without_nan(asdict(self)),
            "total": total,
            "perplexity": {
                "response": self.perplexity(self.response.value),
                "conditional": self.perplexity(self.conditional),
                "decoder": self.perplexity(total["decoder"]),
            },
            "bits_per_token": -self.response.value / self.tokens / math.log(2),
        }


def without_nan(value: Any) -> Any:
    """`value` with None in place of numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


class Scorer:
    """Densities of texts under one task of a model (its target must be text with blocks)."""

    def __init__(
        self,
        prior: Prior,
        modality: Modality,
        layout: Layout,
        target: str,
        config: DensityConfig | None = None,
    ):
        segment = layout[target]
        if segment.block is None:
            raise ValueError(f"segment {target} has no blocks, so it has no score by block")
        self.prior, self.modality = prior.eval(), modality.eval()
        self.target, self.name, self.block = target, segment.modality, segment.block
        self.layout = layout.only({s.kind for s in layout.segments if target in (s.kind, s.copies)})
        self.config = config or DensityConfig()

    def terms(self, ids_T: Tensor, known: int, samples: int, seed: int) -> Terms:
        """The terms of all blocks that reach beyond the first `known` tokens of `ids_T`.

        A latent that holds both known tokens and others counts in full. Samples share the latents'
        chance by (seed, sample), so a text's terms do not depend on what else is scored.
        """
        if samples < 1:
            raise ValueError(f"a score needs at least 1 posterior sample, {samples} were asked for")
        whole = len(ids_T) % (self.block * self.modality.symbols) == 0
        closed_T = ids_T if whole else self.modality.close(ids_T)
        filled_T = self.modality.pad(closed_T, self.block, "right")
        with torch.no_grad():
            (posterior,) = encode(self.modality, [filled_T])
        length, channels = posterior.mean_NC.shape
        drawn = [noise((length, channels), seed, "posterior", k) for k in range(samples)]
        z_KLC = torch.stack([posterior.sample(eps_LC).values for eps_LC in drawn])
        held = known // self.modality.symbols
        free_L = torch.arange(length) >= held
        first = held // self.block
        log_q_KL = posterior.log_density(z_KLC) + self._jacobian()
        with torch.no_grad():
            latents = [Latent(z, (len(z),)) for z in z_KLC]
            told = (known, len(ids_T))
            log_x_KL = torch.stack(
                [self.modality.log_prob(filled_T, z, *told).to(log_q_KL) for z in latents]
            )
        prior_KB = self._prior(z_KLC, free_L, seed)
        free_KL = free_L.to(log_q_KL).expand_as(log_q_KL)
        return Terms(
            prior_KB[:, first:],
            self._by_block(log_q_KL * free_KL)[:, first:],
            self._by_block(log_x_KL)[:, first:],
        )

    def _prior(self, z_KLC: Tensor, free_L: Tensor, seed: int) -> Tensor:
        """log p(z(b) | z(<b)) [K, B] of the free latents."""
        samples, length, channels = z_KLC.shape
        field = Noisy(self, z_KLC, free_L)
        groups = z_KLC.reshape(samples * length // self.block, -1)
        free = free_L[None, :, None].expand(samples, -1, channels).reshape(groups.shape)
        density = log_density(field, groups, self.config, generator(seed, "probes"), free)
        return density.log_prob.unflatten(0, (samples, -1)) + self._by_block(
            (self._jacobian() * free_L).to(groups).expand(samples, -1)
        )

    def _by_block(self, x_KL: Tensor) -> Tensor:
        return x_KL.unflatten(1, (-1, self.block)).sum(-1)

    def _jacobian(self) -> float:
        """log |dz / d(encoder's output)| of one latent."""
        return float(self.modality.log_scale().sum())


class Noisy:
    """``velocity(z [K B, D], t)`` of all blocks, each after the clean ones before it."""

    def __init__(self, scorer: Scorer, z_KLC: Tensor, free_L: Tensor):
        self.scorer, self.shape = scorer, z_KLC.shape
        samples, length, _ = z_KLC.shape
        layouts = {"score": scorer.layout}
        rule = Visibility({"score": scorer.layout.sees})
        rows = [Sample("score", {scorer.target: (length,)})] * samples
        batch = pack(rows, layouts, rule, None, scorer.prior.config.axes).to(z_KLC.device)
        self.batch: PackedBatch = batch.with_latents({scorer.name: z_KLC.flatten(0, 1)})
        self.clean_NC = self.batch.latents[scorer.name]
        self.twins = NoisyPlaces(*batch.noisy[scorer.name]).at
        self.free = free_L.to(z_KLC).repeat(samples)

    def __call__(self, z_GD: Tensor, t: Tensor) -> Tensor:
        name = self.scorer.name
        z_NC = self.clean_NC.index_copy(0, self.twins, z_GD.reshape(-1, self.shape[-1]))
        time_RL = torch.zeros_like(self.batch.time_RL, dtype=z_GD.dtype)
        time_RL.view(-1)[self.batch.where[name][self.twins]] = t * self.free
        batch = replace(self.batch, latents={name: z_NC}, time_RL=time_RL)
        return self.scorer.prior(batch)[name][self.twins].to(z_GD.dtype).reshape(z_GD.shape)


def score(
    scorer: Scorer,
    prompt: Tensor | None,
    response: Tensor,
    samples: int = 8,
    estimator: Estimator = "elbo",
    seed: int = 0,
    ends: bool = True,
) -> Score:
    """Score the ids of `response` after those of `prompt` (None: from the beginning).

    The end mark counts as the response's last token if it `ends`. With the boundary ``lead``, a
    prompt is filled up to whole latents as generation does, so that none holds parts of both.
    """
    response = scorer.modality.close(response) if ends else response
    if prompt is not None and scorer.modality.boundary == "lead":
        prompt = scorer.modality.pad(prompt, 1, "lead")
    start = 0 if prompt is None else len(prompt)
    whole = response if prompt is None else torch.cat([prompt, response])
    here = scorer.terms(whole, start, samples, derive(seed, "response"))
    joint = estimate(scorer.terms(whole, 0, samples, derive(seed, "joint")).log_w, estimator)
    prefix = None
    if prompt is not None:
        terms = scorer.terms(prompt, 0, samples, derive(seed, "prefix"))
        prefix = estimate(terms.log_w, estimator)
    return Score(
        tokens=len(response),
        blocks=by_block(here),
        response=estimate(here.log_w, estimator),
        joint=joint,
        prefix=prefix,
        conditional=joint.value - (prefix.value if prefix else 0.0),
    )


def by_block(terms: Terms) -> list[dict[str, float]]:
    """The mean terms of every block."""
    parts: Mapping[str, Tensor] = {
        "prior": terms.prior,
        "posterior": terms.posterior,
        "decoder": terms.decoder,
    }
    means = {name: part.double().mean(0).tolist() for name, part in parts.items()}
    blocks = [dict(zip(means, row, strict=True)) for row in zip(*means.values(), strict=True)]
    return [b | {"score": b["decoder"] + b["prior"] - b["posterior"]} for b in blocks]
