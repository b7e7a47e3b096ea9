"""A training loop of one's own, from the parts: no run folder, no checkpoints, no processes.

    python examples/train_loop.py [STEPS]

What `unified train` adds to these lines is in `unified/training/loop.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch

from unified.config.loading import load_config
from unified.config.plugins import resolve_plugins
from unified.latents.tensors import moved
from unified.model.precision import current_device
from unified.pipeline import UnifiedPipeline
from unified.training.stages import Materials, Sources


def losses(config_name: str, overrides: list[str], steps: int) -> Iterator[float]:
    """The loss of each of `steps` steps of the last stage, on a new model."""
    config, device = load_config(config_name, overrides), current_device()
    plugins, sources, stage = resolve_plugins(config), Sources(config), config.stages[-1]
    corpora = {name: sources.corpus(name, plugins) for name in config.modalities}
    pipeline = UnifiedPipeline.build(config, corpora).to(device)
    materials = Materials(config, stage, pipeline, sources, plugins)
    materials.fit_statistics(set(config.modalities))  # latents of mean 0 and variance 1

    objective = materials.objective().to(device)
    data = materials.mixture(stage.batch_size, stage.name, collate=objective.collate)
    weights, (learning, *_) = objective.weights(0), objective.groups().values()
    optimizer = torch.optim.AdamW(learning, lr=stage.optimizer.lr)
    for step in range(steps):
        (batch,) = data.batch(step)
        sums = objective(moved(batch, device))  # term -> sum over positions
        loss = torch.stack([weights[k] * sums[k] / n for k, n in batch.counts.items()]).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


if __name__ == "__main__":
    for number, loss in enumerate(losses("quickstart.yaml", [], int((sys.argv[1:] or ["20"])[0]))):
        print(f"step {number}  loss {loss:.4f}")
