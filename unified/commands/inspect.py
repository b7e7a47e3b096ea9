"""``unified inspect``: what can be measured of a model's latent spaces."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import islice
from typing import TYPE_CHECKING, Annotated

import typer

from unified.commands.options import (
    AsJson,
    Checkpoint,
    Density,
    Seed,
    Trust,
    given,
    open_pipeline,
)
from unified.config.schema import DensityConfig

if TYPE_CHECKING:
    from torch import Tensor

    from unified.pipeline import UnifiedPipeline


app = typer.Typer(no_args_is_help=True, help="Measure a model's latent spaces.")

Shards = Annotated[list[str], typer.Option(help="Shards with items to look at; repeatable.")]
ModalityName = Annotated[
    str | None, typer.Option(help="Which of the model's modalities; by default its texts.")
]
Limit = Annotated[int, typer.Option(min=1, help="At most this many items.")]


def _observed(
    checkpoint: str, modality: str | None, shards: list[str], limit: int, trust: bool
) -> tuple[UnifiedPipeline, str, list[Tensor]]:
    """(pipeline, name of its modality, observations of the first `limit` items of `shards`)."""
    from unified.data.examples import Example
    from unified.data.source import Source
    from unified.errors import did_you_mean

    pipeline = open_pipeline(checkpoint, trust)
    found = pipeline.modalities
    if modality is None:  # the first whose items are texts, or the first
        modality = max(found, key=lambda name: found[name].is_text)
    if modality not in found:
        raise ValueError(f"the model has no modality {modality!r}; {did_you_mean(modality, found)}")
    examples = [Example(raw, found) for raw in islice(Source(modality, shards), limit)]
    observations = [found[modality].observe(e[modality], ends=True) for e in examples]
    return pipeline, modality, observations


@app.command("logsnr")
def logsnr(
    checkpoint: Checkpoint,
    shards: Shards,
    modality: ModalityName = None,
    limit: Limit = 256,
    as_json: AsJson = False,
    trust_remote_code: Trust = False,
) -> None:
    """Print the VAE logSNR, in nats: how sharp the posteriors are."""
    from unified.evaluation.reconstruction import posteriors
    from unified.evaluation.robustness import log_snr

    pipeline, name, observations = _observed(checkpoint, modality, shards, limit, trust_remote_code)
    measured = pipeline.modalities[name]
    value = log_snr(posteriors(measured, observations))
    told = {"modality": name, "items": len(observations), "log_snr": value}
    print(json.dumps(told) if as_json else f"{value:.3f} nats over {len(observations)} items")


@app.command("noise")
def noise(
    checkpoint: Checkpoint,
    shards: Shards,
    modality: ModalityName = None,
    levels: Annotated[str, typer.Option(help="Timesteps from 0 to 1000, e.g. 0,250,500.")] = "",
    limit: Limit = 256,
    seed: Seed = 0,
    as_json: AsJson = False,
    trust_remote_code: Trust = False,
) -> None:
    """Print how much of an item the decoder gives back of its noisy latents, by timestep."""
    from unified.evaluation.robustness import LEVELS, noise_robustness
    from unified.tables import table

    try:
        chosen = [float(part) for part in levels.split(",") if part] or list(LEVELS)
    except ValueError:
        raise ValueError(f"--levels should be numbers between commas, found {levels!r}") from None
    pipeline, name, observations = _observed(checkpoint, modality, shards, limit, trust_remote_code)
    measured = pipeline.modalities[name]
    curve = noise_robustness(measured, observations, chosen, seed, pipeline.path)
    if as_json:
        print(json.dumps([asdict(point) for point in curve], indent=2))
        return
    rows = [("timestep", f"{measured.fidelity_unit} (95% interval), {len(observations)} items")]
    for point in curve:
        f = point.fidelity
        rows.append((f"{point.timestep:g}", f"{f.mean:.4f} ({f.low:.4f} to {f.high:.4f})"))
    print(table(rows, "rl"))


@app.command("tokens")
def tokens(
    checkpoint: Checkpoint,
    text: Annotated[str, typer.Option(help="The text that the words stand in.")],
    word: Annotated[list[str], typer.Option(help="A word to score; repeatable.")],
    density: Density = None,
    samples: Annotated[int, typer.Option(help="Posterior samples.")] = 8,
    judge: Annotated[
        str | None, typer.Option(metavar="DIR", help="A causal language model's folder.")
    ] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
    trust_remote_code: Trust = False,
) -> None:
    """Print likelihood and generation side by side, token by token."""
    from unified.evaluation.token_table import Judge, as_table, token_table

    asked = Judge(judge) if judge else None
    pipeline = open_pipeline(checkpoint, trust_remote_code)
    rows = token_table(pipeline, text, word, samples, seed, asked, **given(DensityConfig, density))
    print(json.dumps([asdict(r) for r in rows], indent=2) if as_json else as_table(rows))
