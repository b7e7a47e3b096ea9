"""Official Cola DLM checkpoints: folders in, folders out, tensor by tensor.

    cola_dit/   config.json, model.safetensors (or shards and their index)   <->   prior/
    cola_vae/   config.json, model.safetensors                               <->   text_vae/
    tokenizer.json                                                           <->   tokenizer/

The text VAE's tensors have the same names on both sides. The prior's are renamed by two tables. The
official files also store the rotary frequencies of every layer; they follow from the configuration,
so they are left out here and made again on the way back.

What the official models never vary is how our modules are: a configuration that says otherwise is
refused, naming the key.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unified.config.schema import Config
from unified.errors import validated
from unified.flow.path import Straight
from unified.latents.weights import assign_new, read_weights, save_tensors, written_whole
from unified.model.layers import ROPE_THETA
from unified.pipeline import UnifiedPipeline, read_json, write_json

DIT, VAE, CONFIG, TOKENIZER = "cola_dit", "cola_vae", "config.json", "tokenizer.json"

#: our name -> the official one, outside the blocks
OUTSIDE = {
    "project_in.text": "txt_in.proj",
    "timestep": "emb_in",
    "project_out.text.norm": "txt_out_norm",
    "project_out.text.modulation": "txt_out_ada.out_in.1",
    "project_out.text.proj": "txt_out.proj",
}
#: the same within block N: ``blocks.N.streams.shared.X`` and ``blocks.N.Y``
INSIDE = {
    "attention_in": "ada.msa_in.1",
    "attention_out": "ada.msa_out.1",
    "mlp_in": "ada.mlp_in.1",
    "mlp_out": "ada.mlp_out.1",
    "proj_qkv": "msa.proj_qkv",
    "proj_out": "msa.proj_out",
    "norm_q": "msa.norm_q",
    "norm_k": "msa.norm_k",
    "mlp": "mlp",
}
FREQUENCIES = "msa.rope.rope.freqs"

#: official key -> ours; the VAE's keys are the fields of `TextVAEConfig`
DIT_FIELDS = {
    "txt_dim": "width",
    "heads": "heads",
    "head_dim": "head_dim",
    "expand_ratio": "mlp_ratio",
    "num_layers": "single_stream_depth",
    "norm_eps": "norm_eps",
    "qk_bias": "qk_bias",
    "rope_dim": "rope_dim",
}
VAE_FIELDS = (
    "vocab_size", "encoder_num_blocks", "decoder_num_blocks", "dim", "ffn_dim", "latent_dim",
    "patch_size", "num_heads", "encoder_last_ln", "layer_norm_eps", "post_norm", "qk_bias",
    "qk_norm", "rope_theta", "bias", "act", "block_size", "scaling_factor", "shifting_factor",
)  # fmt: skip
#: what the modules are; an official configuration may say it, and nothing else
DIT_FIXED: dict[str, Any] = {"patch_size": 1}
VAE_FIXED: dict[str, Any] = {
    "shared_heads_kv": 1,
    "layer_norm_type": "layer_norm",
    "layer_norm_affine": True,
    "qk_norm_affine": True,
    "clip_qkv": None,
    "rope_full_precision": True,
    "block_causal": True,
    "use_variation": True,
    "dropout": 0.0,
    "attn_dropout": 0.0,
}
#: keys that change no forward pass, and what the official classes have there
VAE_UNREAD: dict[str, Any] = {
    "causal": False,
    "use_emb": True,
    "init_fn": "normal",
    "init_std": 0.02,
    "init_cutoff_factor": 3,
}
HUGGING_FACE = {
    "architectures", "dtype", "torch_dtype", "model_type", "transformers_version", "auto_map",
    "_name_or_path",
}  # fmt: skip
#: class defaults of the official configurations, where ours differ or have no such key
DIT_DEFAULTS = {
    "txt_in_channels": 16, "txt_out_channels": 16, "txt_dim": 2048, "emb_dim": 2048, "heads": 16,
    "head_dim": 128, "expand_ratio": 4, "num_layers": 24, "norm_eps": 1e-5, "qk_bias": False,
    "rope_dim": 96, "block_size": 4,
}  # fmt: skip
VAE_DEFAULTS = {"block_size": 4, "latent_dim": 16}

#: what an official checkpoint implies beside its tensors
CONTINUATION = {"type": "continuation", "source": "corpus"}
FLOW = {
    "timesteps": {"text": {"distribution": "logit_normal", "loc": 1.0, "scale": 1.0}},
    "round_timesteps": "bfloat16",
    "clean_prefix_rate": 0.05,
}
GENERATION = {
    "num_steps": 16,
    "guidance_scale": 7.0,
    "max_new_tokens": 32,
    "repetition_penalty": 1.1,
    "round_timesteps": "bfloat16",
}


# ---- official -> ours ---------------------------------------------------------------------------


def from_official(name: Path | str) -> UnifiedPipeline:
    """The model in an official folder (or a hub id that was downloaded before), text only.

    ValueError, naming file and key or tensor, for anything missing, unknown or of another shape.
    Without a ``tokenizer.json`` the model works on ids and cannot read text.
    """
    folder = find_parts(name)
    dit, vae = folder / DIT, folder / VAE
    fields = convert_fields(
        read_json(dit / CONFIG), read_json(vae / CONFIG), dit / CONFIG, vae / CONFIG
    )
    tokenizer = folder / TOKENIZER
    with torch.device("meta"):
        pipeline = build(fields, folder, tokenizer if tokenizer.is_file() else None)
    assign_new(network(pipeline), read_weights(vae), vae)
    ours = {official_name(n): n for n in pipeline.prior.state_dict()}
    found = {n: t for n, t in read_weights(dit).items() if not n.endswith(FREQUENCIES)}
    assign_new(pipeline.prior, {ours.get(n, n): t for n, t in found.items()}, dit)
    return pipeline


def find_parts(name: Path | str) -> Path:
    """The folder that holds ``cola_dit/`` and ``cola_vae/``: `name`, or its ``cola_dlm/``."""
    root = Path(name)
    if not root.exists() and str(name).count("/") == 1:
        root = cached_snapshot(str(name))
    for folder in (root, root / "cola_dlm"):
        if (folder / DIT).is_dir() and (folder / VAE).is_dir():
            return folder
    raise ValueError(f"{name} is no official checkpoint: it should hold {DIT}/ and {VAE}/")


def cached_snapshot(repo: str) -> Path:
    """Where the hub's cache on this machine keeps `repo`; nothing is downloaded."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, local_files_only=True))
    except (OSError, ValueError):
        raise ValueError(
            f"{repo} is no folder, and no hub id that was downloaded before; download it with"
            f" 'hf download {repo}'"
        ) from None


