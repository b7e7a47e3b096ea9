"""Our networks beside what one would take instead: time and FLOPs, in one process.

    python benchmarks/beside.py                          # all pairs, a table; --json for JSON
    python benchmarks/beside.py --only flux --dtype bf16 --threads 4 --repeats 9
    python benchmarks/beside.py --device cuda --dtype bf16 --size large

    sd3         the prior, all blocks multi-stream       diffusers' SD3Transformer2DModel
    flux        the prior, a third multi-stream          diffusers' FluxTransformer2DModel
    table       that under the table of text_to_image    that, which has no noisy captions
    text        a step of the prior on stored latents    a step of transformers' LlamaForCausalLM
    image_vae   the image autoencoder's own loss         the AutoencoderKL in it, with L1 and KL
    text_vae    the text autoencoder's own loss          a LlamaForCausalLM of as many blocks

In `sd3` and `flux` everything sees everything; in `text` a text is clean and noisy, two positions
for each of a language model's. `text_vae` is without the masked-token loss, a second pass.

Width, depth, heads, rows and tokens of a pair are the same. A step is forward and backward; in
`text` it begins with collating the data and ends with AdamW. The two take turns, so that a busy
machine slows both. FLOPs are counted by PyTorch's `FlopCounterMode`: dense products of matrices,
backward included, and what a mask hides as well. (A causal kernel skips half of what is counted for
attention: in `text` theirs does, in `text_vae` both do.) A time ratio of at most the FLOP ratio
says that we lose nothing to overhead.

Seconds are wall time, the best of all turns. Beside their ratio stand that of the medians, and that
of the CPU's own time over all threads, which waiting for other processes does not lengthen.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import machine
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from unified.config.schema import FlowConfig, PriorConfig, StageConfig
from unified.data.batches import Items
from unified.data.streams import Prepared
from unified.latents.modality import Modality
from unified.latents.ragged import Posteriors
from unified.latents.tensors import moved
from unified.modalities.image.modality import ImageConfig, ImageModality
from unified.modalities.image.pixels import to_unit
from unified.modalities.text.modality import TextConfig, TextModality
from unified.model.prior import Prior
from unified.randomness import Chance
from unified.sequence.layout import Layout, Segment
from unified.sequence.packing import PackedBatch, Sample, pack
from unified.sequence.visibility import ALL, Visibility
from unified.tasks.continuation import Continuation, ContinuationConfig
from unified.tasks.text_to_image import TextToImage, TextToImageConfig
from unified.training.objectives.joint import JointObjective
from unified.training.optim import build_optimizer, learning_groups

#: channels of a latent
CHANNELS = {"text": 16, "image": 64}
#: latents of a block of text
BLOCK = 16
#: PyTorch's attention, for both, but for cuDNN's: on a GPU it failed in the backward pass of
#: diffusers' Flux transformer
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
#: what PyTorch's counter calls the products of attention; all others are those of layers
ATTENTION = (torch.ops.aten.bmm, torch.ops.aten.baddbmm)


@dataclass(frozen=True)
class Size:
    """How large a pair is: `side` squared cells of an image, and a caption of `caption` tokens, or
    a text of `text` tokens. The last line is for the image autoencoder."""

    width: int = 384
    heads: int = 6
    depth: int = 6
    rows: int = 2
    side: int = 16
    caption: int = 64
    text: int = 256
    vocabulary: int = 2048
    levels: tuple[int, ...] = (32, 64, 128, 128, 128)
    pixels: int = 64
    device: str = "cpu"

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


#: `large` fills an accelerator
SIZES = {
    "small": Size(),
    "large": Size(
        width=1536, heads=12, depth=12, rows=8, side=32, caption=128, text=1024, vocabulary=32000,
        levels=(128, 128, 256, 512, 512), pixels=256,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Contender:
    """One of a pair: `loss` runs `module` forward over `positions` of a sequence (or pixels)."""

    name: str
    module: nn.Module
    positions: int
    loss: Callable[[], Tensor]
    optimizer: torch.optim.Optimizer | None = None

    def step(self, precision: str) -> None:
        for parameter in self.module.parameters():
            parameter.grad = None
        with machine.autocast(precision, next(self.module.parameters()).device.type):
            loss = self.loss()
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()


Pair = tuple[Contender, Contender]


def squared(*outputs: Tensor) -> Tensor:
    """A loss through which every output has a gradient."""
    return torch.stack([x.float().square().mean() for x in outputs]).sum()


# ---- the prior beside diffusers' transformers ----------------------------------------------------


def new_prior(size: Size, multi: int, channels: Mapping[str, int] = CHANNELS) -> Prior:
    """A prior of `size`. A new one's gates are shut; these are open, as training leaves them."""
    config = PriorConfig(
        width=size.width, heads=size.heads, head_dim=size.head_dim,
        rope_dim=size.head_dim * 3 // 4, multi_stream_depth=multi,
        single_stream_depth=size.depth - multi,
    )  # fmt: skip
    prior = Prior(config, channels)
    for parameter in prior.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return prior.to(size.device)


