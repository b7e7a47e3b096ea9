"""One schema for every configuration file.

`unified.config.loading` reads it from YAML with ``extends:`` and dotted overrides; unknown keys are
errors that suggest the nearest known one. Plugins (modalities, tasks) own the schema of their part:
the part's ``type`` names the plugin, and the rest is validated by the plugin's own ``Config`` when
it is built (`unified.config.plugins`). Nothing here imports torch.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class PluginPart(BaseModel):
    """A plugin's part: ``type`` picks the class, all other keys are the class's own `Config`."""

    model_config = ConfigDict(extra="allow")
    type: str

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class RunConfig(Part):
    dir: str = "outputs/run"
    seed: int = 0


class PriorConfig(Part):
    """The MMDiT. Defaults of `mlp_ratio`, `norm_eps` and `qk_bias` are the official model's."""

    width: int = 384
    heads: int = 6
    head_dim: int = 64
    #: leading channels of each head that are rotated; the rest pass through
    rope_dim: int = 48
    #: axes of a position; each rotary frequency belongs to one
    axes: int = 3
    mlp_ratio: int = 4
    #: blocks with weights of their own per modality, then blocks that all modalities share
    multi_stream_depth: int = 0
    single_stream_depth: int = 8
    qk_bias: bool = False
    norm_eps: float = 1e-5


class SourceConfig(Part):
    """Shards by split, e.g. ``{train: [a.tar, b.tar], val: [c.tar]}``; paths are relative to the
    working directory, ``embedded:NAME`` is data that ships with the package, and any URL that
    webdataset can open is fetched (`DataConfig`)."""

    train: list[str]
    val: list[str] = []
    #: further splits to evaluate on, by name
    splits: dict[str, list[str]] = {}

    @property
    def all_splits(self) -> dict[str, list[str]]:
        """Name -> shards, of every split that has some."""
        named = {"train": self.train, "val": self.val, **self.splits}
        return {split: urls for split, urls in named.items() if urls}


class DataConfig(Part):
    sources: dict[str, SourceConfig] = {}
    #: an epoch with more than this share of bad examples is an error; fewer are skipped and counted
    max_bad_share: float = Field(0.01, ge=0, le=1)
    #: steps whose data is prepared ahead, in a thread; 0 prepares each step when it is due
    prefetch: int = Field(2, ge=0)
    #: processes that read and prepare examples, on each rank; 0 leaves it to that thread
    workers: int = Field(0, ge=0)
    #: examples within which the order is a random permutation: whole shards, which are shuffled too
    shuffle_buffer: int = Field(50_000, gt=0)
    #: where remote shards are copied to, and (None: no limit) how many GB of them are kept
    cache_dir: str = "~/.cache/unified/shards"
    cache_gb: float | None = Field(None, gt=0)
    #: whether a ``pipe:COMMAND`` URL may run its shell command
    allow_pipes: bool = False


class TimestepConfig(Part):
    """How a modality's timesteps are drawn in training (paper 16.9)."""

    distribution: Literal["logit_normal", "uniform"] = "logit_normal"
    #: without a number, the modality's own: for text by the width of its latents, else 0
    loc: float | None = Field(None, allow_inf_nan=False)
    scale: float = Field(1.0, ge=0)


class FlowConfig(Part):
    #: from latents to noise: straight, cosine, or a path to a class of one's own
    path: str = "straight"
    timesteps: dict[str, TimestepConfig] = {}
    #: rounding of the timestep (in units of 1/1000) before it is used
    round_timesteps: Literal["none", "integer", "bfloat16"] = "none"
    #: share of noisy blocks whose left part, of random length, stays clean (paper 5.2)
    clean_prefix_rate: float = Field(0.05, ge=0, le=1)
    #: gradient of the flow loss into the encoders; never through clean history (eq. 3.17)
    grad_through_noisy: bool = True
    grad_through_target: bool = True


