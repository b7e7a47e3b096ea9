"""The same numbers as the official implementation, for every golden tensor.

The folder of golden tensors is ``COLA_GOLDEN`` or the shared one; all sizes are read from it. Each
test of a file ends by asserting that no tensor of the file was left unread.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import golden
import pytest
import torch
from golden import Golden, close, pad, unpad
from torch import Tensor

from unified.cola.official import from_official, official_name, to_official
from unified.config.schema import FlowConfig, GenerationConfig
from unified.flow.matching import Draws, FlowMatching
from unified.flow.path import STRAIGHT
from unified.flow.timesteps import TIMESTEP_SCALE
from unified.generation.items import Inference, Wish
from unified.latents.modality import Choice
from unified.latents.weights import read_weights
from unified.modalities.text.decoding import choose, penalise, probabilities
from unified.modalities.text.modality import TextConfig, TextModality
from unified.modalities.text.transformer import TextKVCache
from unified.model.cache import KVCache
from unified.model.prior import Prior
from unified.pipeline import UnifiedPipeline
from unified.sequence.layout import Layout, Segment
from unified.sequence.packing import NoisyPlaces, PackedBatch, Sample, pack
from unified.sequence.visibility import BEFORE, SAME, UP_TO, Visibility

pytestmark = golden.here

#: golden README: single forwards, and from end to end
SINGLE, END_TO_END = 1e-5, 3e-5
SEES = {"C": {"C": UP_TO}, "N": {"C": BEFORE, "N": SAME}}


def complete(file: Golden) -> None:
    assert not file.unread, f"no test reads {sorted(file.unread)}"


def blocks_of(file: Golden, prefix: str) -> list[int]:
    return sorted(int(k.removeprefix(prefix)) for k in file.tensors if k.startswith(prefix))


# ---- the text VAE -------------------------------------------------------------------------------


@torch.no_grad()
def test_encoder() -> None:
    file = Golden("vae_encode")
    for block in blocks_of(file, "mean.block"):
        encoder, lengths = golden.vae(block_size=block).encoder, file["lens"]
        mean, logvar = encoder(pad(file["ids"], lengths), lengths)
        close(unpad(mean, lengths), file[f"mean.block{block}"], SINGLE)
        close(unpad(logvar, lengths), file[f"logvar.block{block}"], SINGLE)
    encoder, lengths = golden.vae(block_size=1).encoder, file["odd.lens"]
    mean, logvar = encoder(pad(file["odd.ids"], lengths), lengths)
    close(unpad(mean, lengths), file["odd.mean.block1"], SINGLE)
    close(unpad(logvar, lengths), file["odd.logvar.block1"], SINGLE)
    vae, ids = golden.vae(), file["mask_id_probe.ids"]
    assert (ids == vae.config.vocab_size).any()
    close(vae.encoder(ids[None])[0][0], file["mask_id_probe.mean"], SINGLE)
    complete(file)


@torch.no_grad()
def test_decoder() -> None:
    """All at once, then in three cached pieces; the prefixes differ in length, one is empty."""
    file = Golden("vae_decode")
    for block in blocks_of(file, "logits.block"):
        decoder, lengths = golden.vae(block_size=block).decoder, file["lens"]
        logits = decoder(pad(file["z"], lengths), lengths_B=lengths)
        close(unpad(logits, lengths), file[f"logits.block{block}"], SINGLE)
    decoder, lengths, cache = golden.vae().decoder, file["cached.prefix_lens"], TextKVCache()
    logits = decoder(pad(file["cached.prefix_z"], lengths), cache, lengths)
    close(unpad(logits, lengths), file["cached.prefix_logits"], SINGLE)
    for block in ("cached.block1", "cached.block2"):
        z = file[f"{block}_z"].unflatten(0, (len(lengths), -1))
        close(decoder(z, cache).flatten(0, 1), file[f"{block}_logits"], SINGLE)
    complete(file)


@pytest.mark.parametrize("name", golden.names("variant_*"))
@torch.no_grad()
def test_variants(name: str) -> None:
    file, vae = Golden(name), golden.vae(name.removeprefix("variant_"))
    lengths, z_lengths = file["lens"], file["z_lens"]
    mean, logvar = vae.encoder(pad(file["ids"], lengths), z_lengths)
    close(unpad(mean, z_lengths), file["mean"], SINGLE)
    close(unpad(logvar, z_lengths), file["logvar"], SINGLE)
    logits = vae.decoder(pad(file["z"], z_lengths), lengths_B=z_lengths)
    close(unpad(logits, lengths), file["logits"], SINGLE)
    complete(file)


# ---- the prior ----------------------------------------------------------------------------------


def layout(block: int) -> Layout:
    segments = (Segment("C", "text", block=block), Segment("N", "text", "block", "C", block))
    return Layout(segments, SEES)


def row(lengths: Tensor, block: int, kind: str, before: Sequence[int] | None = None) -> PackedBatch:
    """One row per sample, all of one `kind`; ``before[i]`` latents of sample i came earlier."""
    rule = Visibility({"continuation": SEES})
    started = before or [0] * len(lengths)
    samples = [
        Sample("continuation", {kind: (n,)}, clock=s // block, start=s)
        for n, s in zip(lengths.tolist(), started, strict=True)
    ]
    only = Layout((Segment(kind, "text", block=block),), {})
    batch = pack(samples, {"continuation": only}, rule, None, 3)
    return replace(
        batch, coordinates=replace(batch.coordinates, sample=batch.coordinates.sample.clamp(max=0))
    )


def at(batch: PackedBatch, x: Tensor, t: Tensor) -> PackedBatch:
    """The batch with latents `x` at official timesteps `t`, both of all samples in a row."""
    time = batch.time_RL.clone()
    time.view(-1)[batch.where["text"]] = t.float() / TIMESTEP_SCALE
    return replace(batch, latents={"text": x}, time_RL=time)


def rows_like(x: Tensor, count: int) -> Tensor:
    return torch.full((count,), len(x) // count)


@torch.no_grad()
def test_prior() -> None:
    file, prior = Golden("dit_forward"), golden.main_pipeline().prior.eval()
    own = golden.config("cola_dit")["block_size"]
    close(prior.timestep(file["emb.t"].float() / TIMESTEP_SCALE), file["emb.out"], SINGLE)
    for case in sorted({k.partition(".")[0] for k in file.tensors if k.startswith("nocache")}):
        block = int(case.removeprefix("nocache") or own)
        batch = row(file[f"{case}.lens"], block, "C")
        v = prior(at(batch, file[f"{case}.x"], file[f"{case}.t"]))["text"]
        close(v, file[f"{case}.v"], SINGLE)
    lengths, cache = file["cached.prefix_lens"], KVCache()
    done = lengths.tolist()
    prefix = row(lengths, own, "C")
    prior.commit(at(prefix, file["cached.prefix"], torch.zeros(len(file["cached.prefix"]))), cache)
    x, t = file["cached.x1"], file["cached.t1"]
    new = rows_like(x, len(done))
    noisy, alone = row(new, own, "N", done), row(new, own, "N")
    close(prior(at(noisy, x, t), cache)["text"], file["cached.v1_cond"], SINGLE)
    close(prior(at(alone, x, t))["text"], file["cached.v1_uncond"], SINGLE)
    commit = file["cached.commit1"]
    prior.commit(at(row(new, own, "C", done), commit, torch.zeros(len(commit))), cache)
    done = [n + int(m) for n, m in zip(done, new, strict=True)]
    x, t = file["cached.x2"], file["cached.t2"]
    close(prior(at(row(new, own, "N", done), x, t), cache)["text"], file["cached.v2_cond"], SINGLE)
    complete(file)


# ---- training -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["a", "b", "c"])
def test_training_step(case: str) -> None:
    """The flow-matching loss of clean and noisy copies, and its gradients."""
    file = {k[2:]: v for k, v in Golden("fm_training").tensors.items() if k.startswith(f"{case}.")}
    prior = golden.main_pipeline().prior
    prior.zero_grad()
    lengths, sizes = file["lens"].tolist(), file["block_sizes"].tolist()
    names = [f"{i}" for i in range(len(lengths))]
    layouts = {n: layout(int(b)) for n, b in zip(names, sizes, strict=True)}
    rule = Visibility(dict.fromkeys(names, SEES))
    samples = [Sample(n, {"C": (length,)}) for n, length in zip(names, lengths, strict=True)]
    batch = pack(samples, layouts, rule, None, 3).with_latents({"text": file["z0"]})
    twins = NoisyPlaces(*batch.noisy["text"]).at
    batch = with_beginnings_kept(batch, file["loss_mask"].bool())
    draws = training_draws(file, batch)
    noisy, targets = FlowMatching(FlowConfig(), layouts).corrupt(batch, draws)
    close(noisy.latents["text"][twins], file["z_noisy"], SINGLE)
    close(noisy.time_RL.view(-1)[batch.where["text"]][twins] * TIMESTEP_SCALE, file["ts"])
    at_loss = file["loss_mask"].bool()
    assert targets["text"].at_M.equal(twins[at_loss])
    close(targets["text"].velocity_MC, file["target"][at_loss], SINGLE)
    close(STRAIGHT.velocity(file["z0"], file["z1"], torch.zeros(())), file["target"], SINGLE)
    total = FlowMatching.loss(prior(noisy), targets)["flow/text"]
    loss = total / FlowMatching.counts(noisy)["flow/text"]
    close(loss, file["loss"], SINGLE)
    loss.backward()
    gradients = {official_name(n): p.grad for n, p in prior.named_parameters()}
    for name, wanted in file.items():
        if name.startswith("grad."):
            found = gradients[name.removeprefix("grad.")]
            assert found is not None
            close(found, wanted, SINGLE)
    squares = [g.double().square().sum() for g in gradients.values() if g is not None]
    norm = torch.stack(squares).sum().sqrt().float()
    torch.testing.assert_close(norm, file["grad_norm_total"], rtol=0, atol=SINGLE)


def with_beginnings_kept(batch: PackedBatch, loses_M: Tensor) -> PackedBatch:
    """The batch whose noisy positions outside of the fixture's loss mask stay clean."""
    columns = batch.noisy["text"]
    step_RL = batch.step_RL.clone()
    step_RL.view(-1)[batch.where["text"][NoisyPlaces(*columns).at[~loses_M]]] = 0
    return replace(batch, noisy={"text": columns[:, loses_M]}, step_RL=step_RL)


