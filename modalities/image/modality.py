"""Images as a modality: pixels to a grid of latents, one per 16 x 16 cell, in row-major order.

An observation is uint8 [3, H, W] with H and W multiples of the cell, of any size and aspect:
observations of one size run through the network together. The network's own
Gaussians are shifted and scaled per channel by statistics fitted on data, so that everything
outside sees latents of about zero mean and unit variance.

Shape legend: B images, H height, W width, C channels, h and w the grid, L = h * w cells,
N cells of all images.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from einops import rearrange
from PIL import Image
from pydantic import Field, ValidationError, model_validator
from torch import Tensor

from unified.latents.critic import Critic
from unified.latents.measures import psnr, ssim
from unified.latents.modality import Modality, PluginConfig
from unified.latents.ragged import Latents, Posteriors, Ragged, numbers
from unified.latents.weights import write_text, written_whole
from unified.modalities.image import buckets, losses, pixels
from unified.modalities.image.adversarial import Adversarial
from unified.modalities.image.perceptual import Perceptual
from unified.modalities.image.vae import Codec, NetworkConfig, load_network, new_network
from unified.model.layers import wide

EXTRAS = "modality.json"
#: observations encoded at once while fitting statistics
FIT_BATCH = 32


class ImageConfig(PluginConfig):
    """Sizes, the network, and the weights of the loss terms."""

    #: observations have at most the area of a square with this side
    max_size: int = Field(256, ge=1)
    #: sides of squares; every image is brought to one of the few shapes of their areas (see
    #: `buckets`), with sides of a ratio up to `max_aspect`. Without, its own size decides
    buckets: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(None, min_length=1)
    max_aspect: float = Field(2.0, ge=1, allow_inf_nan=False)
    #: larger images are refused before they are decoded
    max_source_pixels: int = Field(64_000_000, ge=1)
    #: width C of a latent cell
    channels: int = Field(64, ge=1)
    #: shape of a new network; null with `pretrained`, whose folder says its own
    network: NetworkConfig | None = None
    #: folder or hub id (and folder inside it) of any `AutoencoderKL` in safetensors
    pretrained: str | None = None
    subfolder: str = ""
    #: p x p of the network's latents make one cell (2 for a codec of 8x and 16 channels)
    patch: int = Field(1, ge=1)
    #: whether training leaves the autoencoder alone; by default if it is `pretrained`
    frozen: bool | None = None
    #: weight of the KL divergence per cell, relative to the L1 error per colour value
    beta: float = Field(3e-5, ge=0)
    #: weight of the L1 error of differences between neighbouring pixels
    gradient_weight: float = Field(0.5, ge=0)

    @model_validator(mode="after")
    def _buckets_fit(self) -> ImageConfig:
        if self.buckets is not None and max(self.buckets) > self.max_size:
            raise ValueError(
                f"max_size {self.max_size} is less than the largest of the buckets,"
                f" {max(self.buckets)}: raise it to {max(self.buckets)}, or leave that bucket out"
            )
        return self

    @model_validator(mode="after")
    def _one_network(self) -> ImageConfig:
        if self.pretrained is None and self.subfolder:
            raise ValueError(f"subfolder {self.subfolder!r} needs pretrained, which is null")
        if self.pretrained is not None and self.network is not None:
            raise ValueError("pretrained brings its own network: set network to null, or drop one")
        if self.channels % self.patch**2:
            raise ValueError(
                f"channels {self.channels} must be a multiple of patch * patch, {self.patch**2}"
            )
        return self


class ImageModality(Modality):
    """RGB images over a `Codec`."""

    Config = ImageConfig
    critics: ClassVar[Mapping[str, type[Critic]]] = {
        "adversarial": Adversarial,
        "perceptual": Perceptual,
    }
    extensions: ClassVar[tuple[str, ...]] = ("webp", "png", "jpg", "jpeg", "gif")
    unit: ClassVar[str] = "pixels"
    component: ClassVar[str] = "Image"
    config: ImageConfig
    shift: Tensor
    scale: Tensor

    def __init__(self, config: ImageConfig, codec: Codec) -> None:
        super().__init__()
        if codec.channels != config.channels:
            raise ValueError(
                f"the codec makes cells of {codec.channels} channels at patch {config.patch}, but"
                f" channels is {config.channels}"
            )
        sizes = {"max_size": config.max_size, "bucket": min(config.buckets or [config.max_size])}
        for name, size in sizes.items():
            if size < codec.cell:
                raise ValueError(f"{name} {size} is less than one cell of {codec.cell}")
        self.config = config
        self.codec = codec
        self.register_buffer("shift", torch.zeros(config.channels))
        self.register_buffer("scale", torch.ones(config.channels))

    @property
    def channels(self) -> int:
        return self.config.channels

    @property
    def frozen(self) -> bool:
        """Whether training should leave this autoencoder alone."""
        given = self.config.frozen
        return self.config.pretrained is not None if given is None else given

    # ---- items and observations ------------------------------------------------------------------

    def read(self, data: bytes) -> Image.Image:
        return pixels.read_image(data, self.config.max_source_pixels)

    def observe(
        self, item: Any, *, block: int | None = None, ends: bool = False, limit: int | None = None
    ) -> Tensor:
        """A PIL image of any mode as uint8 [3, H, W].

        The image is scaled down (never up) to an area of at most `max_size` squared and cut to
        whole cells, or brought to a shape of the `buckets`. `ends` changes nothing, an image has
        no end to mark; ValueError if the cells do not fill whole blocks, since an image cannot be
        padded.
        """
        del ends
        if not isinstance(item, Image.Image):
            raise ValueError(f"an image must be a PIL.Image, but a {type(item).__name__} was found")
        upright = pixels.upright_rgb(item, self.config.max_source_pixels)
        observation = pixels.to_tensor(self._fitted(upright))
        rows, columns = self.grid(observation)
        if block is not None and rows * columns % block:
            raise ValueError(
                f"an image of {rows} x {columns} cells does not fill whole blocks of {block};"
                " an image is one single block (null)"
            )
        if limit is not None and rows * columns > limit:
            raise ValueError(
                f"an image of {rows} x {columns} cells is more than {limit}, and an image is never"
                " cut: lower max_size"
            )
        return observation

    def _fitted(self, image: Image.Image) -> Image.Image:
        config, cell = self.config, self.codec.cell
        if config.buckets is None:
            return pixels.fit_image(image, config.max_size, cell)
        sides = (image.height, image.width)
        height, width = buckets.bucket(*sides, config.buckets, cell, config.max_aspect)
        return pixels.cover(image, (width, height))

    def realise(self, observation: Tensor) -> Image.Image:
        return pixels.to_image(observation)

    def sheet(self, rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
        return pixels.tiled(rows)

    def write(self, item: Image.Image, path: Path) -> Path:
        target = path.with_name(f"{path.name}.png")
        item.save(target)
        return target

    @classmethod
    def check_output(cls, path: Path) -> None:
        if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
            raise ValueError(f"should end in an image format such as .png, found {path.name}")

    @classmethod
    def save_item(cls, item: Image.Image, path: Path) -> None:
        item.save(path)

    def grid_for(self, size: int | tuple[int, int] | None) -> tuple[int, ...]:
        """Cells of `size` pixels, (height, width) or one number for a square, at most `max_size`
        squared in area; by default a square of `max_size`."""
        cell, most = self.codec.cell, self.config.max_size
        whole = most // cell * cell if size is None else size
        sides = (whole, whole) if isinstance(whole, int) else tuple(whole)
        if len(sides) != 2 or not all(isinstance(side, int) for side in sides):
            raise ValueError(f"a size is one number of pixels or (height, width), found {size!r}")
        height, width = sides
        if min(height, width) < cell or height % cell or width % cell or height * width > most**2:
            raise ValueError(
                f"an image of {height} x {width} pixels cannot be made: both sides must be"
                f" multiples of {cell}, and the area at most {most} x {most}"
            )
        return height // cell, width // cell

    def grid(self, observation: Tensor) -> tuple[int, ...]:
        """(H / cell, W / cell)."""
        if observation.ndim != 3 or observation.shape[0] != 3:
            raise ValueError(
                f"an image observation is uint8 [3, H, W], but {list(observation.shape)} was found"
            )
        cell, (height, width) = self.codec.cell, observation.shape[1:]
        if height % cell or width % cell:
            raise ValueError(f"{height} x {width} pixels do not divide into cells of {cell}")
        return height // cell, width // cell

    # ---- the autoencoder -------------------------------------------------------------------------

    def encode(self, observations: Ragged) -> Posteriors:
        """Images of one size run through the network together."""
        return Posteriors.cat([self._encode(group) for group in observations.groups()])

    fidelity_unit: ClassVar[str] = "PSNR in dB"

    def fidelity(self, observation: Tensor, back: Tensor) -> float:
        """At most 99, for images that are equal."""
        return min(psnr(observation, back, peak=255), 99.0)

    measures: ClassVar[tuple[str, ...]] = ("psnr", "ssim")

    def measure(self, observation: Tensor, back: Tensor) -> dict[str, float]:
        """PSNR in dB, at most 99, and SSIM, at most 1."""
        similarity = ssim(observation, back, peak=255)
        return {"psnr": self.fidelity(observation, back), "ssim": similarity}

    def decode(self, latents: Latents) -> Ragged:
        decoded = [pixels.to_bytes(self._decode(*group)) for group in latents.groups()]
        runs = tuple((len(x_B3HW), tuple(x_B3HW.shape[1:])) for x_B3HW in decoded)
        return Ragged.flat(torch.cat([x_B3HW.flatten() for x_B3HW in decoded]), runs)

    def counts(self, observations: Ragged) -> dict[str, float]:
        """Colour values, differences of neighbouring colour values, and cells."""
        return {
            "reconstruction": float(numbers(observations.runs)),
            "gradient": float(sum(n * losses.neighbours(*s[1:]) for n, s in observations.runs)),
            "kl": float(numbers(self.grids(observations))),
        }

    def reconstruction(self, observations: Ragged, latents: Latents) -> dict[str, Tensor]:
        """L1 error of pixels in [-1, 1], and of the differences of neighbours, as sums."""
        return self.judged(observations, latents, ())

    def judged(
        self, observations: Ragged, latents: Latents, critics: Sequence[Critic]
    ) -> dict[str, Tensor]:
        decoded = [self._decode(*group) for group in latents.groups()]
        originals = [
            pixels.to_unit(bytes_B3HW, y_B3HW.dtype)
            for bytes_B3HW, y_B3HW in zip(observations.groups(), decoded, strict=True)
        ]
        pairs = list(zip(originals, decoded, strict=True))
        sums = {
            "reconstruction": torch.stack([losses.absolute_error(x, y) for x, y in pairs]).sum(),
            "gradient": torch.stack([losses.gradient_error(x, y) for x, y in pairs]).sum(),
        }
        for critic in critics:
            sums |= critic(originals, decoded)
        return sums

    def weights(self) -> dict[str, float]:
        return {
            "reconstruction": 1.0,
            "gradient": self.config.gradient_weight,
            "kl": self.config.beta,
        }

    def log_scale(self) -> Tensor:
        return -self.scale.log()

    @torch.no_grad()
    def fit_statistics(self, observations: Ragged) -> None:
        """Set shift and scale so that posterior samples of `observations` are standardised.

        The variance of a sample is that of the means plus the mean of the variances. ValueError for
        no observations.
        """
        if not len(observations):
            raise ValueError("latent statistics need at least one observation, but none was given")
        self.shift.zero_()
        self.scale.fill_(1)
        count, first_C, second_C = 0, torch.tensor(0.0), torch.tensor(0.0)
        for part in observations.parts(FIT_BATCH):
            posteriors = self.encode(part)
            mean_NC = posteriors.mean_NC.double().cpu()
            variance_NC = posteriors.logvar_NC.double().cpu().exp()
            count += len(mean_NC)
            first_C = first_C + mean_NC.sum(0)
            second_C = second_C + (mean_NC**2 + variance_NC).sum(0)
        shift_C = first_C / count
        # a channel that never varies keeps a finite scale
        scale_C = (second_C / count - shift_C**2).clamp_min(1e-12).sqrt()
        self.shift.copy_(shift_C)
        self.scale.copy_(scale_C)

    def _encode(self, bytes_B3HW: Tensor) -> Posteriors:
        """Posteriors of images of one size."""
        mean, logvar = self.codec.encode(pixels.to_unit(bytes_B3HW, self.codec.dtype))
        mean_NC, logvar_NC = (_cells(wide(z)) for z in (mean, logvar))
        runs = ((len(bytes_B3HW), self.grid(bytes_B3HW[0])),)
        return Posteriors(
            (mean_NC - self.shift) / self.scale, logvar_NC - 2 * self.scale.log(), runs
        )

    def _decode(self, z_BLC: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Pixels [B, 3, H, W] in about [-1, 1], differentiable, of latents of one grid."""
        h, w = grid
        z_BLC = z_BLC * self.scale + self.shift
        z_BChw = rearrange(z_BLC, "B (h w) C -> B C h w", h=h, w=w).to(self.codec.dtype)
        return wide(self.codec.decode(z_BChw))

    # ---- making, files ---------------------------------------------------------------------------

    @classmethod
    def build(cls, config: ImageConfig, corpus: Iterable[Any] | None) -> ImageModality:
        """A new modality; nothing is fitted to `corpus`. `pretrained` weights are read here."""
        del corpus
        if config.pretrained is not None:
            network = load_network(config.pretrained, config.subfolder)
        else:
            shape = config.network or NetworkConfig()
            network = new_network(shape, config.channels // config.patch**2)
        return cls(config, Codec(network, config.patch))

    def save_pretrained(self, folder: Path | str, name: str) -> None:
        """Write ``{name}_vae/``: a folder that `AutoencoderKL.from_pretrained` reads as well, with
        the configuration and the latent statistics beside it in ``modality.json``."""
        extras = {
            "config": self.config.model_dump(mode="json", exclude_unset=True),
            "shift": self.shift.tolist(),
            "scale": self.scale.tolist(),
        }
        with written_whole(Path(folder) / f"{name}_vae") as target:
            self.codec.network.save_pretrained(target)
            write_text(target / EXTRAS, json.dumps(extras, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: Path | str, name: str) -> ImageModality:
        """Read ``{name}_vae/``; ValueError says which file or tensor is missing or wrong."""
        source = Path(folder) / f"{name}_vae"
        config, shift_C, scale_C = _read_extras(source / EXTRAS)
        modality = cls(config, Codec(load_network(source), config.patch))
        modality.shift.copy_(shift_C)
        modality.scale.copy_(scale_C)
        return modality


def _cells(z_BChw: Tensor) -> Tensor:
    return rearrange(z_BChw, "B C h w -> (B h w) C")


def _read_extras(path: Path) -> tuple[ImageConfig, Tensor, Tensor]:
    """Configuration, shift and scale from ``modality.json``."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: the folder does not hold a saved image modality")
    try:
        extras = json.loads(path.read_text())
        config = ImageConfig(**extras["config"])
        shift_C, scale_C = torch.tensor(extras["shift"]), torch.tensor(extras["scale"])
    except (KeyError, TypeError, ValueError, ValidationError) as error:
        raise ValueError(f"{path} is not a saved image modality: {error}") from error
    for tensor, term in ((shift_C, "shift"), (scale_C, "scale")):
        if list(tensor.shape) != [config.channels]:
            raise ValueError(
                f"{path}: {term} must be {config.channels} numbers, but {list(tensor.shape)}"
                " was found"
            )
    return config, shift_C, scale_C
