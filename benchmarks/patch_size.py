"""Patch size 1 and 2 on prose: continuation accuracy for prompts of even and odd length.

    python benchmarks/patch_size.py train --out outputs/patch    # all three; --variant for one
    python benchmarks/patch_size.py table --out outputs/patch

Three small models differ in `patch_size` and `boundary` only. A trial cuts a held-out passage after
n tokens, at the end of a word, and asks whether the first word of the continuation is the passage's
own next word. Latents are made in one Euler step from t = 1 without guidance, which gives the mean
of the flow: a best guess, without sampling. Beside it: the share of correct words if one always
says the most frequent word of the training text, and how many tokens the autoencoder gives back.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from unified.config.schema import Config
from unified.data.shards import read_shards
from unified.evaluation.statistics import bootstrap
from unified.latents.modality import decode, encode, modes
from unified.latents.weights import assign, named_tensors
from unified.pipeline import UnifiedPipeline
from unified.training import checkpoint
from unified.training.run import train

PROSE = "embedded:prose/{}-00000.tar"
VARIANTS: dict[str, dict[str, Any]] = {
    "p1": {"patch_size": 1},
    "p2-pads": {"patch_size": 2, "boundary": "right"},
    "p2-leads": {"patch_size": 2, "boundary": "lead"},
}
#: tokens of a block, of a training passage, and of the shortest prompt
BLOCK, PASSAGE, SHORTEST = 2, 64, 24


def config(variant: str, out: Path, vae_steps: int, steps: int) -> Config:
    """One model; everything but the variant is the same for all."""
    patch = VARIANTS[variant]["patch_size"]
    stage = {"batch_size": 32, "optimizer": {"lr": 4e-3, "warmup_steps": 20}}
    return Config.model_validate(
        {
            "run": {"dir": str(out / variant)},
            "modalities": {
                "text": {
                    "type": "text", "vocab_size": 2048, "dim": 128, "ffn_dim": 384, "num_heads": 2,
                    "encoder_num_blocks": 1, "decoder_num_blocks": 1, "latent_dim": 128,
                    "max_tokens": 2048, "beta": 1e-3, **VARIANTS[variant],
                },
            },
            "prior": {
                "width": 192, "heads": 3, "head_dim": 64, "rope_dim": 48, "single_stream_depth": 4,
            },
            "tasks": {
                "continuation": {
                    "type": "continuation", "source": "prose", "block": BLOCK // patch,
                    "max_tokens": PASSAGE // patch,
                },
            },
            "data": {
                "sources": {"prose": {s: [PROSE.format(s)] for s in ("train", "val")}},
            },
            "flow": {"timesteps": {"text": {"loc": 3.0, "scale": 1.5}}, "clean_prefix_rate": 0.3},
            "training": {"trackers": [], "save_every": 200, "validate_every": 200},
            "stages": [
                {
                    "name": "text_vae", "objective": "autoencoder", "modality": "text",
                    "sources": {"prose": 1}, "crop": PASSAGE // patch, "steps": vae_steps, **stage,
                },
                {
                    "name": "joint", "objective": "joint", "steps": steps, "posterior": "mean",
                    "batch_size": 16, "row_length": 2 * PASSAGE // patch,
                    "optimizer": {"lr": 2e-3, "warmup_steps": 50},
                },
            ],
        }
    )  # fmt: skip


def passages(split: str) -> list[str]:
    return [raw.members["txt"].decode() for raw in read_shards(PROSE.format(split))]


class Trial(NamedTuple):
    """A prompt of `length` tokens, its next word, and which passage it is of."""

    prompt: str
    word: str
    length: int
    passage: int


def trials(pipeline: UnifiedPipeline, count: int) -> list[Trial]:
    """As many prompts of odd as of even length."""
    tokenizer: Any = pipeline.modalities["text"].tokenizer  # type: ignore[attr-defined]
    found: dict[int, list[Trial]] = {0: [], 1: []}
    for passage, text in enumerate(passages("val")):
        words = text.split()
        for end in range(16, min(len(words) - 1, 40), 3):
            prompt, word = " ".join(words[:end]), plain(words[end])
            length = len(tokenizer.encode(prompt))
            if word and SHORTEST <= length < PASSAGE - BLOCK and len(found[length % 2]) < count:
                found[length % 2].append(Trial(prompt, word, length, passage))
    return found[0] + found[1]


def plain(word: str) -> str:
    """Letters only, in lower case."""
    return "".join(c for c in word.lower() if c.isalpha())


def first_word(text: str) -> str:
    """The first word of a continuation; what only goes on with the prompt's last word is none."""
    _, space, rest = text.replace("\n", " ").partition(" ")
    return next((plain(w) for w in rest.split() if plain(w)), "") if space else ""


