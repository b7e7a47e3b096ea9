"""What a modality is: an autoencoder between items and short sequences of continuous latents.

A modality turns an *item* (a `str`, a `PIL.Image`) into an *observation* (a CPU tensor that a data
worker can make without the network), encodes observations to Gaussian *posteriors* over latents,
decodes latents back, and knows the loss of its own stage. Everything outside speaks latents in
**normalised space**, where each channel has about zero mean and unit variance over the data.

Shape legend: L positions of one item, C channels.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from unified.latents.ragged import Latent, Latents, Posteriors, Ragged, Runs
from unified.randomness import ItemChance

if TYPE_CHECKING:
    from unified.latents.critic import Critic


class PluginConfig(BaseModel):
    """Base of every plugin's own configuration: unknown keys are errors, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True)


#: what a sample holds of an item: its observation, or the posterior that a frozen autoencoder made
#: of it and somebody stored
Observed = Tensor | Posteriors

Side = Literal["left", "right", "lead"]
T = TypeVar("T")


@dataclass(frozen=True)
class Choice:
    """How a modality of discrete symbols picks one; see `GenerationConfig`."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0


class Decoding:
    """Turns the latents of several items into observations while they are being generated."""

    def __init__(self, modality: Modality):
        self.modality = modality

    def extend(self, ids: Sequence[int], latents: Sequence[Latent]) -> list[Tensor]:
        """The observation of everything each item of `ids` has so far, of `latents`.

        An item that is left out of `ids` once has ended and does not come back.
        """
        del ids
        return decode(self.modality, latents)


class Modality(nn.Module, ABC):
    """Base class of a modality plugin (``modalities/NAME/``; see ``docs/add_a_modality.md``).

    Networks see many items at once, sorted by shape, as the few tensors of a `Ragged`; see
    `unified.latents.ragged`. What is drawn for an item is keyed by the item (`ItemChance`), so that
    it does not depend on the batch it came in.
    """

    Config: ClassVar[type[PluginConfig]]
    #: what can judge this autoencoder's reconstructions while it trains, by name
    critics: ClassVar[Mapping[str, type[Critic]]] = {}
    #: endings of the shard members that hold this modality's items, best first
    extensions: ClassVar[tuple[str, ...]]
    #: whether an item is a text: a command line may spell it out, and print it
    is_text: ClassVar[bool] = False
    #: what a size of `grid_for` counts (tokens, pixels of a side)
    unit: ClassVar[str] = "latents"
    #: the component of a page that shows an item by its file: a class of gradio that takes
    #: ``type="filepath"`` (that of a text holds the text)
    component: ClassVar[str] = "File"
    config: Any

    @property
    @abstractmethod
    def channels(self) -> int:
        """Width C of a latent."""

    @property
    def frozen(self) -> bool:
        """True for an autoencoder that no joint stage should train (a pretrained codec)."""
        return False

    @property
    def embedding_parameters(self) -> int:
        """How many of its parameters are tables of symbols, in and out (text: its vocabulary)."""
        return 0

    # ---- items and observations: no network involved ------------------------------------------

    @abstractmethod
    def read(self, data: bytes) -> Any:
        """A shard member's bytes as an item. ValueError says what is wrong with the bytes."""

    @abstractmethod
    def observe(
        self,
        item: Any,
        *,
        block: int | None = None,
        ends: bool = False,
        limit: int | None = None,
    ) -> Tensor:
        """The item as a CPU tensor.

        With `ends` the item is closed (text: eos is appended); with `block` the observation is
        padded so that its latents fill whole blocks of that many; with `limit` an item of more
        latents is cut there, and then not closed. ValueError for an item that cannot be
        represented, saying what was found and what would be right.
        """

    def crop(self, observation: Tensor, limit: int, generator: torch.Generator) -> Tensor:
        """A part of the observation of at most `limit` latents, drawn at random. ValueError where
        a part of an item is no item."""
        del generator
        length = math.prod(self.grid(observation))
        if length > limit:
            raise ValueError(f"an item of {length} latents is more than {limit} and cannot be cut")
        return observation

    def has_ended(self, observation: Tensor) -> bool:
        """Whether what is being generated is complete (text: it has an eos)."""
        del observation
        return False

    @classmethod
    def check_output(cls, path: Path) -> None:
        """ValueError for a file that `save_item` could not write, by its ending."""

    @classmethod
    def save_item(cls, item: Any, path: Path) -> None:
        """Write an item to the file `path`, in the format of its ending; by default as text."""
        path.write_text(f"{item}\n", encoding="utf-8")

    @abstractmethod
    def grid_for(self, size: Any) -> tuple[int, ...]:
        """The grid of something new of `size` in the modality's own unit (text: number of tokens;
        image: (height, width) in pixels); None is the modality's default."""

    @abstractmethod
    def realise(self, observation: Tensor) -> Any:
        """The observation as an item: ids to `str` (cut at eos), pixels to `PIL.Image`."""

    def sheet(self, rows: Sequence[Sequence[Any]]) -> Any | None:
        """One item that shows `rows` of items one below the other; None where there is none."""
        del rows
        return None

    def write(self, item: Any, path: Path) -> Path:
        """Write one item to look at to `path` with this modality's ending added; returns that."""
        target = path.with_name(path.name + ".txt")
        target.write_text(f"{item}\n", encoding="utf-8")
        return target

    @abstractmethod
    def grid(self, observation: Tensor) -> tuple[int, ...]:
        """The grid of latents that `observation` encodes to, without encoding it."""

    # ---- the autoencoder -----------------------------------------------------------------------
    # Losses are sums over positions. Divided by `counts`, added up over any split of a batch into
    # rows, accumulation steps and ranks, they give the same number.

    @abstractmethod
    def encode(self, observations: Ragged) -> Posteriors:
        """The posteriors of all observations, in normalised space and in their order."""

    @abstractmethod
    def decode(self, latents: Latents) -> Ragged:
        """The observation of each (normalised) latent; the most likely one where there is a
        choice."""

    def collate(self, observations: Sequence[Tensor]) -> Ragged:
        """Observations, sorted by shape, as one batch. Runs in a data worker."""
        return Ragged.of(observations)

    def grids(self, observations: Ragged) -> Runs:
        """The runs of the grids that `observations` encode to."""
        return tuple((len(group), self.grid(group[0])) for group in observations.groups())

    def decoding(
        self, choice: Choice, seeds: Sequence[int], starts: Sequence[int], block: int | None
    ) -> Decoding:
        """What decodes one item per seed as its latents arrive, `block` at a time after the first
        ``starts[i]``. `choice` is for modalities with discrete symbols to choose."""
        del choice, seeds, starts, block
        return Decoding(self)

    # A beginning that is to be continued ends where it ends, and not at the end of a latent.

    def beginning(self, item: Any) -> Tensor:
        """The observation of something to continue, not filled up to whole latents."""
        return self.observe(item)

    #: where the logit-normal of training timesteps sits, unless the configuration says
    timestep_location: float = 0.0
    #: symbols of an observation (tokens) that one latent stands for
    symbols: int = 1
    #: how a beginning is filled up to whole latents; see `pad`
    boundary: Side = "right"
    #: phases that the grouping of observations into latents can have; training draws one of them
    leads: int = 1

    def pad(self, observation: Tensor, block: int, side: Side) -> Tensor:
        """The observation, filled up to whole blocks of latents: by padding on the left or on the
        right, or by as many unknowns on the left (``lead``)."""
        del block, side
        return observation

    def realise_all(self, observation: Tensor) -> Any:
        """`realise`, without cutting at an end or leaving anything out."""
        return self.realise(observation)

    #: what `fidelity` measures
    fidelity_unit: ClassVar[str] = "share of symbols right"

    def fidelity(self, observation: Tensor, back: Tensor) -> float:
        """How much of an observation its reconstruction `back` gives back."""
        return float((observation == back).double().mean())

    #: names of what `measure` gives
    measures: ClassVar[tuple[str, ...]] = ()

    def measure(self, observation: Tensor, back: Tensor) -> dict[str, float]:
        """How near its reconstruction `back` comes to an observation, by name of the measure."""
        del observation, back
        return {}

    @abstractmethod
    def counts(self, observations: Ragged) -> dict[str, float]:
        """Term -> number of positions its sum runs over, without running the network."""

    def close(self, observation: Tensor) -> Tensor:
        """The observation with its end marked (text: eos)."""
        return observation

    def log_prob(self, observation: Tensor, latent: Latent, start: int, stop: int) -> Tensor:
        """log p(x | z) of what each latent stands for [L], in nats, where the observation is
        discrete; its symbols from `start` to `stop` count, the others are given or fill up."""
        del observation, latent, start, stop
        raise ValueError(f"{type(self).__name__} has no decoder density, so it cannot be scored")

    def log_scale(self) -> Tensor:
        """log |dz / d(encoder's output)| per channel [C], of the latent normalisation."""
        return torch.zeros(self.channels)

    @abstractmethod
    def reconstruction(self, observations: Ragged, latents: Latents) -> dict[str, Tensor]:
        """-log p(x | z) of the observations given their latents (eq. 3.15), as sums by term."""

    def judged(
        self, observations: Ragged, latents: Latents, critics: Sequence[Critic]
    ) -> dict[str, Tensor]:
        """`reconstruction`, and the terms of `critics` on the same decoded items."""
        del critics  # there are none, unless the class names some
        return self.reconstruction(observations, latents)

    def masking(self, observations: Ragged, chance: ItemChance) -> dict[str, Tensor]:
        """The BERT-style loss of eq. 3.16, where the modality has one, as a sum by term."""
        del observations, chance
        return {}

    def loss(
        self, observations: Ragged, chance: ItemChance, critics: Sequence[Critic] = ()
    ) -> dict[str, Tensor]:
        """The autoencoder's own objective (eq. 3.16): unweighted sums by term; see `weights`.

        The terms of `critics` come on top.
        """
        posteriors = self.encode(observations)
        latents = posteriors.sample(chance.normal("posterior", self.channels))
        return {
            **self.judged(observations, latents, critics),
            "kl": posteriors.kl(),
            **self.masking(observations, chance),
        }

    @abstractmethod
    def weights(self) -> dict[str, float]:
        """The factor of each term: ``kl`` is beta, ``mask`` is lambda_mask of eq. 3.16."""

    @abstractmethod
    def fit_statistics(self, observations: Ragged) -> None:
        """Set the latent statistics (shift and scale, stored with the weights) from data."""

    # ---- making, files -------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def build(cls, config: Any, corpus: Iterable[Any] | None) -> Modality:
        """A new modality with random weights. `corpus` iterates over items of the training data,
        for what must be fitted before the network exists (a tokenizer). Without it (None) the
        modality has the right network but may be unable to `observe`: enough to count parameters.
        """

    @abstractmethod
    def save_pretrained(self, folder: Path | str, name: str) -> None:
        """Write this modality's parts into the pipeline folder `folder`: ``{name}_vae/`` with
        ``config.json`` and ``model.safetensors``, and whatever else it needs (a tokenizer)."""

    @classmethod
    @abstractmethod
    def from_pretrained(cls, folder: Path | str, name: str) -> Modality:
        """Read what `save_pretrained` wrote; strict, and never a pickle."""