class LossConfig(Part):
    """Weights of eq. 3.18. `beta` multiplies E[log q] here, and the KL in the autoencoder stage."""

    vae: float = Field(1.0, ge=0)
    fm: float = Field(1.0, ge=0)
    mask: float | None = None
    beta: float | None = None
    #: autoencoder stages: the KL comes in linearly over this many steps
    kl_warmup_steps: int = Field(0, ge=0)
    #: autoencoder stages: name -> options of what else judges the reconstructions; the modality
    #: says which critics there are
    critics: dict[str, dict[str, Any]] = {}
    ref: float = Field(0.0, ge=0)
    #: share of each modality in the flow loss
    modality: dict[str, Annotated[float, Field(ge=0)]] = {}


class AlignmentConfig(Part):
    """Alignment of the prior's features with those of a frozen encoder (REPA, arXiv 2410.06940)."""

    #: whose noisy positions are aligned; empty is the one modality whose items are no texts
    modality: str = ""
    #: "package.module:attribute", called with `options`; see `training.objectives.alignment`
    encoder: str
    options: dict[str, Any] = {}
    #: the features are those after this many blocks of the prior
    layer: int = Field(8, gt=0)
    weight: float = Field(0.5, ge=0, allow_inf_nan=False)
    #: width of the projection's hidden layers
    hidden: int = Field(2048, gt=0)


class OptimizerConfig(Part):
    #: adamw, muon, adafactor, or a path to a class or function of one's own
    #: (`unified.training.optim`)
    type: str = "adamw"
    #: what else it is made with, by the names of its own parameters
    options: dict[str, Any] = {}
    lr: float = Field(1e-3, gt=0)
    #: learning rate of the autoencoders in a joint stage, relative to `lr`; 0 freezes them
    vae_lr_ratio: float = Field(0.0, ge=0)
    #: of an optimizer that has them
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.01, ge=0)
    warmup_steps: int = Field(100, ge=0)
    #: the cosine ends at this share of `lr`
    final_lr_ratio: float = Field(0.05, ge=0, le=1)
    clip_grad_norm: float = Field(1.0, gt=0)


class IntervalConfig(Part):
    """Cycles of `train` steps with the autoencoders learning, then `freeze` steps without (4.3)."""

    train: int = Field(22, gt=0)
    freeze: int = Field(33, gt=0)


class StageConfig(Part):
    """One stage of training. ``autoencoder`` trains one modality's VAE, ``joint`` the prior (and,
    with ``optimizer.vae_lr_ratio`` above 0, the VAEs with it)."""

    name: str
    objective: Literal["autoencoder", "joint"]
    #: autoencoder stages: which modality, and the mixture of sources to read
    modality: str | None = None
    sources: dict[str, float] = {}
    #: autoencoder stages: a longer item gives a random part of this many latents (text)
    crop: int | None = Field(None, gt=0)
    steps: int = Field(gt=0)
    #: examples of one optimizer step, over all processes and accumulation steps
    batch_size: int = Field(32, gt=0)
    accumulate: int = Field(1, gt=0)
    #: positions of a packed row (joint stages)
    row_length: int = Field(256, gt=0)
    #: joint: rows are filled up to `row_length`, and with empty rows to a multiple of so many, so
    #: that compiled code meets the same shapes in every step; null packs as tightly as it can
    pad_rows: int | None = Field(None, gt=0)
    #: a sample longer than a row is a bad example, or its text is cut; both are counted
    too_long: Literal["error", "truncate"] = "error"
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: LossConfig = LossConfig()
    interval: IntervalConfig | None = None
    #: train the prior on posterior samples, or on posterior means
    posterior: Literal["sample", "mean"] = "sample"
    #: joint stages: align features of the prior with those of a frozen encoder
    alignment: AlignmentConfig | None = None

    @model_validator(mode="after")
    def _complete(self) -> StageConfig:
        if self.objective == "autoencoder" and not (self.modality and self.sources):
            raise ValueError(f"stage {self.name}: an autoencoder stage needs modality and sources")
        if self.objective == "autoencoder" and self.alignment:
            raise ValueError(
                f"stage {self.name}: alignment is of the prior's features, but an autoencoder"
                " stage trains no prior; it belongs in a joint stage"
            )
        if self.objective == "autoencoder" and self.pad_rows:
            raise ValueError(
                f"stage {self.name}: pad_rows is of packed rows, but an autoencoder stage has none;"
                " it belongs in a joint stage"
            )
        for key in ("kl_warmup_steps", "critics"):
            if self.objective == "joint" and getattr(self.loss, key):
                raise ValueError(
                    f"stage {self.name}: loss.{key} belongs to an autoencoder stage, and this one"
                    " is joint"
                )
        if self.loss.ref and not self.optimizer.vae_lr_ratio:
            raise ValueError(
                f"stage {self.name}: loss.ref holds learning autoencoders to a reference, but"
                " optimizer.vae_lr_ratio is 0, so none learns"
            )
        if self.interval and not self.optimizer.vae_lr_ratio:
            raise ValueError(
                f"stage {self.name}: interval alternates learning and resting autoencoders, but"
                " optimizer.vae_lr_ratio is 0, so none learns"
            )
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"stage {self.name}: batch_size {self.batch_size} must be a multiple of"
                f" accumulate {self.accumulate}"
            )
        return self


