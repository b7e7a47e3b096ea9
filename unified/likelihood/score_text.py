"""A score as a table to read."""

from __future__ import annotations

from unified.likelihood.score import Score

COLUMNS = ("decoder", "prior", "posterior", "score")


def as_table(score: Score) -> str:
    """Nats by block, their sum, the estimates and the perplexities."""
    told = score.as_json()
    lines = [f"{'block':>9}" + "".join(f"{name:>12}" for name in COLUMNS)]
    rows = [(str(i), block) for i, block in enumerate(score.blocks, 1)] + [("sum", told["total"])]
    lines += [f"{name:>9}" + "".join(f"{b[c]:12.3f}" for c in COLUMNS) for name, b in rows]
    for name in ("response", "joint", "prefix"):
        found = getattr(score, name)
        if found is not None:
            lines.append(f"{name:>11}: {found.value:.3f} +- {found.standard_error:.3f} nats")
    lines.append(f"conditional: {score.conditional:.3f} nats (joint - prefix)")
    ppl = ", ".join(f"{name} {value:.4g}" for name, value in told["perplexity"].items())
    lines.append(f" perplexity: {ppl} over {score.tokens} tokens")
    return "\n".join(lines)
