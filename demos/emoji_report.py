"""The report of an emoji model: the scores of `evaluate_emoji` in words, and its gallery."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unified.demos.emoji_evaluation import Evaluation, Gallery
from unified.demos.report import Card, Report, Row, Section, charts
from unified.demos.report_html import html
from unified.demos.report_png import png
from unified.latents.weights import write_text

Scores = Mapping[str, Any]

SPLITS = {
    "val": "names never shown in training",
    "val-style": "names shown in training in the other style only",
    "train": "examples shown in training",
}


def write_report(evaluation: Evaluation, folder: Path, about: str) -> Report:
    """Write ``evaluation.json``, ``report.html`` and ``report.png`` into `folder`."""
    report = emoji_report(evaluation, folder / "metrics.jsonl", about)
    write_text(folder / "evaluation.json", json.dumps(evaluation.scores, indent=2) + "\n")
    write_text(folder / "report.html", html(report))
    png(report, folder / "report.png")
    return report


def emoji_report(evaluation: Evaluation, metrics: Path, about: str) -> Report:
    """Table, curves and pictures of an evaluation."""
    return Report(
        "One model for text and images", about, table(evaluation.scores), charts(metrics),
        list(sections(evaluation.gallery)),
    )  # fmt: skip


# ---- the table ---------------------------------------------------------------------------------


def table(scores: Scores) -> dict[str, list[Row]]:
    """Heading -> rows."""
    made = {
        "Autoencoders, on names never shown": [
            *caption_rows(scores["caption reconstruction"]),
            *image_rows(scores["image reconstruction"]),
        ],
        "Prior: loss on held-out examples": list(loss_rows(scores["flow loss"])),
        "Prior: does the condition matter?": list(pair_rows(scores["permuted pairs"])),
    }
    for split in scores["painting"]:
        heading = f"Generation: {split} ({SPLITS.get(split, split)})"
        made[heading] = [
            *painting_rows(scores["painting"][split]),
            *captioning_rows(scores["captioning"][split]),
        ]
    return made


def caption_rows(s: Scores) -> list[Row]:
    return [
        Row(
            "Name tokens reconstructed", percent(s["name_tokens_right"]), "100% is perfect",
            "Tokens of emoji names that come back from a posterior sample of the text autoencoder.",
        ),
        Row(
            "Captions reconstructed whole", percent(s["captions_whole"]),
            f"{s['captions']} captions, {s['samples_each']} samples each",
            "Captions that come back without a single wrong token.",
        ),
    ]  # fmt: skip


def image_rows(s: Scores) -> list[Row]:
    beside = [f"{n} numbers as a thumbnail: {p:.1f}" for n, p in s["thumbnail"].items()]
    beside += [f"PCA {k}: {p:.1f}" for k, p in s["pca"].items()]
    return [
        Row(
            "Image reconstruction", f"{s['psnr_mode']:.2f} dB", "; ".join(beside),
            f"Mean PSNR through {s['numbers']} latent numbers an image, beside simple ways to say"
            " it in a similar number.",
        ),
        Row(
            "The same, from samples", f"{s['psnr_sample']:.2f} dB", f"{s['images']} images",
            "Posterior samples instead of means: what the prior is trained on.",
        ),
    ]  # fmt: skip


def loss_rows(scores: Scores) -> Iterator[Row]:
    named = {
        "text_to_image": ("Flow loss, image given caption", "an image"),
        "captioning": ("Flow loss, caption given image", "a caption"),
        "continuation": ("Flow loss, prose", "a passage"),
    }
    for task, s in scores.items():
        name, what = named[task]
        yield Row(
            name, f"{s['now']:.3f}", f"{s['start']:.3f} at the start",
            f"Squared error of the predicted velocity of {what}; at the start it is zero velocity,"
            " under the same noise and timesteps.",
        )  # fmt: skip


def pair_rows(scores: Scores) -> Iterator[Row]:
    lent = {"text_to_image": ("captions", "Image"), "captioning": ("images", "Caption")}
    ways = {"across_styles": "of other style", "within_style": "of same style"}
    for split, tasks in scores.items():
        for task, found in tasks.items():
            for way, s in found.items():
                what, loss = lent[task]
                yield Row(
                    f"{loss} loss, {what} {ways[way]}", f"{s['mean']:+.4f}",
                    f"95%: {s['low']:+.4f} to {s['high']:+.4f}; {split}",
                    f"Rise of the {loss.lower()} loss when {what} are permuted, all else equal;"
                    " an interval above 0 says it uses them.",
                )  # fmt: skip


def painting_rows(s: Scores) -> list[Row]:
    return [
        Row(
            "Painted image finds its reference", percent(s["retrieval"]),
            f"chance {percent(s['retrieval_chance'])}; {s['images']} images",
            "It is nearest to the true image among ten of its style, by distance of latents.",
        ),
        Row(
            "Painted in the right style", percent(s["style"]),
            f"chance {percent(s['style_chance'])}; true images {percent(s['style_of_references'])}",
            "Its latents are nearest to the mean of that style in training, in units of scatter.",
        ),
    ]  # fmt: skip


def captioning_rows(s: Scores) -> list[Row]:
    return [
        Row(
            "Caption has the exact name", percent(s["exact_names"]), f"{s['captions']} captions",
            "The text after \"emoji of\" is the emoji's name, letter by letter.",
        ),
        Row(
            "Edit distance of names", f"{s['name_edit_distance']:.2f}", "0 equal, 1 all different",
            "Changed letters over the longer name's length, on average.",
        ),
        Row(
            "Caption has the right style", percent(s["style"]),
            f"chance {percent(s['style_chance'])}",
            'It says "3D" or "flat", and the right one.',
        ),
    ]  # fmt: skip


def percent(share: float) -> str:
    return f"{100 * share:.1f}%" if math.isfinite(share) else "-"


# ---- pictures ----------------------------------------------------------------------------------


def sections(gallery: Gallery) -> Iterator[Section]:
    if gallery.reconstructed:
        yield Section(
            "Images through the autoencoder",
            "Left the original, right what its latents decode to. Names never shown in training.",
            [Card(pair, "") for pair in gallery.reconstructed],
        )
    for split, pairs in gallery.painted.items():
        yield Section(
            f"Painted from captions: {split}",
            f"Left what the model paints, right the true image; {SPLITS.get(split, split)}.",
            [Card((image, e.image), e.caption) for e, image in pairs],
        )
    for split, told in gallery.captioned.items():
        yield Section(
            f"Captions of images: {split}",
            f"What the model says, and below it the true caption; {SPLITS.get(split, split)}.",
            [Card((e.image,), printable(text) or "(nothing)", e.caption) for e, text in told],
        )
    if gallery.continued:
        yield Section(
            "Prose, continued",
            "The beginning of a passage of a held-out book, and how the model goes on in colour.",
            [Card((), prompt, printable(text)) for prompt, text in gallery.continued],
        )


def printable(text: str) -> str:
    """What an untrained model writes may hold control characters, which no font can show."""
    return "".join(c if c.isprintable() else " " for c in text)