class EMAConfig(Part):
    decay: float = Field(0.999, ge=0, lt=1)
    #: the decay rises as (1 + step) / (warmup + step) until it reaches `decay`
    warmup: int = Field(10, ge=0)


class TrainingConfig(Part):
    #: a cap on the steps of every stage
    max_steps: int | None = Field(None, ge=0)
    save_every: int = Field(500, gt=0)
    log_every: int = Field(10, gt=0)
    validate_every: int = Field(500, gt=0)
    validation_examples: int = Field(64, gt=0)
    #: bf16 is autocast, with weights in float32; auto takes it where the device has the arithmetic
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    ema: EMAConfig | None = EMAConfig()
    trackers: list[str] = ["tensorboard"]
    #: functions of one's own, "package.module:function", whose values validation logs
    metrics: list[str] = []
    #: steps between samples of every task in the run folder; null writes none
    sample_every: int | None = Field(None, gt=0)
    #: several processes: each holds the whole model (none), or a part of it; hybrid cuts it within
    #: groups of `shard_size` processes (null: those of one machine)
    sharding: Literal["none", "full", "hybrid"] = "none"
    shard_size: int | None = Field(None, gt=0)
    #: compute each block of the prior again in the backward pass instead of keeping its inside
    activation_checkpointing: bool = False
    #: how the prior attends (`unified.model.attention`); auto is sdpa
    attention: Literal["auto", "sdpa", "flex", "varlen"] = "auto"
    #: compile the prior's blocks, which share their graphs
    compile: bool = False
    #: newest checkpoints of a stage that are kept, beside the best
    keep_checkpoints: int = Field(2, gt=0)
    #: write checkpoints while the next steps run
    background_checkpoints: bool = False
    #: stop when the running mean of the loss is this many times what it was at first; null never
    divergence: float | None = Field(3.0, gt=1)

    @model_validator(mode="after")
    def _groups(self) -> TrainingConfig:
        if self.shard_size is not None and self.sharding != "hybrid":
            raise ValueError(
                f"shard_size is {self.shard_size}, but sharding is {self.sharding}: only hybrid"
                " sharding has groups"
            )
        return self


