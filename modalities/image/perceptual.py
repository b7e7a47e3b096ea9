"""The perceptual distance: how far apart a trained network's features of two images are.

    d(x, y) = sum over layers l of  mean over positions of  |u_l(x) - u_l(y)|^2

where u_l is layer l's feature vector at a position, scaled to length 1 (Zhang et al. 2018, without
their learned weights of channels). The network is any of torchvision's convolutional backbones,
frozen, with weights from a file of the user's: nothing is ever downloaded.

Shape legend: B images, H height, W width, F features of a layer, h and w its positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from unified.errors import did_you_mean, one_line
from unified.latents.critic import Critic
from unified.latents.modality import PluginConfig
from unified.latents.ragged import Ragged
from unified.latents.weights import assign, check_names, named_tensors, read_file
from unified.model.layers import wide

#: mean and standard deviation of colours in [0, 1] that torchvision's backbones were trained with
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: layers that are looked at unless the configuration names others: ends of resolutions
LAYERS: dict[str, tuple[str, ...]] = {
    "alexnet": tuple(f"features.{i}" for i in (1, 4, 7, 9, 11)),
    "vgg16": tuple(f"features.{i}" for i in (3, 8, 15, 22, 29)),
    "vgg19": tuple(f"features.{i}" for i in (3, 8, 17, 26, 35)),
    "squeezenet1_1": tuple(f"features.{i}" for i in (1, 4, 7, 9, 10, 11, 12)),
    **dict.fromkeys(
        ("resnet18", "resnet34", "resnet50"), ("relu", "layer1", "layer2", "layer3", "layer4")
    ),
}
#: counts steps of training and says nothing in evaluation mode; older files lack it
UNUSED = "num_batches_tracked"


class PerceptualConfig(PluginConfig):
    """Whose features, and what the distance weighs."""

    #: the name of a torchvision model
    backbone: str = "vgg16"
    #: its weights: a .safetensors file, or a .pth file of nothing but tensors
    weights: str
    #: nodes of the model, as torchvision's feature extraction names them
    layers: tuple[str, ...] | None = Field(None, min_length=1)
    #: weight of the distance per image, relative to the L1 error per colour value
    weight: float = Field(1.0, ge=0)

    @model_validator(mode="after")
    def _there_is_such_a_backbone(self) -> PerceptualConfig:
        import torchvision

        known = torchvision.models.list_models(module=torchvision.models)
        if self.backbone not in known:
            near = did_you_mean(self.backbone, known)
            raise ValueError(f"torchvision has no backbone {self.backbone!r}; {near}")
        if self.layers is None and self.backbone not in LAYERS:
            raise ValueError(
                f"layers must name the layers of {self.backbone} to look at; only"
                f" {', '.join(LAYERS)} have some by default"
            )
        if not self.path.is_file():
            raise ValueError(
                f"there is no weights file {self.path} for the perceptual term: give the weights"
                f" of torchvision's {self.backbone} (.safetensors or .pth); none are downloaded"
            )
        return self

    @property
    def path(self) -> Path:
        return Path(self.weights).expanduser()


class Perceptual(Critic):
    """The distance as a term, one number an image. The backbone always evaluates, never trains."""

    Config = PerceptualConfig
    config: PerceptualConfig
    mean: Tensor
    std: Tensor

    def __init__(self, config: PerceptualConfig) -> None:
        super().__init__(config)
        layers = config.layers or LAYERS[config.backbone]
        self.backbone = load_backbone(config.backbone, layers, config.path)
        for name, colours in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, torch.tensor(colours).view(3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> Perceptual:
        del mode
        super().train(False)
        return self

    def counts(self, observations: Ragged) -> dict[str, float]:
        """Images."""
        return {"perceptual": float(len(observations))}

    def forward(self, originals: Sequence[Tensor], decoded: Sequence[Tensor]) -> dict[str, Tensor]:
        pairs = zip(originals, decoded, strict=True)
        return {"perceptual": torch.cat([self._distances(x, y) for x, y in pairs]).sum()}

    def weights(self) -> dict[str, float]:
        return {"perceptual": self.config.weight}

    def _distances(self, x_B3HW: Tensor, y_B3HW: Tensor) -> Tensor:
        """One number for each pair of images of one size [B]."""
        with torch.no_grad():
            wanted = self.features(x_B3HW)
        found = self.features(y_B3HW)
        layers = [
            (x_BFhw - y_BFhw).square().sum(1).mean((1, 2))
            for x_BFhw, y_BFhw in zip(wanted, found, strict=True)
        ]
        return torch.stack(layers).sum(0)

    def features(self, x_B3HW: Tensor) -> list[Tensor]:
        """Features of length 1 [B, F, h, w], layer by layer, of pixels in [-1, 1]."""
        colours = ((x_B3HW + 1) / 2 - self.mean) / self.std
        return [F.normalize(wide(f), dim=1, eps=1e-6) for f in self.backbone(colours).values()]


def load_backbone(name: str, layers: Sequence[str], path: Path) -> nn.Module:
    """torchvision's model `name`, cut down to what `layers` need, with the weights at `path`.

    The file may hold the whole model, or only the part that is needed. ValueError for a layer that
    the model lacks, and for a tensor that is missing, unknown or of another shape.
    """
    from torchvision.models import get_model
    from torchvision.models.feature_extraction import (
        create_feature_extractor,
        get_graph_node_names,
    )

    with torch.random.fork_rng(devices=[]):
        model = get_model(name, weights=None).eval()
    for module in model.modules():
        if hasattr(module, "inplace"):
            module.inplace = False  # what overwrites its input would overwrite a layer's features
    nodes = get_graph_node_names(model)[1]
    for layer in layers:
        if not any(node == layer or node.startswith(f"{layer}.") for node in nodes):
            raise ValueError(f"{name} has no layer {layer!r}; {did_you_mean(layer, nodes)}")
    whole = named_tensors(model)
    extractor: nn.Module = create_feature_extractor(model, list(layers))
    needed = {n: t for n, t in named_tensors(extractor).items() if not n.endswith(UNUSED)}
    found = read_tensors(path)
    check_names({**{n: whole[n] for n in whole if n in found}, **needed}, found, path)
    assign(needed, {n: found[n] for n in needed}, path)
    return extractor


def read_tensors(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a .safetensors file, or of one that torch saved; nothing else is unpickled."""
    if path.suffix == ".safetensors":
        return read_file(path)
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises nearly anything
        raise ValueError(f"{path} cannot be read as a file of tensors: {one_line(error)}") from None
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise ValueError(f"{path} should hold a state dict, a mapping from names to tensors")
    return found