def grid_of(modality: Modality, observed: Observed) -> tuple[int, ...]:
    """The grid of an observation's latents."""
    return observed.grid if isinstance(observed, Posteriors) else modality.grid(observed)


def unencoded(observed: Iterable[Observed]) -> list[Tensor]:
    """The observations themselves. ValueError where only their latents are stored."""
    found = list(observed)
    tensors = [o for o in found if isinstance(o, Tensor)]
    if len(tensors) < len(found):
        raise ValueError(
            "this needs the items themselves, but found stored latents: name the sources they were"
            " made from"
        )
    return tensors


# ---- things that come one by one, in the order in which they come --------------------------------
# Generation, evaluation and samples have lists; this is their one way through an autoencoder.


def by_shape(shapes: Sequence[tuple[int, ...]]) -> list[int]:
    """The places of items, sorted by their shapes; of one shape, in their order."""
    return sorted(range(len(shapes)), key=lambda i: shapes[i])


def encode(
    modality: Modality, observed: Sequence[Observed], at_once: int | None = None
) -> list[Posteriors]:
    """The posterior of each, on the modality's device; `at_once` of them go through the network
    together (None: all). What is stored is not encoded again."""
    device = next(modality.parameters()).device
    found = {i: o.to(device) for i, o in enumerate(observed) if isinstance(o, Posteriors)}
    rest = [(i, o) for i, o in enumerate(observed) if isinstance(o, Tensor)]
    for part in _parts(rest, at_once):
        part = [part[i] for i in by_shape([tuple(o.shape) for _, o in part])]
        batch = modality.collate([o for _, o in part]).to(device)
        found |= zip((i for i, _ in part), modality.encode(batch).items(), strict=True)
    return [found[i] for i in range(len(observed))]


def modes(posteriors: Iterable[Posteriors]) -> list[Latent]:
    """The mean of each posterior of one item."""
    return [Latent(p.mean_NC, p.grid) for p in posteriors]


def decode(
    modality: Modality, latents: Sequence[Latent], at_once: int | None = None
) -> list[Tensor]:
    """The observation of each latent, on the CPU; `at_once` of them go through the network
    together (None: all)."""
    device = next(modality.parameters()).device
    found: dict[int, Tensor] = {}
    for part in _parts(list(enumerate(latents)), at_once):
        part = [part[i] for i in by_shape([z.grid for _, z in part])]
        batch = Latents.of([z for _, z in part]).to(device)
        found |= zip((i for i, _ in part), modality.decode(batch).to("cpu").items(), strict=True)
    return [found[i] for i in range(len(latents))]


def _parts(items: list[T], size: int | None) -> Iterator[list[T]]:
    size = size or max(len(items), 1)
    return (items[start : start + size] for start in range(0, len(items), size))