class GenerationConfig(Part):
    """How things are generated; every call may set any of these."""

    #: steps of the ODE per block, how they are taken, and their spacing (1: equal)
    num_steps: int = Field(16, gt=0)
    solver: Literal["euler", "heun", "ab2"] = "euler"
    time_shift: float = Field(1.0, gt=0, allow_inf_nan=False)
    #: arithmetic of the networks (bf16 is autocast; null: as the caller has set it); the flow is
    #: integrated in float32 in any case
    precision: Literal["fp32", "bf16", "auto"] | None = None
    #: record a step of a block once, and replay it, on devices that can (CUDA graphs)
    graphs: bool = True
    #: rounding of the timestep that the network sees
    round_timesteps: Literal["none", "integer", "bfloat16"] = "none"
    #: a block goes straight on to its end when that should miss it by less than this share of its
    #: velocity, from how that changes (`unified.generation.guidance.Settling`); 0 takes every step
    settle: float = Field(0.0, ge=0, lt=1)
    #: v_u + guidance_scale (v_c - v_u) or another guider's rule, for t within the interval; at
    #: scale 1 and outside the interval there is no unconditional pass, and within it one in so many
    #: guided steps: the others keep v_c - v_u
    guidance_scale: float = Field(3.0, allow_inf_nan=False)
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    unconditional_every: int = Field(1, gt=0)
    guider: Literal["cfg", "zero_star", "adaptive_projected", "tangential"] = "cfg"
    #: what becomes of a prompt that ends inside a block (paper 5.2); for `partial`, the share of
    #: the steps that are guided (m) and how often each of them is taken (t)
    first_block: Literal["clean", "partial", "left", "right"] = "clean"
    repaint_share: float = Field(1.0, ge=0, le=1)
    repaint_times: int = Field(1, gt=0)
    #: latents of the prompt: the posterior's mean, or a sample of it
    prefix: Literal["mean", "sample"] = "mean"
    #: how tokens are chosen; temperature 0 takes the best, top_k 0 and top_p 1 keep all
    temperature: float = Field(0.0, ge=0, allow_inf_nan=False)
    top_k: int = Field(0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, allow_inf_nan=False)
    max_new_tokens: int = Field(32, gt=0)
    #: blocks, stopping and trimming as the official code has them: whole blocks, until all texts of
    #: the batch have ended, nothing cut off
    official: bool = False

    @property
    def guided(self) -> bool:
        """Whether any step needs an unconditional pass."""
        return self.guidance_scale != 1

    @model_validator(mode="after")
    def _interval(self) -> GenerationConfig:
        low, high = self.guidance_interval
        if not 0 <= low <= high <= 1:
            raise ValueError(
                "guidance_interval must be two timesteps with 0 <= first <= second <= 1, found"
                f" {low}, {high}"
            )
        return self

    @model_validator(mode="after")
    def _fresh_noise(self) -> GenerationConfig:
        held = self.unconditional_every > 1 or self.settle > 0
        if self.first_block == "partial" and held:
            raise ValueError(
                f"unconditional_every is {self.unconditional_every} and settle {self.settle}, but"
                " the steps of first_block partial draw fresh noise, so that nothing can be held"
                " from one to the next: leave them at 1 and 0"
            )
        return self


class DensityConfig(Part):
    """How the density of a flow is computed (paper 10.4)."""

    solver: Literal["euler", "heun", "rk4", "dopri5"] = "rk4"
    #: steps of a fixed-step solver; dopri5 chooses its own, to a relative and absolute tolerance
    num_steps: int = Field(16, gt=0)
    tolerance: float = Field(1e-5, gt=0, allow_inf_nan=False)
    trace: Literal["hutchinson", "exact"] = "hutchinson"
    probes: Literal["rademacher", "gaussian"] = "rademacher"
    #: probes that are averaged
    num_probes: int = Field(1, gt=0)


class Config(Part):
    """Everything that a run is."""

    run: RunConfig = RunConfig()
    modalities: dict[str, PluginPart]
    prior: PriorConfig = PriorConfig()
    tasks: dict[str, PluginPart]
    data: DataConfig = DataConfig()
    flow: FlowConfig = FlowConfig()
    training: TrainingConfig = TrainingConfig()
    stages: list[StageConfig] = []
    #: part (``prior``, ``text_vae``, ...) -> the checkpoint it starts from: a pipeline folder, or a
    #: folder of just that part
    init: dict[str, str] = {}
    generation: GenerationConfig = GenerationConfig()
