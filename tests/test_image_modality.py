"""Images: hostile bytes are refused, sizes and order are kept, latents are standardised, folders
round-trip and are diffusers' own, losses agree with their definition."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from batched import both, ragged
from PIL import Image
from safetensors.torch import load_file, save_file

from unified.latents.modality import decode, encode, modes
from unified.latents.ragged import Latent, Ragged
from unified.modalities.image import losses, pixels
from unified.modalities.image.modality import ImageModality

SIZES = [(64, 64), (32, 48), (64, 64), (96, 16), (32, 48)]
NETWORK = {
    "block_out_channels": (8, 8, 8, 8, 8),
    "layers_per_block": 1,
    "norm_groups": 4,
    "attention": False,
}


def make(**options: object) -> ImageModality:
    torch.manual_seed(0)
    options = {"max_size": 64, "network": NETWORK, **options}
    return ImageModality.build(ImageModality.Config(**options), None).eval()


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    numbers = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(numbers)


def as_bytes(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.fixture(scope="module")
def modality() -> ImageModality:
    return make()


@pytest.fixture(scope="module")
def observations(modality: ImageModality) -> list[torch.Tensor]:
    return [modality.observe(picture(*size, seed)) for seed, size in enumerate(SIZES)]


# ---- reading -------------------------------------------------------------------------------------


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""

    def chunk(body: bytes) -> bytes:
        return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))

    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(header) + chunk(b"IDAT" + zlib.compress(b""))


@pytest.mark.parametrize("size", [(9_000, 9_000), (60_000, 60_000)])
def test_bombs_are_refused_from_the_header(modality: ImageModality, size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="pixels"):
        modality.read(png_header(*size))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_damaged_bytes_are_value_errors(modality: ImageModality, kind: str) -> None:
    data = as_bytes(picture(64, 64), kind)
    for length in (0, 1, 10, len(data) // 2):
        with pytest.raises(ValueError, match=r"bytes|damaged"):
            modality.read(data[:length])


def test_postscript_is_not_interpreted(modality: ImageModality) -> None:
    with pytest.raises(ValueError, match="are no WebP"):
        modality.read(as_bytes(picture(16, 16), "EPS"))


def test_rotation_is_applied(modality: ImageModality) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter
    image = modality.read(as_bytes(picture(32, 16), "JPEG", exif=exif))
    assert image.size == (16, 32)


def test_transparency_shows_white(modality: ImageModality) -> None:
    clear = [
        Image.new("RGBA", (16, 16), (0, 0, 0, 0)),
        Image.new("LA", (16, 16), (0, 0)),
    ]
    palette = Image.new("P", (16, 16), 0)
    files = [as_bytes(image) for image in clear] + [as_bytes(palette, transparency=0)]
    for data in files:
        assert modality.observe(modality.read(data)).unique().tolist() == [255]


def test_other_modes_become_8_bit_rgb(modality: ImageModality) -> None:
    deep = Image.fromarray(np.full((16, 16), 65535 // 2, dtype=np.uint16))
    assert modality.observe(modality.read(as_bytes(deep))).unique().tolist() == [127]
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red = modality.observe(cmyk)[:, 0, 0].tolist()
    assert red == [255, 0, 0]
    with pytest.raises(ValueError, match="floating-point"):
        modality.observe(Image.new("F", (16, 16)))


def test_first_frame_of_an_animation(modality: ImageModality) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("white", "black")]
    data = as_bytes(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert modality.observe(modality.read(data)).float().mean() == 255


# ---- fitting -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size", [(64, 64), (640, 480), (70, 50), (2000, 20), (17, 900), (512, 512)]
)
def test_fitted_sizes(modality: ImageModality, size: tuple[int, int]) -> None:
    observation = modality.observe(picture(*size))
    rows, columns = modality.grid(observation)
    assert observation.shape == (3, 16 * rows, 16 * columns)
    assert 1 <= rows * columns <= 16
    assert 16 * columns <= size[0]
    assert 16 * rows <= size[1]


def test_nothing_is_squashed(modality: ImageModality) -> None:
    """A disc stays a disc: as wide as high within a pixel, in a scaled-down landscape."""
    yy, xx = np.mgrid[:300, :450]
    disc = ((xx - 225) ** 2 + (yy - 150) ** 2 < 100**2).astype(np.uint8) * 255
    inside = modality.observe(Image.fromarray(disc).convert("RGB"))[0] > 127
    high, wide = inside.any(1).sum().item(), inside.any(0).sum().item()
    assert abs(high - wide) <= 1


def test_a_fitting_image_keeps_every_pixel(modality: ImageModality) -> None:
    image = picture(48, 32)
    observation = modality.observe(image)
    assert np.array_equal(np.asarray(modality.realise(observation)), np.asarray(image))
    cut = modality.observe(picture(51, 37))
    whole = torch.from_numpy(np.array(picture(51, 37))).permute(2, 0, 1)
    assert torch.equal(cut, whole[:, 2:34, 1:49])


@pytest.mark.parametrize("item", ["a string", Image.new("RGB", (15, 64))])
def test_what_cannot_be_observed(modality: ImageModality, item: object) -> None:
    with pytest.raises(ValueError, match=r"PIL|16 or more"):
        modality.observe(item)


def test_blocks_must_be_whole(modality: ImageModality) -> None:
    assert modality.observe(picture(64, 64), block=8).shape == (3, 64, 64)
    with pytest.raises(ValueError, match="whole blocks of 5"):
        modality.observe(picture(64, 64), block=5)


# ---- the autoencoder -----------------------------------------------------------------------------


def test_sizes_mix_and_order_is_kept(
    modality: ImageModality, observations: list[torch.Tensor]
) -> None:
    posteriors = encode(modality, observations)
    decoded = decode(modality, modes(posteriors))
    for observation, posterior, pixels_3HW in zip(observations, posteriors, decoded, strict=True):
        (alone,) = encode(modality, [observation])
        assert posterior.grid == modality.grid(observation)
        torch.testing.assert_close(posterior.mean_NC, alone.mean_NC, rtol=1e-4, atol=1e-5)
        assert pixels_3HW.shape == observation.shape
        assert pixels_3HW.dtype == torch.uint8


def test_losses_add_up_over_any_split(
    modality: ImageModality, observations: list[torch.Tensor]
) -> None:
    whole = modality.loss(*both(modality, observations))
    parts = [modality.loss(*both(modality, [o], [i])) for i, o in enumerate(observations)]
    for term, value in whole.items():
        torch.testing.assert_close(sum(p[term] for p in parts), value, rtol=1e-4, atol=1e-3)
    counts = modality.counts(ragged(modality, observations))
    assert whole.keys() == counts.keys() == modality.weights().keys()
    assert counts["reconstruction"] == 3 * sum(w * h for w, h in SIZES)
    assert counts["kl"] == sum(w * h for w, h in SIZES) / 256


def test_gradient_error_by_hand() -> None:
    x, y = torch.zeros(1, 3, 2, 3), torch.zeros(1, 3, 2, 3)
    x[0, 0] = torch.tensor([[0.0, 1.0, 3.0], [0.0, 0.0, 0.0]])
    # across: 1 + 2 + 0 + 0, down: 0 + 1 + 3
    assert losses.gradient_error(x, y) == 7
    assert losses.neighbours(2, 3) == 3 * (2 * 2 + 3)


@pytest.mark.parametrize(("pixel_patch", "levels", "patch"), [(1, 5, 1), (4, 3, 1), (2, 3, 2)])
def test_patching_keeps_f16_and_64_channels(pixel_patch: int, levels: int, patch: int) -> None:
    network = {**NETWORK, "block_out_channels": (8,) * levels, "pixel_patch": pixel_patch}
    patched = make(network=network, patch=patch)
    (posterior,) = encode(patched, [patched.observe(picture(64, 32))])
    assert posterior.mean_NC.shape == (8, 64)
    assert decode(patched, modes([posterior]))[0].shape == (3, 32, 64)


def test_merging_latents_is_exact() -> None:
    codec = make(network={**NETWORK, "block_out_channels": (8,) * 4}, patch=2).codec
    x_B3HW = torch.rand(2, 3, 32, 64) * 2 - 1
    mean, _ = codec.encode(x_B3HW)
    raw = codec.network.encode(x_B3HW).latent_dist.mean
    assert torch.equal(mean, torch.nn.functional.pixel_unshuffle(raw, 2))
    assert torch.equal(codec.decode(mean), codec.network.decode(raw).sample)


def test_float64_is_not_downcast() -> None:
    double = make().double()
    observations = ragged(double, [double.observe(picture(32, 32))])
    posteriors = double.encode(observations)
    assert posteriors.mean_NC.dtype == torch.float64
    terms = double.reconstruction(observations, posteriors.mode)
    assert {value.dtype for value in terms.values()} == {torch.float64}


def test_a_few_steps_reduce_the_loss() -> None:
    learner = make().train()
    observations = [learner.observe(Image.new("RGB", (32, 32), c)) for c in ("red", "blue")]
    batch, chance = both(learner, observations)
    counts, weights = learner.counts(batch), learner.weights()
    optimizer = torch.optim.AdamW(learner.parameters(), lr=3e-3)
    history = []
    for _ in range(12):
        terms = learner.loss(batch, chance)
        loss = sum(weights[t] * terms[t] / counts[t] for t in terms)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.9 * history[0]


# ---- statistics ----------------------------------------------------------------------------------


def test_statistics_standardise_samples(observations: list[torch.Tensor]) -> None:
    fitted = make()
    batch = ragged(fitted, observations)
    before = fitted.decode(fitted.encode(batch).mode)
    fitted.fit_statistics(batch)
    posteriors = fitted.encode(batch)
    mean_NC, variance_NC = posteriors.mean_NC, posteriors.logvar_NC.exp()
    zero, one = torch.zeros(64), torch.ones(64)
    torch.testing.assert_close(mean_NC.mean(0), zero, rtol=0, atol=1e-3)
    total_C = mean_NC.var(0, correction=0) + variance_NC.mean(0)
    torch.testing.assert_close(total_C, one, rtol=1e-3, atol=0)
    after = fitted.decode(posteriors.mode)
    worst = (before.values.int() - after.values.int()).abs().max()
    assert worst <= 1  # the statistics cancel, up to rounding
    with pytest.raises(ValueError, match="at least one"):
        fitted.fit_statistics(Ragged(batch.values[:0], (), batch.length_B[:0]))


# ---- files ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, observations: list[torch.Tensor]) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    modality = make()
    modality.fit_statistics(ragged(modality, observations))
    modality.save_pretrained(folder, "image")
    return folder


def test_round_trip_is_exact(saved: Path, observations: list[torch.Tensor]) -> None:
    fitted = make()
    fitted.fit_statistics(ragged(fitted, observations))
    loaded = ImageModality.from_pretrained(saved, "image").eval()
    assert loaded.config == fitted.config
    for name, tensor in fitted.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_diffusers_reads_the_folder(saved: Path) -> None:
    from diffusers import AutoencoderKL

    theirs = AutoencoderKL.from_pretrained(saved / "image_vae").eval()
    ours = ImageModality.from_pretrained(saved, "image").eval()
    x_B3HW = torch.rand(1, 3, 32, 32)
    mean = theirs.encode(x_B3HW).latent_dist.mean
    torch.testing.assert_close(mean, ours.codec.encode(x_B3HW)[0], atol=1e-5, rtol=1e-5)
    assert not list((saved / "image_vae").glob("*.bin"))


def test_any_folder_of_theirs_serves(saved: Path) -> None:
    config = ImageModality.Config(max_size=64, pretrained=str(saved), subfolder="image_vae")
    borrowed = ImageModality.build(config, None)
    assert borrowed.frozen
    assert not make().frozen
    assert not ImageModality.build(config.model_copy(update={"frozen": False}), None).frozen
    assert borrowed.shift.abs().sum() == 0
    with pytest.raises(ValueError, match="256 channels at patch 2"):
        ImageModality.build(config.model_copy(update={"patch": 2}), None)
    with pytest.raises(ValueError, match="own network"):
        ImageModality.Config(pretrained=str(saved), network=NETWORK)


def copy_of(saved: Path, folder: Path) -> Path:
    target = folder / "image_vae"
    target.mkdir()
    for file in (saved / "image_vae").iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


@pytest.mark.parametrize("damage", ["missing", "extra", "shape"])
def test_wrong_tensors_are_named(saved: Path, tmp_path: Path, damage: str) -> None:
    file = copy_of(saved, tmp_path) / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    name = "encoder.conv_in.weight"
    if damage == "missing":
        del tensors[name]
    elif damage == "shape":
        tensors[name] = tensors[name][:4].contiguous()
    else:
        name = "surplus"
        tensors[name] = torch.zeros(1)
    save_file(tensors, file)
    with pytest.raises(ValueError, match=name):
        ImageModality.from_pretrained(tmp_path, "image")


def test_missing_and_broken_extras(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="missing"):
        ImageModality.from_pretrained(tmp_path, "image")
    extras = copy_of(saved, tmp_path) / "modality.json"
    content = json.loads(extras.read_text())
    extras.write_text(json.dumps({**content, "shift": [0.0]}))
    with pytest.raises(ValueError, match="64 numbers"):
        ImageModality.from_pretrained(tmp_path, "image")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": {**NETWORK, "norm_groups": 3}}, "multiples of norm_groups"),
        ({"patch": 3}, "multiple of patch"),
        ({"subfolder": "vae"}, "needs pretrained"),
        ({"max_size": 8}, "less than one cell"),
        ({"colour": 1}, "colour"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_a_grid_needs_pixels_in_whole_cells(modality: ImageModality) -> None:
    with pytest.raises(ValueError, match="cells of 16"):
        modality.grid(torch.zeros(3, 20, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match="4, 4"):
        modality.grid(torch.zeros(4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="grid"):
        Latent(torch.zeros(3, 64), (2, 2))
    assert pixels.cells(1000, 16, 64, 16) == (1, 16)
