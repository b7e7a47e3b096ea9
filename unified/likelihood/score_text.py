"""A score as a table to read."""

from __future__ import annotations

from unified.likelihood.score import Score
from unified.tables import table

COLUMNS = ("decoder", "prior", "posterior", "score")


def as_table(score: Score) -> str:
    """Nats by block, their sum, the estimates and the perplexities."""
    told = score.as_json()
    named = [(str(i), block) for i, block in enumerate(score.blocks, 1)] + [("sum", told["total"])]
    blocks = [(name, *(f"{block[c]:.3f}" for c in COLUMNS)) for name, block in named]
    estimates = [
        (f"{name}:", f"{found.value:.3f} +- {found.standard_error:.3f} nats")
        for name in ("response", "joint", "prefix")
        if (found := getattr(score, name)) is not None
    ]
    ppl = ", ".join(f"{name} {value:.4g}" for name, value in told["perplexity"].items())
    estimates += [
        ("conditional:", f"{score.conditional:.3f} nats (joint - prefix)"),
        ("perplexity:", f"{ppl} over {score.tokens} tokens"),
    ]
    return f"{table([('block', *COLUMNS), *blocks], 'r')}\n\n{table(estimates, 'rl')}"