def hits(pipeline: UnifiedPipeline, asked: list[Trial]) -> torch.Tensor:
    """Whether the first word of the continuation is right, per trial."""
    right: list[float] = []
    for start in range(0, len(asked), 64):
        part = asked[start : start + 64]
        prompts = [trial.prompt for trial in part]
        texts = pipeline.continue_text(
            prompts, max_new_tokens=8, seed=start, num_steps=1, guidance_scale=1.0
        )
        right += [float(first_word(t) == a.word) for t, a in zip(texts, part, strict=True)]
    return torch.tensor(right)


@torch.no_grad()
def reconstruction(pipeline: UnifiedPipeline, asked: list[Trial]) -> torch.Tensor:
    """Share of a prompt's tokens that come back from its latents, filled up as generation does."""
    text: Any = pipeline.modalities["text"]
    out = []
    for trial in asked:
        ids = text.beginning(trial.prompt)
        filled = text.pad(ids, 1, text.boundary)
        (back,) = decode(text, modes(encode(text, [filled])))
        start = 0 if text.boundary == "right" else len(filled) - len(ids)
        out.append((back[start : start + len(ids)] == ids).double().mean())
    return torch.stack(out)


def sure(values: torch.Tensor, asked: list[Trial]) -> dict[str, float]:
    """The mean and its interval; the trials of a passage are resampled together."""
    return asdict(bootstrap(values, groups=[trial.passage for trial in asked]))


def best(run: Path) -> tuple[UnifiedPipeline, int]:
    """The model at its lowest validation loss, and that step: the models overfit at other times."""
    pipeline = UnifiedPipeline.from_pretrained(run / "final")
    found = checkpoint.steps(run / "checkpoints", "joint")
    state: Any = checkpoint.read_state(found[max(found)])
    step = int(state["progress"]["best_step"])
    averages = checkpoint.read(found[step], "ema")
    mine = {n.removeprefix("prior."): t for n, t in averages.items() if n.startswith("prior.")}
    assign(named_tensors(pipeline.prior), mine, found[step])
    return pipeline, step


def measure(variant: str, out: Path, count: int) -> dict[str, Any]:
    pipeline, step = best(out / variant)
    asked = trials(pipeline, count)
    odd = torch.tensor([trial.length % 2 == 1 for trial in asked])
    right, back = hits(pipeline, asked), reconstruction(pipeline, asked)
    often = Counter(plain(w) for text in passages("train") for w in text.split())
    common = often.most_common(1)[0][0]
    says = torch.tensor([float(trial.word == common) for trial in asked])
    return {
        "variant": variant,
        "step": step,
        "unigram": {"word": common, "accuracy": sure(says, asked)},
        **{
            phase: {
                "trials": int(rows.sum()),
                "accuracy": sure(right[rows], [t for t, r in zip(asked, rows, strict=True) if r]),
                "reconstruction": float(back[rows].mean()),
            }
            for phase, rows in (("even", ~odd), ("odd", odd), ("both", odd | ~odd))
        },
    }


def table(results: list[dict[str, Any]]) -> str:
    lines = ["| model | length | trials | next word right | tokens back |", "|---|---|---|---|---|"]
    for r in results:
        for phase in ("even", "odd", "both"):
            found = r[phase]
            back = f"{100 * found['reconstruction']:.1f}%"
            right = percent(found["accuracy"])
            name = f"{r['variant']}, step {r['step']}"
            lines.append(f"| {name} | {phase} | {found['trials']} | {right} | {back} |")
    unigram = results[0]["unigram"]
    lines.append(f'| always "{unigram["word"]}" | | | {percent(unigram["accuracy"])} | |')
    return "\n".join(lines)


def percent(interval: dict[str, float]) -> str:
    mean, low, high = (100 * interval[name] for name in ("mean", "low", "high"))
    return f"{mean:.1f}% [{low:.1f}, {high:.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("do", choices=["train", "table"])
    parser.add_argument("--variant", choices=list(VARIANTS))
    parser.add_argument("--out", type=Path, default=Path("outputs/patch"))
    parser.add_argument("--vae-steps", type=int, default=400)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--trials", type=int, default=1500, help="at most, of either length")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    chosen = [args.variant] if args.variant else list(VARIANTS)
    if args.do == "train":
        for variant in chosen:
            train(config(variant, args.out, args.vae_steps, args.steps))
        return
    found = [measure(v, args.out, args.trials) for v in chosen]
    print(json.dumps(found, indent=2) if args.json else table(found))


if __name__ == "__main__":
    main()
