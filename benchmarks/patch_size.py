"""Patch size 1 and 2 on prose: continuation accuracy for prompts of even and odd length.

    python benchmarks/patch_size.py train --out outputs/patch    # all three; --variant for one
    python benchmarks/patch_size.py table --out outputs/patch

Three small models differ in `patch_size` and `boundary` only. A trial cuts a held-out passage after
n tokens, at the end of a word, continues it several times and asks whether the word that comes most
often is the passage's own next word. Beside it: the share of correct words if one always says the
most frequent word of the training text, and how many tokens the autoencoder gives back.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from unified.config import Config
from unified.data.shards import read_shards
from unified.pipeline import UnifiedPipeline
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
                    "encoder_num_blocks": 1, "decoder_num_blocks": 1, "latent_dim": 16,
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
            "flow": {"timesteps": {"text": {"loc": 2.0, "scale": 1.5}}, "clean_prefix_rate": 0.3},
            "training": {"trackers": [], "save_every": 200, "validate_every": 400},
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


def trials(pipeline: UnifiedPipeline, count: int) -> list[tuple[str, str, int]]:
    """(prompt, its next word, its length in tokens): as many of odd as of even length."""
    tokenizer: Any = pipeline.modalities["text"].tokenizer  # type: ignore[attr-defined]
    found: dict[int, list[tuple[str, str, int]]] = {0: [], 1: []}
    for text in passages("val"):
        words = text.split()
        for end in range(16, min(len(words) - 1, 40)):
            prompt = " ".join(words[:end])
            length = len(tokenizer.encode(prompt))
            if SHORTEST <= length < PASSAGE - BLOCK and len(found[length % 2]) < count:
                found[length % 2].append((prompt, words[end], length))
                if end % 8 == 0:
                    break
    return found[0] + found[1]


def first_word(text: str) -> str:
    """The first word of a continuation; a word that only goes on with the prompt's is none."""
    return text.split()[0] if text[:1].isspace() and text.split() else ""


def hits(pipeline: UnifiedPipeline, asked: list[tuple[str, str, int]], votes: int) -> torch.Tensor:
    """Whether the most frequent first word of several continuations is right, per trial."""
    said: list[Counter[str]] = [Counter() for _ in asked]
    for vote in range(votes):
        for start in range(0, len(asked), 64):
            part = asked[start : start + 64]
            texts = pipeline.continue_text(
                [prompt for prompt, _, _ in part], max_new_tokens=8, seed=1000 * vote + start
            )
            for i, text in enumerate(texts):
                said[start + i][first_word(text)] += 1
    best = [counter.most_common(1)[0][0] for counter in said]
    return torch.tensor([float(b == word) for b, (_, word, _) in zip(best, asked, strict=True)])


def interval(values: torch.Tensor, draws: int = 2000) -> tuple[float, float, float]:
    """Mean and bootstrap 95% interval."""
    rng = torch.Generator().manual_seed(0)
    index = torch.randint(len(values), (draws, len(values)), generator=rng)
    low, high = values[index].mean(1).quantile(torch.tensor([0.025, 0.975])).tolist()
    return float(values.mean()), low, high


@torch.no_grad()
def reconstruction(pipeline: UnifiedPipeline, asked: list[tuple[str, str, int]]) -> torch.Tensor:
    """Share of a prompt's tokens that come back from its latents, filled up as generation does."""
    text: Any = pipeline.modalities["text"]
    out = []
    for prompt, _, _ in asked:
        ids = text.beginning(prompt)
        filled = text.pad(ids, 1, text.boundary)
        (posterior,) = text.encode([filled])
        (back,) = text.decode([posterior.mode])
        start = 0 if text.boundary == "right" else len(filled) - len(ids)
        out.append((back[start : start + len(ids)] == ids).double().mean())
    return torch.stack(out)


def measure(variant: str, out: Path, count: int, votes: int, guidance: float) -> dict[str, Any]:
    pipeline = UnifiedPipeline.from_pretrained(out / variant / "final")
    settings = {"guidance_scale": guidance, "num_steps": 16}
    pipeline.config = pipeline.config.model_copy(
        update={"generation": pipeline.config.generation.model_copy(update=settings)}
    )
    asked = trials(pipeline, count)
    even = torch.tensor([length % 2 == 0 for _, _, length in asked])
    right, back = hits(pipeline, asked, votes), reconstruction(pipeline, asked)
    common = Counter(w for text in passages("train") for w in text.split()).most_common(1)[0][0]
    says = torch.tensor([float(word == common) for _, word, _ in asked])
    return {
        "variant": variant,
        "unigram": {"word": common, "accuracy": interval(says)},
        **{
            f"mod{i}": {
                "trials": int(rows.sum()),
                "accuracy": interval(right[rows]),
                "reconstruction": float(back[rows].mean()),
            }
            for i, rows in enumerate((even, ~even))
        },
    }


def table(results: list[dict[str, Any]]) -> str:
    lines = ["| model | length | trials | next word right | tokens back |", "|---|---|---|---|---|"]
    for r in results:
        for phase, name in (("mod0", "even"), ("mod1", "odd")):
            mean, low, high = (f"{100 * x:.1f}" for x in r[phase]["accuracy"])
            back = f"{100 * r[phase]['reconstruction']:.1f}%"
            right = f"{mean}% [{low}, {high}]"
            lines.append(f"| {r['variant']} | {name} | {r[phase]['trials']} | {right} | {back} |")
    mean, low, high = (f"{100 * x:.1f}" for x in results[0]["unigram"]["accuracy"])
    lines.append(f'| always "{results[0]["unigram"]["word"]}" | | | {mean}% [{low}, {high}] | |')
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("do", choices=["train", "table"])
    parser.add_argument("--variant", choices=list(VARIANTS))
    parser.add_argument("--out", type=Path, default=Path("outputs/patch"))
    parser.add_argument("--vae-steps", type=int, default=300)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--trials", type=int, default=300, help="of even, and of odd length")
    parser.add_argument("--votes", type=int, default=5)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    chosen = [args.variant] if args.variant else list(VARIANTS)
    if args.do == "train":
        for variant in chosen:
            train(config(variant, args.out, args.vae_steps, args.steps))
        return
    found = [measure(v, args.out, args.trials, args.votes, args.guidance) for v in chosen]
    print(json.dumps(found, indent=2) if args.json else table(found))


if __name__ == "__main__":
    main()