def build(fields: dict[str, Any], folder: Path, tokenizer: Path | None) -> UnifiedPipeline:
    """A pipeline of these settings without weights; the path of its tokenizer is not kept."""
    config = validated(Config, fields, origin=str(folder))
    if tokenizer is None:
        return UnifiedPipeline.build(config)
    text = {"text": fields["modalities"]["text"] | {"tokenizer": str(tokenizer)}}
    reading = validated(Config, fields | {"modalities": text}, origin=str(folder))
    pipeline = UnifiedPipeline.build(reading, {"text": []})
    pipeline.config = config
    return pipeline


def convert_fields(
    dit: Mapping[str, Any], vae: Mapping[str, Any], dit_file: Path, vae_file: Path
) -> dict[str, Any]:
    """Our settings for two official configurations. ValueError names file and key."""
    check_keys(dit, {*DIT_DEFAULTS}, DIT_FIXED, {}, dit_file)
    check_keys(vae, {*VAE_FIELDS}, VAE_FIXED, VAE_UNREAD, vae_file)
    dit = DIT_DEFAULTS | dict(dit)
    text = {"type": "text", **VAE_DEFAULTS, **{k: vae[k] for k in VAE_FIELDS if k in vae}}
    text["boundary"] = "right"  # official models never saw a lead
    wanted = {
        "emb_dim": ("txt_dim", dit["txt_dim"]),
        "txt_in_channels": ("the VAE's latent_dim", text["latent_dim"]),
        "txt_out_channels": ("the VAE's latent_dim", text["latent_dim"]),
    }
    for key, (other, value) in wanted.items():
        if dit[key] != value:
            raise ValueError(f"{dit_file}: {key} is {dit[key]}, but must equal {other}, {value}")
    return {
        "modalities": {"text": text},
        "prior": {ours: dit[key] for key, ours in DIT_FIELDS.items()} | {"multi_stream_depth": 0},
        "tasks": {"continuation": CONTINUATION | {"block": dit["block_size"]}},
        "flow": FLOW,
        "generation": GENERATION,
    }


