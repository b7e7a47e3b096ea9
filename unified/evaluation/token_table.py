"""Likelihood and generation side by side, token by token (paper 5.1, table 4).

A token is scored after the text before it: log q(z | x), log p(z | text before), log p(x | z), and
the perplexity that they give. Beside it stands what the model itself would say there, and how
likely a judge, any causal language model of the transformers library, finds either.

The density of one latent needs all latents of its block, unless it is the block's last. So the
text before is cut on the left until the token ends a block; with several tokens to a latent, the
latent that is scored also holds the tokens just before.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from unified.likelihood.score import Scorer, by_block
from unified.tables import table

if TYPE_CHECKING:
    from unified.pipeline import UnifiedPipeline


@dataclass(frozen=True)
class TokenRow:
    """One scored token. Densities in nats, means over posterior samples; `perplexity` is
    ``exp(posterior - prior - decoder)``. The judge's perplexities are None without a judge."""

    token: str
    posterior: float
    prior: float
    decoder: float
    perplexity: float
    generated: str
    judged_generated: float | None
    judged_token: float | None


class Judge:
    """A causal language model of the transformers library, from a folder; no code of it is run."""

    def __init__(self, folder: str):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self.model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{folder} holds no causal language model: {error}") from None

    @torch.no_grad()
    def perplexity(self, before: str, text: str) -> float:
        """Of the tokens of `text` after `before`; nan where either has none."""
        start = self.tokenizer(before, add_special_tokens=False).input_ids
        more = self.tokenizer(text, add_special_tokens=False).input_ids
        if not start or not more:
            return math.nan
        logits_TV = self.model(torch.tensor([start + more])).logits[0, len(start) - 1 : -1]
        found = logits_TV.float().log_softmax(-1).gather(1, torch.tensor(more)[:, None])
        return math.exp(-float(found.mean()))


def token_table(
    pipeline: UnifiedPipeline,
    text: str,
    words: Sequence[str],
    samples: int = 8,
    seed: int = 0,
    judge: Judge | None = None,
    **density: Any,
) -> list[TokenRow]:
    """A row for the first token of each of `words`, where it first stands in `text`.

    `density` holds settings of `DensityConfig`. ValueError for a word that the text does not have,
    or that stands so near its beginning that no block ends there.
    """
    scorer = pipeline.scorer(**density)
    return [_row(pipeline, scorer, *_found(text, w), samples, seed, judge) for w in words]


def _found(text: str, word: str) -> tuple[str, str]:
    """The text before `word`, and the word with the space in front of it."""
    found = re.search(rf" ?(?<!\w){re.escape(word)}(?!\w)", text) if word else None
    if found is None:
        raise ValueError(f"the word {word!r} is not in the text")
    return text[: found.start()], found[0]


def _row(
    pipeline: UnifiedPipeline,
    scorer: Scorer,
    before: str,
    word: str,
    samples: int,
    seed: int,
    judge: Judge | None,
) -> TokenRow:
    modality = scorer.modality
    start = modality.beginning(before)
    ids = modality.beginning(before + word)[: len(start) + 1]
    span = scorer.block * modality.symbols
    count = len(ids) // span * span
    if not count:
        raise ValueError(
            f"{word.strip()!r} is symbol {len(ids)} of the text, but a block has {span}: the text"
            " before it must fill the rest of one"
        )
    terms = scorer.terms(ids[-count:], count - 1, samples, seed)
    (scored,) = by_block(terms)
    (generated,) = pipeline.continue_text([before], max_new_tokens=1, seed=seed)
    token = modality.realise_all(ids[-1:])
    return TokenRow(
        token=token,
        posterior=scored["posterior"],
        prior=scored["prior"],
        decoder=scored["decoder"],
        perplexity=math.exp(min(-scored["score"], 700.0)),
        generated=generated,
        judged_generated=judge.perplexity(before, generated) if judge else None,
        judged_token=judge.perplexity(before, token) if judge else None,
    )


COLUMNS = (
    *("token", "log q(z|x)", "log p(z)", "log p(x|z)", "PPL"),
    *("generated", "judge: gen.", "judge: token"),
)


def as_table(rows: Sequence[TokenRow]) -> str:
    """The rows as the paper prints them."""
    cells: list[Sequence[str]] = [COLUMNS]
    for r in rows:
        terms = (f"{r.posterior:.2f}", f"{r.prior:.2f}", f"{r.decoder:.3g}", f"{r.perplexity:.4g}")
        judged = ("-" if j is None else f"{j:.3g}" for j in (r.judged_generated, r.judged_token))
        cells.append((repr(r.token), *terms, repr(r.generated), *judged))
    return table(cells, "r")