#: a caption and an image that see each other, as in the models of diffusers
OPEN = Layout(
    (Segment("C", "text"), Segment("I", "image", noise="segment")),
    {"C": {"C": ALL, "I": ALL}, "I": {"C": ALL, "I": ALL}},
)


def painting(size: Size, layout: Layout) -> PackedBatch:
    """A caption and a noisy image in every row; the image, and each noisy block, has its time."""
    grids = {"C": (size.caption,), "I": (size.side, size.side)}
    samples, visibility = [Sample("", grids)] * size.rows, Visibility({"": layout.sees})
    batch = pack(samples, {"": layout}, visibility, None, axes=3, training=True)
    t_T = torch.cat([torch.zeros(1), torch.rand(batch.groups.shape[1])])
    return replace(
        batch,
        time_RL=t_T[batch.step_RL],
        timesteps=(t_T, batch.step_RL),
        latents={m: torch.randn(len(w), CHANNELS[m]) for m, w in batch.where.items()},
    )


def our_mmdit(size: Size, layout: Layout, multi: int) -> Contender:
    prior, batch = new_prior(size, multi), painting(size, layout).to(size.device)
    return Contender(
        "Prior", prior, int(batch.positions[0]), lambda: squared(*prior(batch).values())
    )


def sd3(size: Size) -> Pair:
    from diffusers import SD3Transformer2DModel

    theirs = SD3Transformer2DModel(
        sample_size=size.side, patch_size=1, in_channels=CHANNELS["image"],
        out_channels=CHANNELS["image"], num_layers=size.depth, attention_head_dim=size.head_dim,
        num_attention_heads=size.heads, joint_attention_dim=CHANNELS["text"],
        caption_projection_dim=size.width, pooled_projection_dim=CHANNELS["text"],
        pos_embed_max_size=size.side, qk_norm="rms_norm",
    ).to(size.device)  # fmt: skip
    given = {
        "hidden_states": torch.randn(size.rows, CHANNELS["image"], size.side, size.side),
        "timestep": 1000 * torch.rand(size.rows),
        **conditions(size),
    }
    given = there(given, size)
    ours = our_mmdit(size, OPEN, multi=size.depth)
    return ours, Contender(
        "SD3Transformer2DModel", theirs, ours.positions, lambda: squared(theirs(**given).sample)
    )


def there(given: Mapping[str, Tensor], size: Size) -> dict[str, Tensor]:
    """What a model is given, where it runs."""
    return {name: x.to(size.device) for name, x in given.items()}


def conditions(size: Size) -> dict[str, Tensor]:
    """A caption as diffusers' models take it: embedded, and pooled."""
    return {
        "encoder_hidden_states": torch.randn(size.rows, size.caption, CHANNELS["text"]),
        "pooled_projections": torch.randn(size.rows, CHANNELS["text"]),
    }


def flux_model(size: Size) -> Contender:
    from diffusers import FluxTransformer2DModel

    multi, quarter = size.depth // 3, size.head_dim // 8 * 2
    theirs = FluxTransformer2DModel(
        in_channels=CHANNELS["image"], num_layers=multi, num_single_layers=size.depth - multi,
        attention_head_dim=size.head_dim, num_attention_heads=size.heads,
        joint_attention_dim=CHANNELS["text"], pooled_projection_dim=CHANNELS["text"],
        axes_dims_rope=(size.head_dim - 2 * quarter, quarter, quarter),
    ).to(size.device)  # fmt: skip
    cells = torch.cartesian_prod(*[torch.arange(size.side)] * 2)
    given = {
        "hidden_states": torch.randn(size.rows, size.side**2, CHANNELS["image"]),
        "timestep": torch.rand(size.rows),
        "img_ids": nn.functional.pad(cells, (1, 0)),
        "txt_ids": torch.zeros(size.caption, 3),
        **conditions(size),
    }
    given = there(given, size)
    positions = size.rows * (size.caption + size.side**2)
    return Contender(
        "FluxTransformer2DModel", theirs, positions, lambda: squared(theirs(**given).sample)
    )