def training_draws(file: dict[str, Tensor], batch: PackedBatch) -> Draws:
    """The fixture's chance as ours: a timestep for each block, and noise where there is any."""
    loses, group_M = file["loss_mask"].bool(), NoisyPlaces(*batch.noisy["text"]).group
    assert torch.equal(file["ts"] > 0, loses)
    t_M = file["t"].float().repeat_interleave(file["lens"])[loses]
    groups = batch.groups.shape[1]
    t_G = torch.zeros(groups).index_copy(0, group_M - 1, t_M)
    assert t_G[group_M - 1].equal(t_M)  # one for a block
    return Draws(t_G, torch.zeros(groups, dtype=torch.bool), {"text": file["z1"][loses]})


def test_every_tensor_of_training_is_read() -> None:
    read = {
        "block_sizes", "lens", "loss", "loss_mask", "t", "target", "ts", "z0", "z1", "z_noisy",
        "grad_norm_total",
    }  # fmt: skip
    found = {k.partition(".")[2] for k in Golden("fm_training").tensors}
    assert {k for k in found if not k.startswith("grad.")} == read
    assert {k[0] for k in Golden("fm_training").tensors} == {"a", "b", "c"}


# ---- the choice of tokens -----------------------------------------------------------------------


def test_sampler() -> None:
    file = Golden("sampler")
    logits, history = file["logits"], file["history"]
    for key in [k for k in file.tensors if k.startswith("greedy_rp")]:
        choice = Choice(repetition_penalty=float(key.removeprefix("greedy_rp")))
        rows = zip(logits, history, file[key], strict=True)
        assert all(torch.equal(choose(row, past, choice, None), best) for row, past, best in rows)
    for key in [k for k in file.tensors if k.startswith("probs_")]:
        _, *parts = key.split("_")
        found = {p[0]: float(p.lstrip("tkpr")) for p in parts if p != "nohist"}
        choice = Choice(found["t"], int(found["k"]), found["p"], found.get("r", 1.0))
        made = [
            probabilities(
                penalise(row, past[:0] if "nohist" in parts else past, choice.repetition_penalty),
                choice,
            )
            for row, past in zip(logits, history, strict=True)
        ]
        close(torch.cat(made), file[key], SINGLE)
    complete(file)


