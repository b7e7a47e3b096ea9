"""From latents to tokens as they arrive: which token each logit vector becomes, block by block.

The decoder is causal over blocks of its own, so what it has read stays in its cache and each new
block of latents is decoded once. If its blocks do not divide the prior's, everything is decoded
again.

Shape legend: L latents, P tokens of a latent, T tokens of one piece (T = L P), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unified.latents.modality import Choice, Decoding
from unified.latents.ragged import Latent
from unified.modalities.text.layers import KVCache
from unified.model.layers import wide
from unified.randomness import generator

if TYPE_CHECKING:
    from unified.modalities.text.modality import TextModality


def penalise(logits_TV: Tensor, history: Tensor, penalty: float) -> Tensor:
    """Logits with every token of `history` made less likely, once, by a factor `penalty`."""
    if penalty == 1 or not len(history):
        return logits_TV
    seen = history.unique().to(logits_TV.device)
    chosen = logits_TV[:, seen]
    lowered = torch.where(chosen < 0, chosen * penalty, chosen / penalty)
    return logits_TV.index_copy(1, seen, lowered)


def probabilities(logits_TV: Tensor, choice: Choice) -> Tensor:
    """What a token is drawn from at a temperature above 0, [T, V].

    Top-k keeps what reaches the k-th logit; top-p then drops a token once those before it, best
    first, have more than p together, but never the best.
    """
    logits_TV = logits_TV / choice.temperature
    if 0 < choice.top_k < logits_TV.shape[-1]:
        least_T1 = logits_TV.topk(choice.top_k, dim=-1).values[:, -1:]
        logits_TV = logits_TV.masked_fill(logits_TV < least_T1, -torch.inf)
    if choice.top_p < 1:
        ordered, order = logits_TV.sort(dim=-1, descending=True)
        mass = ordered.softmax(-1)
        before = mass.cumsum(-1) - mass
        before[:, 0] = 0
        dropped = (before > choice.top_p).gather(-1, order.argsort(-1))
        logits_TV = logits_TV.masked_fill(dropped, -torch.inf)
    return logits_TV.softmax(-1)


def choose(
    logits_TV: Tensor, history: Tensor, choice: Choice, rng: torch.Generator | None
) -> Tensor:
    """Token ids [T], on the CPU: the best at temperature 0, else drawn with `rng`."""
    logits_TV = penalise(wide(logits_TV), history, choice.repetition_penalty)
    if choice.temperature < 1e-5:
        return logits_TV.argmax(-1).cpu()
    return torch.multinomial(probabilities(logits_TV, choice).cpu(), 1, generator=rng)[:, 0]


class TextDecoding(Decoding):
    """Tokens of several texts, each with its own history and its own chance.

    A text's history, for the repetition penalty, is what was decoded in earlier pieces: not the
    ``starts[i]`` latents it began with.
    """

    def __init__(
        self,
        modality: TextModality,
        choice: Choice,
        seeds: Sequence[int],
        starts: Sequence[int],
        block: int,
    ):
        super().__init__(modality)
        self.text, self.choice = modality, choice
        self.cache = None if block % modality.config.block_size else KVCache()
        self.rows = list(range(len(seeds)))
        self.rngs = [generator(seed, "tokens") for seed in seeds]
        self.tokens = [torch.zeros(0, dtype=torch.int64) for _ in seeds]
        #: tokens of each text that are not history
        self.given = [s * modality.config.patch_size for s in starts]

    @torch.no_grad()
    def extend(self, ids: Sequence[int], latents: Sequence[Latent]) -> list[Tensor]:
        for i, logits_TV in zip(ids, self._new_logits(ids, latents), strict=True):
            given = max(self.given[i] - len(self.tokens[i]), 0)
            history = self.tokens[i][self.given[i] :]
            known = logits_TV[:given].argmax(-1).cpu()
            made = choose(logits_TV[given:], history, self.choice, self.rngs[i])
            self.tokens[i] = torch.cat([self.tokens[i], known, made])
        return [self.tokens[i] for i in ids]

    def _new_logits(self, ids: Sequence[int], latents: Sequence[Latent]) -> list[Tensor]:
        """Logits [T, V] of each text's latents that were not decoded before."""
        patch = self.text.config.patch_size
        done = [len(self.tokens[i]) // patch for i in ids]
        if self.cache is None:
            logits_BTV = self.text.logits(latents)
            rows = zip(logits_BTV, done, latents, strict=True)
            return [row[n * patch : len(z.values) * patch] for row, n, z in rows]
        if list(ids) != self.rows:
            self.cache.keep_rows([self.rows.index(i) for i in ids])
            self.rows = list(ids)
        new = [
            Latent(z.values[n:], (len(z.values) - n,)) for z, n in zip(latents, done, strict=True)
        ]
        logits_BTV = self.text.logits(new, self.cache)
        return [row[: len(z.values) * patch] for row, z in zip(logits_BTV, new, strict=True)]
