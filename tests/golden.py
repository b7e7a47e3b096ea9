"""The golden tensors of the official implementation, and our models loaded from its folders."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from unified.latents.weights import load_weights
from unified.modalities.text.vae import TextVAE
from unified.modalities.text.vae_config import TextVAEConfig
from unified.pipeline import UnifiedPipeline

FOLDER = Path(
    os.environ.get("COLA_GOLDEN", Path(__file__).parents[2] / "shared" / "golden" / "cola_dlm")
)
here = pytest.mark.skipif(
    not FOLDER.is_dir(), reason="no golden tensors: set COLA_GOLDEN to their folder"
)


class Golden:
    """One file of tensors, which remembers what was read."""

    def __init__(self, name: str):
        with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
            self.settings: dict[str, str] = file.metadata() or {}
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        self.unread = set(self.tensors)

    def __getitem__(self, key: str) -> Tensor:
        self.unread.discard(key)
        return self.tensors[key]

    def __contains__(self, key: str) -> bool:
        return key in self.tensors


def names(pattern: str) -> list[str]:
    """The files that match, without their ending."""
    return sorted(path.stem for path in FOLDER.glob(f"{pattern}.safetensors"))


def config(part: str) -> dict[str, Any]:
    return dict(json.loads((FOLDER / part / "config.json").read_text()))


def vae(part: str = "cola_vae", **changes: Any) -> TextVAE:
    """An official text VAE, with other settings where `changes` says so."""
    fields = {k: v for k, v in config(part).items() if k in TextVAEConfig.model_fields}
    network = TextVAE(TextVAEConfig(**(fields | changes)))
    load_weights(network, FOLDER / part)
    return network.eval()


@cache
def main_pipeline() -> UnifiedPipeline:
    """The main models, through the importer."""
    from unified.cola.official import from_official

    return from_official(FOLDER)


def pad(flat: Tensor, lengths: Tensor) -> Tensor:
    return pad_sequence(flat.split(lengths.tolist()), batch_first=True)


def unpad(padded: Tensor, lengths: Tensor) -> Tensor:
    return torch.cat([row[:n] for row, n in zip(padded, lengths.tolist(), strict=True)])


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=0)
