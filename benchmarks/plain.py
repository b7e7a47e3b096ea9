"""Generation by its definition, and slowly: what the fast path of `generation.py` must equal.

There is no cache. Each step of the ODE runs the prior over the whole sequence, clean and noisy
(N, and once more with the block alone, U), and each block decodes all latents again.

Shape legend: B prompts of one length, P tokens of a prompt, L latents so far, b latents of a block,
C channels, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from unified.config.schema import GenerationConfig
from unified.flow.solvers import schedule
from unified.flow.timesteps import round_timesteps
from unified.latents.modality import encode
from unified.latents.ragged import Latent
from unified.modalities.text.decoding import penalise
from unified.pipeline import UnifiedPipeline
from unified.sequence.packing import Sample, pack
from unified.sequence.visibility import UNCONDITIONAL, Visibility


@torch.no_grad()
def generate(
    pipeline: UnifiedPipeline, prompts_BP: Tensor, new: int, noise: Tensor, settings: Any
) -> list[list[int]]:
    """`new` greedy tokens for each prompt; `noise` [blocks, B, b, C] is where each block starts.

    For one token a latent, the Euler solver and plain guidance: `settings` are a
    `GenerationConfig`.
    """
    text: Any = pipeline.modalities["text"]
    block, known = noise.shape[2], prompts_BP.shape[1]
    z_BLC = torch.stack([p.mean_NC for p in encode(text, list(prompts_BP))])
    whole = known // block * block
    tokens_BT = prompts_BP[:, :0]  # what was decoded after the prompt's whole blocks
    for noise_BbC in noise:
        start = whole + tokens_BT.shape[1]
        z_BLC = one_block(pipeline, z_BLC[:, :start], z_BLC[:, start:], noise_BbC, settings)
        logits = text.logits([Latent(z, (len(z),)) for z in z_BLC])[:, start:]
        tokens_BT = torch.cat([tokens_BT, choose(logits, tokens_BT, known - start, settings)], 1)
    made = slice(known - whole, known - whole + new)
    return [row.tolist() for row in tokens_BT[:, made]]


def choose(logits: Tensor, past_BT: Tensor, known: int, settings: GenerationConfig) -> Tensor:
    """The best tokens [B, b]; the first `known` are the prompt's own, and feel no penalty."""
    rows = []
    for logits_bV, past_T in zip(logits, past_BT, strict=True):
        lowered = penalise(logits_bV, past_T, settings.repetition_penalty)
        own = torch.arange(len(logits_bV))[:, None] < known
        rows.append(torch.where(own, logits_bV, lowered).argmax(-1))
    return torch.stack(rows)


def one_block(
    pipeline: UnifiedPipeline, done: Tensor, known: Tensor, noise: Tensor, settings: Any
) -> Tensor:
    """`done` [B, L, C] and the next block after it, of which `known` [B, k, C] is held clean."""
    x_BbC = torch.cat([known, noise[:, known.shape[1] :]], dim=1)
    pinned_b = torch.arange(x_BbC.shape[1]) < known.shape[1]
    for t, t_next in pairwise(schedule(settings.num_steps, x_BbC, settings.time_shift)):
        time_b = torch.where(pinned_b, 0.0, round_timesteps(t, settings.round_timesteps))
        v = velocity(pipeline, done, x_BbC, time_b, "N")
        if settings.guidance_scale != 1:
            v_u = velocity(pipeline, done, x_BbC, time_b, UNCONDITIONAL)
            v = v_u + settings.guidance_scale * (v - v_u)
        x_BbC = x_BbC + (t_next - t) * v * ~pinned_b[:, None]
    return torch.cat([done, x_BbC], dim=1)


def velocity(
    pipeline: UnifiedPipeline, done: Tensor, x_BbC: Tensor, time_b: Tensor, kind: str
) -> Tensor:
    """The velocity [B, b, C] of the last block, as `kind`, by one forward over all of [C | N]."""
    layout = pipeline.tasks["continuation"].layout
    rule = Visibility({"continuation": layout.sees})
    values = torch.cat([done, x_BbC], dim=1)
    samples: Sequence[Sample] = [Sample("continuation", {"C": (values.shape[1],)}) for _ in values]
    batch = pack(samples, {"continuation": layout}, rule, None, pipeline.prior.config.axes)
    batch = batch.with_latents({"text": values.flatten(0, 1)})
    last = slice(-x_BbC.shape[1], None)
    time_RL, kinds = batch.time_RL.to(x_BbC), batch.coordinates.kind.clone()
    time_RL[:, last], kinds[:, last] = time_b, rule.kind_index[kind]
    batch = replace(batch, time_RL=time_RL, coordinates=replace(batch.coordinates, kind=kinds))
    v = pipeline.prior(batch)["text"].unflatten(0, (len(values), -1))
    return v[:, last]
