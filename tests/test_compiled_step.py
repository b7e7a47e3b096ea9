"""Rows of one shape: what `pad_rows` is for."""

from __future__ import annotations

from itertools import count

import pytest
import tiny
import torch

from unified.config.schema import StageConfig
from unified.training.objectives.joint import JointBatch, JointObjective


def objective(**changes: object) -> tuple[JointObjective, list[JointBatch]]:
    """A joint objective with open gates, and eight batches of different sizes."""
    pipeline = tiny.pipeline()
    tiny.randomise(pipeline.prior)
    stage = StageConfig.model_validate(tiny.joint(row_length=64, **changes))
    layouts = {name: task.layout for name, task in pipeline.tasks.items()}
    made = JointObjective(
        pipeline.prior, pipeline.modalities, layouts, stage, pipeline.config.flow, 0
    )
    return made, [made.collate(tiny.examples(pipeline, 6 + k % 3), k) for k in range(8)]


def losses(of: JointObjective, batch: JointBatch) -> dict[str, float]:
    return {term: float(loss) for term, loss in of(batch).items()}


@torch.no_grad()
def test_padded_rows_have_one_shape_and_change_no_loss() -> None:
    plain, batches = objective()
    padded, same = objective(pad_rows=5)
    assert {batch.rows.shape for batch in same} == {(5, 64)}
    assert len({batch.rows.shape for batch in batches}) > 1
    for a, b in zip(batches, same, strict=True):
        assert a.counts == b.counts
        assert losses(padded, b) == pytest.approx(losses(plain, a), rel=1e-5)


def test_an_autoencoder_stage_has_no_rows_to_pad() -> None:
    with pytest.raises(ValueError, match="stage text_vae: pad_rows is of packed rows"):
        StageConfig.model_validate(tiny.autoencoder("text", pad_rows=4))


def test_compiled_blocks_meet_no_new_shape_after_the_second_step() -> None:
    made, batches = objective(pad_rows=5)
    wanted = [losses(made, batch) for batch in batches]
    graphs = count()

    def backend(graph: torch.fx.GraphModule, example: object) -> object:
        del example
        next(graphs)
        return graph.forward

    made.prior.compile(backend=backend, fullgraph=True)
    seen = []
    for batch, loss in zip(batches, wanted, strict=True):
        sums = made(batch)
        torch.stack(list(sums.values())).sum().backward()
        assert {k: float(v) for k, v in sums.items()} == pytest.approx(loss, rel=1e-4)
        seen.append(repr(graphs))
    assert seen[0] != repr(count())  # something was compiled
    assert len(set(seen[1:])) == 1  # the first step, and what differs in the second
