"""Text as a modality: token ids, their VAE, and the losses of its stage.

An observation is a vector of ids [T]; its latents are [T / patch_size, C]. Texts of a batch are
ragged, and become padded rows where a network reads them. The posterior mean goes
through a LayerNorm without parameters, so latents have about zero mean and unit variance from the
first step on, and normalised space is the encoder's own (up to two stored scalars).

Shape legend: T tokens of one text, B texts, L latents, N latents of all texts, C latent channels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from unified.errors import validated
from unified.latents.modality import Choice, Decoding, Modality, Side
from unified.latents.ragged import Latent, Latents, Posteriors, Ragged, numbers, pad, unpad
from unified.latents.weights import load_weights, save_weights
from unified.modalities.text.decoding import TextDecoding
from unified.modalities.text.tokenizer import Tokenizer
from unified.modalities.text.transformer import TextKVCache
from unified.modalities.text.vae import TextVAE
from unified.modalities.text.vae_config import TextVAEConfig
from unified.model.layers import wide
from unified.randomness import ItemChance

CONFIG = "config.json"
IGNORED = -100
#: above all numbers that tokens are ordered by
NEVER = torch.iinfo(torch.int64).max


class TextConfig(TextVAEConfig):
    """The network's sizes, and how it is trained and fed."""

    #: weight of the KL to the base prior (beta of eq. 3.16), per latent, against nats per token
    beta: float = Field(3e-3, ge=0)
    #: weight of the masked-token loss (lambda_mask of eq. 3.16); 0 leaves it out
    mask_weight: float = Field(0.1, ge=0)
    #: share of a text's tokens that the masked-token loss hides
    mask_rate: float = Field(0.15, gt=0, le=1)
    #: VAE logSNR (eq. 16.2) at which posteriors are held; null lets the encoder learn its variances
    log_snr: float | None = Field(None, allow_inf_nan=False)
    #: a tokenizer.json, or its folder, to use instead of training one
    tokenizer: str | None = None
    #: longest text, in tokens, eos included
    max_tokens: int = Field(512, gt=0)

    @model_validator(mode="after")
    def _power_is_known(self) -> TextConfig:
        if self.log_snr is not None and not self.encoder_last_ln:
            raise ValueError(
                "log_snr holds the posteriors' variance relative to means of mean square 1, which"
                " only encoder_last_ln gives them"
            )
        return self