# ---- generation ---------------------------------------------------------------------------------


class Numbers:
    """A tokenizer whose text is its ids: "7 42"."""

    def __init__(self, size: int, pad_id: int, eos_id: int | None):
        self.size, self.pad_id, self.eos_id = size, pad_id, -1 if eos_id is None else eos_id
        self.end_ids = {self.eos_id}

    def __len__(self) -> int:
        return self.size

    def special_only(self, text: str) -> bool:
        return False

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode_all(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


def build(settings: dict[str, str]) -> UnifiedPipeline:
    """The model of one case: its block sizes, scale and tokenizer."""
    patch = int(settings["vae_patch_size"])
    part = "cola_vae" if patch == 1 else "vae_patch2"
    fields = {k: v for k, v in golden.config(part).items() if k in TextConfig.model_fields}
    fields |= {
        "block_size": int(settings["vae_block_size"]),
        "scaling_factor": float(settings["scaling_factor"]),
        "shifting_factor": float(settings["shifting_factor"]),
    }
    assert fields["patch_size"] == patch
    eos = settings["eos_token_id"]
    tokens = Numbers(
        fields["vocab_size"], int(settings["pad_token_id"]), None if eos == "None" else int(eos)
    )
    modality = TextModality(TextConfig(**fields), tokens)  # type: ignore[arg-type]
    modality.network.load_state_dict(golden.vae(part).state_dict())
    main = golden.main_pipeline()
    tasks = dict(main.config.tasks)
    block = int(settings["dit_block_size"])
    tasks["continuation"] = tasks["continuation"].model_copy(update={"block": block})
    config = main.config.model_copy(update={"tasks": tasks})
    from unified.config.plugins import resolve_model

    return UnifiedPipeline(config, {"text": modality}, resolve_model(config).tasks, main.prior)


def generation(settings: dict[str, str]) -> GenerationConfig:
    assert float(settings["T"]) == TIMESTEP_SCALE
    return GenerationConfig(
        num_steps=int(settings["timestep_num"]),
        guidance_scale=float(settings["guidance_scale"]),
        temperature=float(settings["temperature"]),
        repetition_penalty=float(settings["repetition_penalty"]),
        round_timesteps="bfloat16" if settings.get("timestep_rounding") == "bf16" else "none",
        official=True,
    )


@contextmanager
def recorded(prior: Prior) -> Iterator[list[Tensor]]:
    """All velocities that the prior predicts meanwhile."""
    seen: list[Tensor] = []
    handle = prior.register_forward_hook(lambda _m, _a, out: seen.append(out["text"]))
    yield seen
    handle.remove()


@pytest.mark.parametrize("case", golden.names("generate_*"))
@torch.no_grad()
def test_generation(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = Golden(case)
    pipeline, settings = build(file.settings), generation(file.settings)
    prompts = [ids.tolist() for ids in file["prompt_ids"].split(file["prompt_lens"].tolist())]
    size = int(file.settings["max_new_tokens"])
    wishes = [
        Wish({"C": " ".join(map(str, ids))}, size, file["noise"][:, i])
        for i, ids in enumerate(prompts)
    ]
    runner = Inference(pipeline.modalities, pipeline.tasks, pipeline.prior, "continuation")
    logits, latents = watch(monkeypatch, file["block_logits"].shape[-2])
    with recorded(pipeline.prior) as velocities:
        made = [item for step in runner.stream(wishes, settings, 0) for item in step.items()]
    out = list(dict(made).values())
    close(torch.stack(latents), file["block_latents"], END_TO_END)
    close(torch.stack(logits), file["block_logits"], END_TO_END)
    assert out == [
        " ".join(map(str, ids.tolist())) for ids in file["out_ids"].split(file["out_lens"].tolist())
    ]
    check_ids(file, out, prompts, int(file.settings["dit_block_size"]))
    check_first_step(file, runner, wishes, settings, velocities)
    complete(file)


@torch.no_grad()
def test_an_end_that_is_decoded_of_the_prompt_counts() -> None:
    """The official code stops when the prompt's part of the first block decodes to an end."""
    file = Golden("generate_main")
    prompts = [ids.tolist() for ids in file["prompt_ids"].split(file["prompt_lens"].tolist())]
    block = int(file.settings["dit_block_size"])
    i = next(i for i, ids in enumerate(prompts) if len(ids) % block)
    ended = str(int(file["block_ids"][0, i, 0]))
    for eos, blocks in (("None", len(file["block_ids"])), (ended, 1)):
        pipeline = build(file.settings | {"eos_token_id": eos})
        runner = Inference(pipeline.modalities, pipeline.tasks, pipeline.prior, "continuation")
        given = {"C": " ".join(map(str, prompts[i]))}
        wish = Wish(given, int(file.settings["max_new_tokens"]), file["noise"][:, i])
        assert len(list(runner.stream([wish], generation(file.settings), 0))) == blocks


def watch(patch: pytest.MonkeyPatch, tokens: int) -> tuple[list[Tensor], list[Tensor]]:
    """Logits [B, T, V] and latents [B, b, C] of every block, as they are decoded."""
    from unified.modalities.text.decoding import TextDecoding

    logits: list[Tensor] = []
    latents: list[Tensor] = []
    new_logits = TextDecoding._new_logits

    def kept(self: Any, ids: Sequence[int], given: Sequence[Any]) -> list[Tensor]:
        found = new_logits(self, ids, given)
        patch_size = self.modality.config.patch_size
        logits.append(torch.stack([row[-tokens:] for row in found]))
        latents.append(torch.stack([z.values[-tokens // patch_size :] for z in given]))
        return found

    patch.setattr(TextDecoding, "_new_logits", kept)
    return logits, latents


def check_ids(file: Golden, out: list[str], prompts: list[list[int]], block: int) -> None:
    """The ids of all blocks are the prompt's overlap, decoded, and what came out."""
    blocks = file["block_ids"]
    patch = int(file.settings["vae_patch_size"])
    for i, ids in enumerate(prompts):
        known = math.ceil(len(ids) / patch) // block * block * patch
        whole = blocks[:, i].flatten().tolist()
        assert whole[max(len(ids) - known, 0) :] == [int(word) for word in out[i].split()]


def check_first_step(
    file: Golden,
    runner: Inference,
    wishes: list[Wish],
    settings: GenerationConfig,
    velocities: list[Tensor],
) -> None:
    """The velocities of the first step: conditional and unconditional, of each sample in turn."""
    first = velocities[0]
    if settings.guidance_scale == 1:  # then ours leaves the unconditional pass out
        with recorded(runner.prior) as velocities:
            next(runner.stream(wishes, settings.model_copy(update={"guidance_scale": 2.0}), 0))
        first = velocities[0]
    rows = first.unflatten(0, (len(wishes), 2, -1))
    close(rows[:, 0], file["v_cond_first"], END_TO_END)
    close(rows[:, 1], file["v_uncond_first"], END_TO_END)


# ---- import and export --------------------------------------------------------------------------


@pytest.mark.parametrize("shards", ["5GB", "20KB"])
def test_there_and_back_is_bit_identical(shards: str, tmp_path: Path) -> None:
    from_official(golden.FOLDER).save_pretrained(tmp_path / "ours")
    to_official(UnifiedPipeline.from_pretrained(tmp_path / "ours"), tmp_path / "back", shards)
    again = from_official(tmp_path / "back")
    for part in ("cola_dit", "cola_vae"):
        before, after = read_weights(golden.FOLDER / part), read_weights(tmp_path / "back" / part)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        index = tmp_path / "back" / part / "model.safetensors.index.json"
        assert index.is_file() == (shards == "20KB")
        wanted = golden.config(part)
        import json

        stored = json.loads((tmp_path / "back" / part / "config.json").read_text())
        assert stored == {k: v for k, v in wanted.items() if k != "transformers_version"}
    first = from_official(golden.FOLDER).prior.state_dict()
    assert all(torch.equal(first[k], v) for k, v in again.prior.state_dict().items())