def flux(size: Size) -> Pair:
    return our_mmdit(size, OPEN, multi=size.depth // 3), flux_model(size)


def table(size: Size) -> Pair:
    layout = TextToImage(TextToImageConfig(source="", block=min(BLOCK, size.caption))).layout
    return our_mmdit(size, layout, multi=size.depth // 3), flux_model(size)


# ---- text beside a language model ----------------------------------------------------------------


def words(size: Size) -> Tensor:
    """Ids [rows, text]."""
    return torch.randint(size.vocabulary, (size.rows, size.text))


def llama(size: Size, inner: int, learns: bool) -> Contender:
    """A Llama of `depth` blocks, whose gated MLP is `inner` wide."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=size.vocabulary, hidden_size=size.width, intermediate_size=inner,
        num_hidden_layers=size.depth, num_attention_heads=size.heads,
        max_position_embeddings=size.text, use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    model, ids = LlamaForCausalLM(config).to(size.device), words(size).to(size.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True) if learns else None

    def loss() -> Tensor:
        return model(input_ids=ids, labels=ids).loss

    return Contender("LlamaForCausalLM", model, ids.numel(), loss, optimizer)


def text(size: Size) -> Pair:
    """12 W^2 weights of a block act on every position of either; a token is two of them in ours,
    but for those of the last clean block, which no loss depends on."""
    prior = new_prior(size, 0, {"text": CHANNELS["text"]})
    task = ContinuationConfig(source="", block=min(BLOCK, size.text), max_tokens=size.text)
    stage = StageConfig.model_validate(
        {
            "name": "joint", "objective": "joint", "steps": 1, "batch_size": size.rows,
            "row_length": 2 * size.text, "posterior": "mean", "optimizer": {"vae_lr_ratio": 0},
        }
    )  # fmt: skip
    unused = TextConfig(vocab_size=8, dim=8, ffn_dim=8, num_heads=1, latent_dim=CHANNELS["text"])
    modalities = {"text": TextModality(unused, None).to(size.device)}
    layouts = {"continuation": Continuation(task).layout}
    objective = JointObjective(prior, modalities, layouts, stage, FlowConfig(), seed=0)
    examples = [stored(slot, size.text) for slot in range(size.rows)]

    def loss() -> Tensor:
        batch = objective.collate(examples, 0)
        return weighed(objective(moved(batch, size.device)), objective.weights(0), batch.counts)

    optimizer = build_optimizer(
        learning_groups(objective.groups(), stage.optimizer), stage.optimizer
    )
    positions = int(objective.collate(examples, 0).positions[0])
    ours = Contender("JointObjective", prior, positions, loss, optimizer)
    return ours, llama(size, inner=size.width * 8 // 3, learns=True)


def stored(slot: int, length: int) -> Prepared:
    """A passage whose latents a frozen autoencoder has left."""
    mean_LC = torch.randn(length, CHANNELS["text"])
    posterior = Posteriors(mean_LC, torch.full_like(mean_LC, -4.0), ((1, (length,)),))
    return Prepared("continuation", f"{slot}", slot, {"C": posterior})


def weighed(
    sums: Mapping[str, Tensor], weights: Mapping[str, float], counts: Mapping[str, float]
) -> Tensor:
    """The loss of a step: every term's mean, by its weight."""
    return torch.stack([weights[t] * value / counts[t] for t, value in sums.items()]).sum()


def own_loss(modality: Modality, observed: Sequence[Tensor], device: str) -> Callable[[], Tensor]:
    """An autoencoder's objective, as its stage has it."""
    items, _ = Items.of(modality, observed, range(len(observed)))
    counts = modality.counts(items.whole("the loss is of the items themselves"))

    def loss() -> Tensor:
        here = moved(items, device)
        assert here.observations is not None
        sums = modality.loss(here.observations, here.chance(Chance(0)))
        return weighed(sums, modality.weights(), counts)

    return loss


def text_vae(size: Size) -> Pair:
    """Half the blocks encode and half decode; a Llama of all of them has weights of the same sizes,
    but for the projections between tokens and latents."""
    inner = size.width * 8 // 3
    config = TextConfig(
        vocab_size=size.vocabulary, dim=size.width, ffn_dim=2 * inner, num_heads=size.heads,
        encoder_num_blocks=size.depth // 2, decoder_num_blocks=size.depth - size.depth // 2,
        latent_dim=CHANNELS["text"], max_tokens=size.text, mask_weight=0,
    )  # fmt: skip
    modality, ids = TextModality(config, None).to(size.device), words(size)
    loss = own_loss(modality, list(ids), size.device)
    ours = Contender("TextModality", modality, ids.numel(), loss)
    return ours, llama(size, inner, learns=False)


# ---- the image autoencoder -----------------------------------------------------------------------


def image_vae(size: Size) -> Pair:
    """The same network twice. Ours has a loss more, on the differences of neighbouring pixels."""
    groups = min(32, *size.levels)
    config = ImageConfig.model_validate(
        {
            "max_size": size.pixels, "channels": CHANNELS["image"],
            "network": {"block_out_channels": size.levels, "norm_groups": groups},
        }
    )  # fmt: skip
    ours, other = (ImageModality.build(config, None).to(size.device) for _ in range(2))
    network = other.codec.network
    bytes_B3HW = torch.randint(256, (size.rows, 3, size.pixels, size.pixels), dtype=torch.uint8)

    def plain() -> Tensor:
        x_B3HW = to_unit(bytes_B3HW.to(size.device), torch.float32)
        posterior = network.encode(x_B3HW).latent_dist
        error = nn.functional.l1_loss(network.decode(posterior.sample()).sample.float(), x_B3HW)
        return error + config.beta * posterior.kl().mean()

    positions = size.rows * size.pixels**2
    return (
        Contender("ImageModality", ours, positions, own_loss(ours, list(bytes_B3HW), size.device)),
        Contender("AutoencoderKL", network, positions, plain),
    )


PAIRS: dict[str, Callable[[Size], Pair]] = {
    "sd3": sd3,
    "flux": flux,
    "table": table,
    "text": text,
    "image_vae": image_vae,
    "text_vae": text_vae,
}

# ---- measuring -----------------------------------------------------------------------------------


def flops(contender: Contender, precision: str) -> dict[str, int]:
    """FLOPs of a step, and those of its layers, without the two products of attention."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        contender.step(precision)
    found = counter.get_flop_counts()["Global"]
    attention = sum(found.get(product, 0) for product in ATTENTION)
    return {"flops": sum(found.values()), "layer_flops": sum(found.values()) - attention}


def take_turns(pair: Pair, precision: str, repeats: int) -> list[dict[str, list[float]]]:
    """Seconds of every step of either, by wall clock and of the CPU, after one that warms up."""
    clocks = {"wall": time.perf_counter, "cpu": time.process_time}
    taken: list[dict[str, list[float]]] = [{name: [] for name in clocks} for _ in pair]
    for contender in pair:
        contender.step(precision)
    machine.wait()
    for _ in range(repeats):
        for contender, times in zip(pair, taken, strict=True):
            before = {name: clock() for name, clock in clocks.items()}
            contender.step(precision)
            machine.wait()
            for name, clock in clocks.items():
                times[name].append(clock() - before[name])
    return taken


def measure(name: str, size: Size, precision: str, repeats: int) -> dict[str, Any]:
    """All figures of one pair; ratios are ours by theirs."""
    torch.manual_seed(0)
    pair = PAIRS[name](size)
    counted = [flops(contender, precision) for contender in pair]
    with sdpa_kernel(KERNELS):
        taken = take_turns(pair, precision, repeats)
    ours, theirs = (
        {
            "name": contender.name,
            "parameters": sum(p.numel() for p in contender.module.parameters()),
            "positions": contender.positions,
            **work,
            "seconds": min(times["wall"]),
            "median_seconds": statistics.median(times["wall"]),
            "cpu_seconds": min(times["cpu"]),
        }
        for contender, work, times in zip(pair, counted, taken, strict=True)
    )
    return {
        "pair": name,
        "dtype": precision,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "ours": ours,
        "theirs": theirs,
        "time_ratio": ours["seconds"] / theirs["seconds"],
        "median_time_ratio": ours["median_seconds"] / theirs["median_seconds"],
        "cpu_time_ratio": ours["cpu_seconds"] / theirs["cpu_seconds"],
        "flop_ratio": ours["flops"] / theirs["flops"],
        "layer_flops_per_position_ratio": (
            ours["layer_flops"] * theirs["positions"] / theirs["layer_flops"] / ours["positions"]
        ),
    }


HEADER = """\
| pair | theirs | ours, GFLOP | theirs | FLOP ratio | ours, s | theirs | time ratio | of medians \
| CPU time | load |
|---|---|---|---|---|---|---|---|---|---|---|"""


def line(row: Mapping[str, Any]) -> str:
    sides = (row["ours"], row["theirs"])
    work = [f"{side['flops'] / 1e9:.1f}" for side in sides]
    seconds = [f"{side['seconds']:.3f}" for side in sides]
    names = ("time_ratio", "median_time_ratio", "cpu_time_ratio")
    ratios = [f"{row[name]:.2f}" for name in names]
    cells = [row["pair"], row["theirs"]["name"], *work, f"{row['flop_ratio']:.2f}"]
    return "| " + " | ".join([*cells, *seconds, *ratios, f"{row['load']:.1f}"]) + " |"


def count(text: str) -> int:
    """A number of at least 1, for argparse."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"at least 1 is needed, {number} was given")
    return number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(PAIRS), default=list(PAIRS))
    parser.add_argument("--size", choices=list(SIZES), default="small")
    machine.add_device_options(parser)
    parser.add_argument("--threads", type=count, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=count, default=5, help="steps of either one")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows, size = [], replace(SIZES[args.size], device=args.device)
    if not args.json:
        print(HEADER)
    for name in args.only:
        rows.append(measure(name, size, args.dtype, args.repeats))
        if not args.json:
            print(line(rows[-1]), flush=True)
    if args.json:
        print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
