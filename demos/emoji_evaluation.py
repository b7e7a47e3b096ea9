"""What a model of the emoji does, measured on examples it was not trained on.

`evaluate_emoji` serves the quickstart and longer runs alike: it takes any pipeline with the tasks
of the quickstart, and the configuration that names the splits of its sources.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from typing import Any, cast

import torch
from PIL import Image

from unified.config.schema import Config
from unified.data.fixed import fixed_examples
from unified.data.source import Source
from unified.data.streams import Prepared, TaskStream
from unified.demos.emoji import (
    IMAGE,
    STYLES,
    TEXT,
    Emoji,
    common,
    name_tokens,
    named,
    read_emoji,
    says_style,
)
from unified.demos.linear import ImagePCA, mean_psnr, thumbnail
from unified.evaluation.flow_loss import Encoded, TargetLoss, encode, target_loss
from unified.evaluation.nearest import latent_vectors, nearest_centroids, retrieved
from unified.evaluation.pairing import condition_matters, partners, repaired
from unified.evaluation.reconstruction import reconstruct
from unified.evaluation.statistics import normalised_edit_distance
from unified.modalities.text.modality import TextModality
from unified.model.precision import arithmetic
from unified.pipeline import UnifiedPipeline
from unified.training.stages import Sources

PAINTING, CAPTIONING, CONTINUATION = "text_to_image", "captioning", "continuation"
#: each caption is reconstructed from this many posterior samples
TEXT_SAMPLES = 4
#: what image reconstruction is set beside: principal components, and a thumbnail of this side
COMPONENTS, THUMBNAIL = (64, 256), 16
#: timesteps and noises per example for the flow losses
DRAWS = 2
PASSAGES = 128
#: images of a split that retrieval chooses among
REFERENCES = 256
CANDIDATES = 10
#: how many of a kind the gallery shows
PICTURES = 12
PROMPT_WORDS, PROMPTS = 12, 6


@dataclass
class Gallery:
    """What there is to look at."""

    #: (original, reconstruction)
    reconstructed: list[tuple[Image.Image, Image.Image]] = field(default_factory=list)
    #: split -> (emoji, painted from its caption)
    painted: dict[str, list[tuple[Emoji, Image.Image]]] = field(default_factory=dict)
    #: split -> (emoji, text about its image)
    captioned: dict[str, list[tuple[Emoji, str]]] = field(default_factory=dict)
    #: (prompt, what follows)
    continued: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Evaluation:
    """`scores` are plain numbers, ready for JSON, by what they measure."""

    scores: dict[str, Any]
    gallery: Gallery


def evaluate_emoji(
    pipeline: UnifiedPipeline,
    config: Config,
    splits: Sequence[str] = ("val", "val-style", "train"),
    count: int = 60,
    num_steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
) -> Evaluation:
    """Everything below: losses on the whole of every held-out split, generation from the first
    `count` examples of each split, at the precision of training. Progress goes to stderr."""
    settings = {"num_steps": num_steps, "guidance_scale": guidance_scale, "seed": seed}
    run = _Run(pipeline, config, count, settings)
    held_out = [s for s in splits if s != "train"]
    scores: dict[str, Any] = {}
    steps = {
        "caption reconstruction": run.caption_reconstruction,
        "image reconstruction": run.image_reconstruction,
        "flow loss": run.flow_loss,
        "permuted pairs": lambda: {s: run.permuted_pairs(s) for s in held_out},
        "painting": lambda: {s: run.painting(s) for s in splits},
        "captioning": lambda: {s: run.captioning(s) for s in splits},
        "continuation": run.continuation,
    }
    device = next(pipeline.prior.parameters()).device
    for name, step in steps.items():
        begun = time.monotonic()
        with arithmetic(config.training.precision, device):
            scores[name] = step()
        print(f"evaluated {name} ({time.monotonic() - begun:.1f} s)", file=sys.stderr, flush=True)
    return Evaluation(scores, run.gallery)


class _Run:
    """One evaluation; every method is one measurement, and adds what there is to see."""

    def __init__(
        self, pipeline: UnifiedPipeline, config: Config, count: int, settings: dict[str, Any]
    ):
        check(pipeline)
        self.pipeline, self.count, self.settings = pipeline, count, settings
        self.seed = int(settings["seed"])
        self.sources = Sources(config)
        self.gallery = Gallery()
        self.text, self.image = pipeline.modalities[TEXT], pipeline.modalities[IMAGE]
        self.emoji = cache(self._emoji)
        self.own_loss = cache(self._own_loss)

    def _source(self, task: str, split: str) -> Source:
        (source,) = self.pipeline.tasks[task].config.sources
        return self.sources(source, split)

    def _emoji(self, split: str) -> list[Emoji]:
        return read_emoji(self._source(PAINTING, split), self.pipeline.modalities)

    # ---- the autoencoders ----

    def caption_reconstruction(self) -> dict[str, Any]:
        """Of the tokens of held-out names, the share that comes back from posterior samples."""
        emoji, tokenizer = self.emoji("val"), cast(TextModality, self.text).tokenizer
        shown = [self.text.observe(e.caption, ends=True) for e in emoji]
        right, whole = [], []
        for sample in range(TEXT_SAMPLES):
            back = reconstruct(self.text, shown, seed=self.seed + sample)
            for e, ids_T, back_T in zip(emoji, shown, back, strict=True):
                named_T = torch.tensor(name_tokens(tokenizer, e.caption, e.name))
                right.append((ids_T == back_T)[: len(named_T)][named_T])
                whole.append(self.text.realise(back_T) == e.caption)
        return {
            "name_tokens_right": float(torch.cat(right).double().mean()),
            "captions_whole": share(whole),
            "captions": len(emoji),
            "samples_each": TEXT_SAMPLES,
        }

    def image_reconstruction(self) -> dict[str, Any]:
        """PSNR of held-out images, beside simple ways to say an image in so many numbers."""
        shown = [self.image.observe(e.image) for e in self.emoji("val")]
        originals = [self.image.realise(o) for o in shown]
        means = [self.image.realise(o) for o in reconstruct(self.image, shown)]
        samples = [self.image.realise(o) for o in reconstruct(self.image, shown, self.seed)]
        self.gallery.reconstructed = list(zip(originals, means, strict=True))[:PICTURES]
        pca = ImagePCA([common(e.image) for e in self.emoji("train")], max(COMPONENTS))
        small = [thumbnail(image, THUMBNAIL) for image in originals]
        return {
            "psnr_mode": mean_psnr(originals, means),
            "psnr_sample": mean_psnr(originals, samples),
            "numbers": math.prod(self.image.grid(shown[0])) * self.image.channels,
            "thumbnail": {str(3 * THUMBNAIL**2): mean_psnr(originals, small)},
            "pca": {
                str(k): mean_psnr(originals, pca.reconstruct(originals, k)) for k in COMPONENTS
            },
            "images": len(originals),
        }

    # ---- the prior's loss ----

    def _prepared(self, task: str, split: str) -> list[Prepared]:
        filled = self.pipeline.tasks[task]
        prepared = []
        for i, e in enumerate(self.emoji(split)):
            items = filled.fill({TEXT: e.caption, IMAGE: e.image})
            observed = {
                s.kind: filled.observe(self.pipeline.modalities, s.kind, items[s.kind])
                for s in filled.layout.filled
            }
            prepared.append(Prepared(task, e.name, i, observed))
        return prepared

    def _own_loss(self, task: str, split: str) -> tuple[Encoded, TargetLoss]:
        """(latents, loss) of the true pairs."""
        encoded = encode(self.pipeline, self._prepared(task, split))
        return encoded, target_loss(self.pipeline, task, encoded, DRAWS, self.seed)

    def flow_loss(self) -> dict[str, Any]:
        """The loss of each task's target now, and of velocity zero, where training starts."""
        stream = TaskStream(
            CONTINUATION, self.pipeline.tasks[CONTINUATION], self.pipeline.modalities
        )
        passages = fixed_examples(self._source(CONTINUATION, "val"), stream, PASSAGES)
        encoded = encode(self.pipeline, passages)
        losses = {
            PAINTING: self.own_loss(PAINTING, "val")[1],
            CAPTIONING: self.own_loss(CAPTIONING, "val")[1],
            CONTINUATION: target_loss(self.pipeline, CONTINUATION, encoded, DRAWS, self.seed),
        }
        return {
            task: {
                "start": float(loss.zero_ED.mean()),
                "now": float(loss.model_ED.mean()),
                "examples": len(loss.model_ED),
            }
            for task, loss in losses.items()
        }

    def permuted_pairs(self, split: str) -> dict[str, Any]:
        """How much worse each loss gets with the caption, or image, of another example."""
        groups = [e.style for e in self.emoji(split)]
        found: dict[str, Any] = {}
        for task in (PAINTING, CAPTIONING):
            target = self.pipeline.tasks[task].generates
            encoded, own = self.own_loss(task, split)
            for where, across in (("across_styles", True), ("within_style", False)):
                swapped = repaired(encoded, partners(groups, across, self.seed), target)
                other = target_loss(self.pipeline, task, swapped, DRAWS, self.seed)
                found.setdefault(task, {})[where] = asdict(condition_matters(own, other))
        return found

    # ---- what it makes ----

    def painting(self, split: str) -> dict[str, Any]:
        """Retrieval and style of images painted from captions."""
        everyone = self.emoji(split)[:REFERENCES]
        some = everyone[: self.count]
        painted = [common(image) for image in self._paint(some)]
        self.gallery.painted[split] = list(zip(some, painted, strict=True))[:PICTURES]
        reference_RD = self._vectors([e.image for e in everyone])
        painted_QD = self._vectors(painted)
        groups = [e.style for e in everyone]
        hits = retrieved(painted_QD, reference_RD, range(len(some)), groups, CANDIDATES, self.seed)
        return {
            "retrieval": share(hits),
            "retrieval_chance": 1 / CANDIDATES,
            "style": self._style_share(painted_QD, groups[: len(some)]),
            "style_of_references": self._style_share(reference_RD, groups),
            "style_chance": 1 / len(STYLES),
            "images": len(some),
        }

    def _paint(self, emoji: Sequence[Emoji]) -> list[Image.Image]:
        """One image a caption, as large as training would show it."""
        shapes = [self.image.observe(e.image).shape for e in emoji]
        sizes = [(height, width) for _, height, width in shapes]
        painted: dict[int, Image.Image] = {}
        for size in dict.fromkeys(sizes):
            chosen = [i for i, s in enumerate(sizes) if s == size]
            prompts = [emoji[i].caption for i in chosen]
            made = self.pipeline.text_to_image(prompts, size=size, **self.settings)
            painted.update(zip(chosen, made, strict=True))
        return [painted[i] for i in range(len(emoji))]

    def _vectors(self, images: Sequence[Image.Image]) -> torch.Tensor:
        return latent_vectors(self.image, [self.image.observe(common(i)) for i in images])

    @cached_property
    def _styled(self) -> tuple[torch.Tensor, list[str]]:
        """Vectors of training images, and their styles."""
        emoji = self.emoji("train")
        return self._vectors([e.image for e in emoji]), [e.style for e in emoji]

    def _style_share(self, vectors_QD: torch.Tensor, wanted: Sequence[str]) -> float:
        found = nearest_centroids(vectors_QD, *self._styled)
        return share([a == b for a, b in zip(found, wanted, strict=True)])

    def captioning(self, split: str) -> dict[str, Any]:
        """Names and style words of captions of images."""
        emoji = self.emoji(split)[: self.count]
        texts = self.pipeline.caption([e.image for e in emoji], **self.settings)
        self.gallery.captioned[split] = list(zip(emoji, texts, strict=True))[:PICTURES]
        pairs = list(zip(emoji, texts, strict=True))
        distances = [normalised_edit_distance(named(t), e.name) for e, t in pairs]
        return {
            "exact_names": share([named(t) == e.name for e, t in pairs]),
            "name_edit_distance": sum(distances) / len(distances),
            "style": share([says_style(t, e.style) for e, t in pairs]),
            "style_chance": 1 / len(STYLES),
            "captions": len(emoji),
        }

    def continuation(self) -> dict[str, Any]:
        """A few beginnings of held-out prose, and how the model goes on. Nothing is measured."""
        examples = list(self._source(CONTINUATION, "val"))
        chosen = [examples[i * len(examples) // PROMPTS] for i in range(PROMPTS)]
        passages = [self.text.read(example.members["txt"]) for example in chosen]
        prompts = [" ".join(text.split()[:PROMPT_WORDS]) for text in passages]
        texts = self.pipeline.continue_text(prompts, **self.settings)
        self.gallery.continued = list(zip(prompts, texts, strict=True))
        return {"prompts": len(prompts)}


def check(pipeline: UnifiedPipeline) -> None:
    """ValueError unless the pipeline has what is measured here."""
    missing = {PAINTING, CAPTIONING, CONTINUATION} - set(pipeline.tasks)
    if missing or not isinstance(pipeline.modalities.get(TEXT), TextModality):
        raise ValueError(
            f"the emoji are evaluated with the tasks {PAINTING}, {CAPTIONING} and {CONTINUATION},"
            f" and with a modality {TEXT!r} of type text; the model has the tasks"
            f" {', '.join(pipeline.tasks)} and the modalities {', '.join(pipeline.modalities)}"
        )


def share(right: Sequence[bool]) -> float:
    return sum(right) / len(right)