class TextModality(Modality):
    """Strictly causal (or block-causal) text latents; see the module's docstring."""

    Config = TextConfig
    extensions: ClassVar[tuple[str, ...]] = ("txt",)
    is_text: ClassVar[bool] = True
    unit: ClassVar[str] = "tokens"
    component: ClassVar[str] = "Textbox"
    tokenizer_class: ClassVar[type[Tokenizer]] = Tokenizer

    def __init__(self, config: TextConfig, tokenizer: Tokenizer | None):
        super().__init__()
        if tokenizer is not None and len(tokenizer) > config.vocab_size:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} tokens, but vocab_size is"
                f" {config.vocab_size}; it must be at least as large"
            )
        self.config: TextConfig = config
        self._tokenizer = tokenizer
        self.network = TextVAE(config)

    @property
    def channels(self) -> int:
        return self.config.latent_dim

    @property
    def embedding_parameters(self) -> int:
        """Rows of the vocabulary in and out; the mask token's row is extra."""
        return 2 * self.config.vocab_size * self.config.dim

    @property
    def timestep_location(self) -> float:  # type: ignore[override]
        """Wider latents keep their meaning under more noise (paper 4.2, figure 2)."""
        return location_by_width(self.channels)

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise ValueError(
                "this text modality has no tokenizer, and works on ids only: give its folder a"
                " tokenizer/, or build it with a corpus or a tokenizer"
            )
        return self._tokenizer

    @property
    def has_tokenizer(self) -> bool:
        """Without one, a text modality works on ids and cannot read or write text."""
        return self._tokenizer is not None

    # ---- items and observations -----------------------------------------------------------------

    def read(self, data: bytes) -> str:
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"a text must be UTF-8, found {error.reason} at byte {error.start}"
            ) from None

    def observe(
        self,
        item: str,
        *,
        block: int | None = None,
        ends: bool = False,
        limit: int | None = None,
        lead: int = 0,
    ) -> Tensor:
        """`item` as int64 ids [T]: a `lead` of unknown tokens, eos if it `ends`, then pads up to
        whole patches and blocks."""
        _check(item)
        ids = [self.unknown_id] * lead + self.tokenizer.encode(item)
        ids += [self.tokenizer.eos_id] * ends
        if limit is not None:
            ids = ids[: limit * self.config.patch_size]
        if not ids:
            raise ValueError("an empty text has no tokens: it needs at least one, or an end")
        if limit is None and len(ids) > self.config.max_tokens:
            raise ValueError(
                f"a text has {len(ids)} tokens, eos included, but max_tokens is"
                f" {self.config.max_tokens}: shorten it or raise max_tokens"
            )
        missing = -len(ids) % ((block or 1) * self.config.patch_size)
        return torch.tensor(ids + [self.tokenizer.pad_id] * missing)

    def beginning(self, item: str) -> Tensor:
        _check(item)
        if self.tokenizer.special_only(item):
            raise ValueError(
                f"a text to go on with needs words, but {item!r} spells special tokens and no more"
            )
        return torch.tensor(self.tokenizer.encode(item), dtype=torch.int64)

    def pad(self, observation: Tensor, block: int, side: Side) -> Tensor:
        missing = -len(observation) % (block * self.config.patch_size)
        filler = self.unknown_id if side == "lead" else self.tokenizer.pad_id
        filling = observation.new_full((missing,), filler)
        return torch.cat([observation, filling] if side == "right" else [filling, observation])

    @property
    def unknown_id(self) -> int:
        """The mask token: a token that stands there, but is not known."""
        return self.config.vocab_size

    @property
    def symbols(self) -> int:  # type: ignore[override]
        return self.config.patch_size

    @property
    def leads(self) -> int:  # type: ignore[override]
        return self.config.patch_size if self.boundary == "lead" else 1

    @property
    def boundary(self) -> Side:  # type: ignore[override]
        return self.config.boundary

    def realise(self, observation: Tensor) -> str:
        return self.tokenizer.decode(self._known(observation).tolist())

    def realise_all(self, observation: Tensor) -> str:
        return self.tokenizer.decode_all(self._known(observation).tolist())

    def _known(self, ids_T: Tensor) -> Tensor:
        return ids_T[ids_T != self.unknown_id]

    def crop(self, observation: Tensor, limit: int, generator: torch.Generator) -> Tensor:
        """A random window of `limit` latents of a longer text.

        It begins at a whole latent, or anywhere and with a random lead where texts have leads.
        """
        tokens = limit * self.config.patch_size
        if self.leads > 1:
            lead = int(torch.randint(self.leads, (), generator=generator))
            unknown = observation.new_full((lead,), self.unknown_id)
            whole = torch.cat([unknown, self._window(observation, tokens - lead, 1, generator)])
            return self.pad(whole, 1, "right")
        return self._window(observation, tokens, self.config.patch_size, generator)

    def _window(
        self, ids_T: Tensor, tokens: int, stride: int, generator: torch.Generator
    ) -> Tensor:
        """`tokens` of `ids_T` from a random multiple of `stride`; all if there are fewer."""
        starts = (len(ids_T) - tokens) // stride + 1
        if starts <= 1:
            return ids_T[:tokens]
        start = int(torch.randint(starts, (), generator=generator)) * stride
        return ids_T[start : start + tokens]

    def has_ended(self, observation: Tensor) -> bool:
        ends = self.tokenizer.end_ids if self.has_tokenizer else set()
        return any(i in ends for i in observation.tolist())

    def grid_for(self, size: int | None) -> tuple[int, ...]:
        """Latents of `size` tokens, rounded up to whole patches; by default `max_tokens`."""
        tokens = self.config.max_tokens if size is None else size
        if tokens < 1:
            raise ValueError(f"a text to generate has at least 1 token, {tokens} were asked for")
        return (-(-tokens // self.config.patch_size),)

    def grid(self, observation: Tensor) -> tuple[int, ...]:
        return (len(observation) // self.config.patch_size,)

    # ---- the autoencoder ------------------------------------------------------------------------

    def encode(self, observations: Ragged) -> Posteriors:
        return self._encode(observations, self._rows(observations))

    def _encode(self, observations: Ragged, ids_BT: Tensor) -> Posteriors:
        """The posteriors of texts whose ids stand in these rows."""
        lengths_B = observations.length_B // self.config.patch_size
        mean_BLC, logvar_BLC = self.network.encoder(ids_BT, lengths_B)
        runs = self.grids(observations)
        mean_NC, logvar_NC = (unpad(x, lengths_B, numbers(runs)) for x in (mean_BLC, logvar_BLC))
        if self.config.log_snr is not None:
            logvar_NC = torch.full_like(logvar_NC, -self.config.log_snr)
        mean_NC = (mean_NC - self.config.shifting_factor) * self.config.scaling_factor
        logvar_NC = logvar_NC + 2 * math.log(self.config.scaling_factor)
        return Posteriors(mean_NC, logvar_NC, runs)

    def logits(self, latents: Sequence[Latent], cache: TextKVCache | None = None) -> Tensor:
        """Logits [B, T, vocab_size] of `latents`, padded on the right to the longest; with a
        `cache`, they continue the latents that it holds."""
        lengths_B = torch.tensor([len(z.values) for z in latents])
        z_BLC = pad_sequence([z.values for z in latents], batch_first=True)
        return self._logits(z_BLC, lengths_B, cache)

    def _logits(self, z_BLC: Tensor, lengths_B: Tensor, cache: TextKVCache | None = None) -> Tensor:
        decoder = self.network.decoder
        return decoder(z_BLC.to(decoder.in_layer.weight), cache, lengths_B)

    def decode(self, latents: Latents) -> Ragged:
        lengths_B = torch.tensor([n for count, (n,) in latents.runs for _ in range(count)])
        lengths_B = lengths_B.to(latents.values.device)
        longest = max(n for _, (n,) in latents.runs)
        ids_BT = self._logits(pad(latents.values, lengths_B, longest), lengths_B).argmax(-1)
        patch = self.config.patch_size
        runs = tuple((count, (n * patch,)) for count, (n,) in latents.runs)
        return Ragged(unpad(ids_BT, lengths_B * patch, numbers(runs)), runs, lengths_B * patch)

    def decoding(
        self, choice: Choice, seeds: Sequence[int], starts: Sequence[int], block: int | None
    ) -> Decoding:
        return TextDecoding(self, choice, seeds, starts, block or 1)

    def counts(self, observations: Ragged) -> dict[str, float]:
        real_BT = self._is_real(observations.padded(self.unknown_id))
        counts = {
            "reconstruction": float(real_BT.sum()),
            "kl": float(numbers(self.grids(observations))),
        }
        if self.config.mask_weight:
            counts["mask"] = float(self._hidden(real_BT).sum())
        return counts

    def close(self, observation: Tensor) -> Tensor:
        return torch.cat([observation, observation.new_full((1,), self.tokenizer.eos_id)])

    def log_prob(self, observation: Tensor, latent: Latent, start: int, stop: int) -> Tensor:
        """Pads and unknown tokens never count."""
        logits_TV = wide(self.logits([latent])[0])
        wanted_T = torch.where(self._is_real(observation), observation, 0).to(logits_TV.device)
        found_T = logits_TV.log_softmax(-1).gather(1, wanted_T[:, None])[:, 0]
        place_T = torch.arange(len(observation))
        counts_T = self._is_real(observation) & (start <= place_T) & (place_T < stop)
        masked_T = found_T.masked_fill(~counts_T.to(found_T.device), 0.0)
        return masked_T.unflatten(0, (-1, self.config.patch_size)).sum(1)

    fidelity_unit: ClassVar[str] = "share of tokens right"

    def fidelity(self, observation: Tensor, back: Tensor) -> float:
        """Of the tokens that are neither pads nor unknown."""
        real = self._is_real(observation)
        return float((observation == back)[real].double().mean())

    def log_scale(self) -> Tensor:
        return torch.full((self.channels,), math.log(self.config.scaling_factor))

    def reconstruction(self, observations: Ragged, latents: Latents) -> dict[str, Tensor]:
        """Summed cross entropy of all tokens but pads, in nats."""
        ids_BT = self._rows(observations)
        return {"reconstruction": self._cross_entropy(observations, latents, ids_BT)}

    def masking(self, observations: Ragged, chance: ItemChance) -> dict[str, Tensor]:
        """Summed cross entropy of hidden tokens, read through encoder, posterior and decoder.

        How many are hidden is a function of the text alone; which ones, chance says: those whose
        numbers are least. A strictly causal encoder has only the left context to predict from.
        """
        if not self.config.mask_weight:
            return {}
        ids_BT = self._rows(observations)
        real_BT = self._is_real(ids_BT)
        number_BT = chance.order("hidden", ids_BT.shape[1]).masked_fill(~real_BT, NEVER)
        last_B1 = number_BT.sort(1).values.gather(1, self._hidden(real_BT)[:, None] - 1)
        hidden_BT = real_BT & (number_BT <= last_B1)
        posteriors = self._encode(observations, ids_BT.masked_fill(hidden_BT, self.unknown_id))
        latents = posteriors.sample(chance.normal("masked posterior", self.channels))
        wanted_BT = ids_BT.masked_fill(~hidden_BT, self.unknown_id)
        return {"mask": self._cross_entropy(observations, latents, wanted_BT)}

    def weights(self) -> dict[str, float]:
        weights = {"reconstruction": 1.0, "kl": self.config.beta}
        return weights | ({"mask": self.config.mask_weight} if self.config.mask_weight else {})

    def fit_statistics(self, observations: Ragged) -> None:
        """Nothing to fit: the encoder's last LayerNorm fixes the scale of text latents, and the
        decoder is trained on latents that `scaling_factor` and `shifting_factor` have passed."""

    def _is_real(self, ids_T: Tensor) -> Tensor:
        """True for tokens of the text: neither pads nor unknown."""
        real = ids_T != self.unknown_id
        return real & (ids_T != self.tokenizer.pad_id) if self.has_tokenizer else real

    def _hidden(self, real_BT: Tensor) -> Tensor:
        """How many tokens the masked-token loss hides of each text [B]: a share of the real ones,
        and one at least. In whole numbers, which no device rounds another way."""
        share = round(self.config.mask_rate * 1_000_000)
        return ((real_BT.sum(1) * share + 500_000) // 1_000_000).clamp(min=1)

    def _rows(self, observations: Ragged) -> Tensor:
        """Ids [B, T], filled up with unknown ones, which are no targets."""
        return observations.padded(self.unknown_id)

    def _cross_entropy(self, observations: Ragged, latents: Latents, ids_BT: Tensor) -> Tensor:
        """-log p of all real tokens in the rows, given the latents of their texts; a sum."""
        patch = self.config.patch_size
        lengths_B = observations.length_B // patch
        z_BLC = pad(latents.values, lengths_B, observations.longest // patch)
        logits_BTV = wide(self._logits(z_BLC, lengths_B))
        wanted_BT = torch.where(self._is_real(ids_BT), ids_BT, IGNORED)
        return F.cross_entropy(
            logits_BTV.flatten(0, 1), wanted_BT.flatten(), ignore_index=IGNORED, reduction="sum"
        )

    # ---- making, files --------------------------------------------------------------------------

    @classmethod
    def build(cls, config: TextConfig, corpus: Iterable[str] | None) -> TextModality:
        """A new modality; its tokenizer is `config.tokenizer`, else trained on `corpus`."""
        if corpus is None:
            return cls(config, None)
        if config.tokenizer is not None:
            return cls(config, Tokenizer.load(config.tokenizer))
        return cls(config, Tokenizer.train(corpus, config.vocab_size))

    def save_pretrained(self, folder: Path | str, name: str) -> None:
        """Write ``{name}_vae/`` and the tokenizer's folder (``tokenizer/`` for the name "text")."""
        vae = Path(folder) / f"{name}_vae"
        vae.mkdir(parents=True, exist_ok=True)
        if self.has_tokenizer:
            self.tokenizer.save(_tokenizer_folder(folder, name))
        fields = self.config.model_dump(mode="json") | {"tokenizer": None}
        (vae / CONFIG).write_text(json.dumps({"type": "text", **fields}, indent=2) + "\n", "utf-8")
        save_weights(self.network, vae)

    @classmethod
    def from_pretrained(cls, folder: Path | str, name: str) -> TextModality:
        """Read what `save_pretrained` wrote. ValueError for a file or tensor that does not fit."""
        vae = Path(folder) / f"{name}_vae"
        at = _tokenizer_folder(folder, name)
        tokenizer = Tokenizer.load(at) if at.exists() else None
        modality = cls(_read_config(vae / CONFIG), tokenizer)
        load_weights(modality.network, vae)
        return modality


#: best location of the logit-normal by the width of a text latent (paper 4.2, Obs. 1)
LOCATIONS = {16: 1.0, 64: 1.7, 128: 2.3}


def location_by_width(channels: int) -> float:
    """The location for latents of `channels`: linear in log2 between the measured widths, and that
    of the nearest one outside them."""
    (first, low), *others = LOCATIONS.items()
    if channels <= first:
        return low
    for second, high in others:
        if channels <= second:
            share = math.log2(channels / first) / math.log2(second / first)
            return low + share * (high - low)
        first, low = second, high
    return low


def _check(item: object) -> None:
    """ValueError unless `item` is a string of whole characters (JSON can hold half an emoji)."""
    if not isinstance(item, str):
        raise ValueError(f"a text must be a str, but a {type(item).__name__} was found")
    try:
        item.encode("utf-8")
    except UnicodeEncodeError as error:
        found = ascii(item[error.start])
        raise ValueError(f"a text cannot hold half a character, found {found}") from None


def _read_config(path: Path) -> TextConfig:
    if not path.is_file():
        raise ValueError(f"{path} is missing: the folder holds no saved text modality")
    try:
        fields = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    kind = fields.pop("type", None)
    if kind != "text":
        raise ValueError(f"{path} has type {kind!r}, but a text modality's is 'text'")
    return validated(TextConfig, fields, origin=str(path))


def _tokenizer_folder(folder: Path | str, name: str) -> Path:
    return Path(folder) / ("tokenizer" if name == "text" else f"{name}_tokenizer")