def check_keys(
    found: Mapping[str, Any],
    fields: set[str],
    fixed: Mapping[str, Any],
    unread: Mapping[str, Any],
    file: Path,
) -> None:
    """ValueError for a key that is unknown, or says what the modules are not."""
    for key, value in found.items():
        if key in fixed and value != fixed[key]:
            raise ValueError(f"{file}: {key} is {value!r}, but only {fixed[key]!r} is supported")
        if key not in {*fields, *fixed, *unread, *HUGGING_FACE}:
            raise ValueError(f"{file}: unknown key {key}")


# ---- ours -> official ---------------------------------------------------------------------------


def has_tokenizer(pipeline: UnifiedPipeline) -> bool:
    """Without one, the model works on ids only."""
    text: Any = pipeline.modalities["text"]
    return bool(text.has_tokenizer)


def to_official(pipeline: UnifiedPipeline, folder: Path | str, max_shard_size: str = "5GB") -> None:
    """Write a text-only pipeline as an official folder: all of it, or nothing.

    ValueError for a model that the official code cannot hold.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; give a new folder")
    dit, vae = official_configs(pipeline)
    prior = {official_name(n): t for n, t in pipeline.prior.state_dict().items()}
    prior |= frequencies(pipeline)
    parts: list[tuple[str, dict[str, Any], dict[str, Tensor]]] = [
        (DIT, dit, prior),
        (VAE, vae, dict(network(pipeline).state_dict())),
    ]
    with written_whole(folder) as partial:
        for part, config, tensors in parts:
            (partial / part).mkdir()
            write_json(partial / part / CONFIG, config)
            save_tensors(tensors, partial / part, max_shard_size)
        text: Any = pipeline.modalities["text"]
        if text.has_tokenizer:
            text.tokenizer.core.save(str(partial / TOKENIZER))


def official_configs(pipeline: UnifiedPipeline) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two ``config.json`` of a text-only pipeline."""
    prior = pipeline.prior.config
    if list(pipeline.modalities) != ["text"] or "continuation" not in pipeline.tasks:
        raise ValueError(
            "an official checkpoint holds one modality named text and the task continuation, but"
            f" this model has {', '.join(pipeline.modalities)} and {', '.join(pipeline.tasks)}"
        )
    if prior.multi_stream_depth:
        raise ValueError(
            "an official prior has one stream, but this one has multi_stream_depth"
            f" {prior.multi_stream_depth}"
        )
    if not isinstance(pipeline.path, Straight):
        raise ValueError(
            "an official checkpoint has the straight path, but this model's flow.path is"
            f" {pipeline.config.flow.path!r}"
        )
    modality = pipeline.modalities["text"]
    if modality.config.log_snr is not None:
        raise ValueError(
            "an official Text VAE learns its variances, but this one's log_snr is held at"
            f" {modality.config.log_snr}"
        )
    channels = modality.channels
    dit = {
        "dtype": "float32",
        "model_type": "cola_dit",
        "architectures": ["ColaDiTModel"],
        **{theirs: getattr(prior, ours) for theirs, ours in DIT_FIELDS.items()},
        **DIT_FIXED,
        "emb_dim": prior.width,
        "txt_in_channels": channels,
        "txt_out_channels": channels,
        "block_size": pipeline.tasks["continuation"].config.block,
    }
    vae = {
        "dtype": "float32",
        "model_type": "cola_text_vae",
        "architectures": ["ColaTextVAEModel"],
        **{key: getattr(modality.config, key) for key in VAE_FIELDS},
        **VAE_FIXED,
        **VAE_UNREAD,
    }
    return dit, vae


def frequencies(pipeline: UnifiedPipeline) -> dict[str, Tensor]:
    """The rotary frequencies [rope_dim / 2] that the official prior stores in every layer."""
    dim, depth = pipeline.prior.config.rope_dim, pipeline.prior.config.single_stream_depth
    exponent = torch.arange(0, dim, 2)[: dim // 2].float() / dim
    return {f"blocks.{i}.{FREQUENCIES}": 1.0 / (ROPE_THETA**exponent) for i in range(depth)}


# ---- names --------------------------------------------------------------------------------------


def official_name(name: str) -> str:
    """The official name of one of our prior's tensors."""
    inside = re.fullmatch(r"(blocks\.\d+)\.streams\.shared\.(\w+)\.(.+)", name)
    if inside:
        block, part, rest = inside.groups()
        return f"{block}.{INSIDE[part]}.{rest}"
    for ours, theirs in OUTSIDE.items():
        if name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    raise ValueError(f"the tensor {name} has no official name")


def network(pipeline: UnifiedPipeline) -> nn.Module:
    """The text modality's autoencoder, whose tensors have the official names."""
    module = pipeline.modalities["text"].network
    assert isinstance(module, nn.Module)
    return module
