"""Stored latents: what frozen autoencoders make of an example, so that training need not ask them.

A shard of latents has one member per example, ``KEY.latents``, in safetensors: the posterior of
every kind of one task (``C/mean``, ``C/logvar``, ``C/grid``; of what may begin at several phases,
``C@1/mean`` and so on), and in its metadata a fingerprint of each autoencoder. A task that reads an
example with such a member takes the posteriors in the place of its observations.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from unified.latents.modality import Modality
from unified.latents.ragged import Posteriors
from unified.latents.weights import named_tensors

#: ending of the member
LATENTS = "latents"
#: bytes that say how long a safetensors header is
LENGTH = 8


def fingerprint(modality: Modality) -> str:
    """What tells an autoencoder, statistics included, from another."""
    digest = hashlib.sha256()
    for name, tensor in sorted(named_tensors(modality).items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def to_bytes(
    posteriors: Mapping[str, Posteriors], encoders: Mapping[str, str], dtype: torch.dtype
) -> bytes:
    """The member of one example; `encoders` is modality -> fingerprint."""
    tensors: dict[str, Tensor] = {}
    for kind, posterior in posteriors.items():
        tensors[f"{kind}/mean"] = posterior.mean_NC.to("cpu", dtype).contiguous()
        tensors[f"{kind}/logvar"] = posterior.logvar_NC.to("cpu", dtype).contiguous()
        tensors[f"{kind}/grid"] = torch.tensor(posterior.grid)
    return save(tensors, {"encoders": json.dumps(dict(encoders))})


def from_bytes(data: bytes, encoders: Mapping[str, str]) -> dict[str, Posteriors]:
    """Kind (and phase) -> posterior in float32. ValueError for bytes that are no such member, and
    for latents that other autoencoders than `encoders` made."""
    try:
        tensors = load(data)
        header = json.loads(data[LENGTH : LENGTH + int.from_bytes(data[:LENGTH], "little")])
        made_by = json.loads(header["__metadata__"]["encoders"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f".{LATENTS} does not hold stored latents ({error})") from None
    for name, mark in made_by.items():
        if encoders.get(name) != mark:
            raise ValueError(
                f".{LATENTS} was made by another {name} autoencoder ({mark}) than this run's"
                f" ({encoders.get(name)}): start from the one beside the latents with"
                f" init.{name}_vae, or make them again with unified data encode"
            )
    return {
        kind: Posteriors(
            tensors[f"{kind}/mean"].float(),
            tensors[f"{kind}/logvar"].float(),
            ((1, tuple(tensors[f"{kind}/grid"].tolist())),),
        )
        for kind in {name.rpartition("/")[0] for name in tensors}
    }


def phased(kind: str, lead: int) -> str:
    """The name of a kind that begins at phase `lead`."""
    return f"{kind}@{lead}" if lead else kind
