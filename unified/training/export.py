"""From a checkpoint of a stage, whole or sharded, to a pipeline folder.

A checkpoint holds the tensors of the stage's objective, by names that begin with the part they
belong to; all else of a pipeline (configurations, tokenizers) is in what the stage started from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from torch import nn

from unified.config.plugins import Plugins, resolve_model
from unified.config.schema import Config, StageConfig
from unified.latents.weights import assign, named_tensors
from unified.pipeline import UnifiedPipeline
from unified.training import checkpoint
from unified.training.folder import RunFolder


def exported(
    path: Path, weights: Literal["ema", "raw"] = "ema", trust_remote_code: bool = False
) -> UnifiedPipeline:
    """The pipeline as it was at the checkpoint `path`, which lies in its run folder.

    With `weights` ``ema`` the averages take the place of what they average, where there are any.
    ValueError for a folder that is no checkpoint of a run.
    """
    stage_of(path)
    folder = RunFolder(path.absolute().parents[1])
    config = folder.stored_config()
    plugins = resolve_model(config, trust_remote_code, str(folder.config))
    return restored(plugins, config, path, weights)


def restored(
    plugins: Plugins, config: Config, path: Path, weights: Literal["ema", "raw"] = "ema"
) -> UnifiedPipeline:
    """`exported`, with the plugins that the run's `config` names."""
    folder, name = RunFolder(path.absolute().parents[1]), stage_of(path)
    stage = next(s for s in config.stages if s.name == name)
    pipeline = UnifiedPipeline.read_from(plugins, config, origin(folder, config, name))
    tensors = checkpoint.read(path, "model")
    averages = checkpoint.read(path, "ema") if weights == "ema" else {}
    found = tensors | averages
    for prefix, module in parts(stage, pipeline).items():
        own = {n: found[f"{prefix}.{n}"] for n in named_tensors(module) if f"{prefix}.{n}" in found}
        assign(named_tensors(module), own, path)
    pipeline.weights = "ema" if averages else "raw"
    return pipeline


def stage_of(path: Path) -> str:
    """The stage of a checkpoint. ValueError for a folder that is none."""
    state = checkpoint.read_state(path)
    if state is None:
        raise ValueError(
            f"{path} is not a whole checkpoint; it should be RUN/checkpoints/STAGE-STEP"
        )
    return str(state["stage"])


def origin(folder: RunFolder, config: Config, stage: str) -> Path:
    """Where the pipeline lies that `stage` begins with."""
    names = [s.name for s in config.stages]
    before = names[: names.index(stage)]
    return folder.stages / before[-1] if before else folder.initial


def parts(stage: StageConfig, pipeline: UnifiedPipeline) -> dict[str, nn.Module]:
    """How a stage's objective names the parts of the pipeline that it holds."""
    if stage.modality is not None:
        return {"modality": pipeline.modalities[stage.modality]}
    modalities = {f"modalities.{name}": m for name, m in pipeline.modalities.items()}
    return {"prior": pipeline.prior, **modalities}
