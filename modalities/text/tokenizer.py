"""The tokenizer: byte-level BPE, trained on the project's own text or read from a file.

Every string is representable (256 bytes are in the alphabet) and comes back unchanged. Two special
tokens exist: *eos* closes a text, *pad* fills the last block. Their names are the ones of the
official checkpoints, unless a ``tokenizer_config.json`` beside the file says otherwise. They are
never produced from text: a text that spells ``<|endoftext|>`` is tokenised as those 13 characters.
The folder that `save` writes is read by transformers' ``AutoTokenizer.from_pretrained`` too.

The official model's vocabulary is OLMo 2's: the 100,256 ranks of cl100k, and 22 special tokens. It
is read from OLMo 2's own ``tokenizer.json``, or made from tiktoken's rank file of cl100k.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable, Sequence
from itertools import takewhile
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

PAD, EOS = "<|pad|>", "<|endoftext|>"
#: where a vocabulary has it, it ends a text too (the turns of OLMo 2's chat format)
IM_END = "<|im_end|>"
FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
#: how many texts are remembered with their ids, and how many characters they have at most
REMEMBERED, SHORT = 1 << 15, 2048

#: ranks of cl100k, and the special tokens that OLMo 2 puts after them, in the order of their ids
CL100K = 100_256
OLMO2_SPECIAL = (
    "<|extra_id_0|>", EOS, "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>",
    "|||PHONE_NUMBER|||", "|||EMAIL_ADDRESS|||", "|||IP_ADDRESS|||", "<|im_start|>", IM_END,
    *(f"<|extra_id_{i}|>" for i in range(1, 11)), "<|endofprompt|>", PAD,
)  # fmt: skip


class Tokenizer:
    """Text to ids and back. `pad` and `eos` are token strings that the vocabulary must hold."""

    def __init__(self, core: tokenizers.Tokenizer, pad: str = PAD, eos: str = EOS):
        self.core, self.pad, self.eos = core, pad, eos
        self._known: dict[str, list[int]] = {}
        self.pad_id, self.eos_id = self._special("pad", pad), self._special("eos", eos)
        self.end_ids = {self.eos_id, core.token_to_id(IM_END)} - {None}
        core.encode_special_tokens = True

    def _special(self, role: str, token: str) -> int:
        found = self.core.token_to_id(token)
        if found is None:
            raise ValueError(
                f"the tokenizer has no {role} token {token!r}; name its own as {role}_token in"
                f" a {CONFIG_FILE} beside {FILE}"
            )
        return int(found)

    @classmethod
    def train(cls, corpus: Iterable[str], vocab_size: int) -> Tokenizer:
        """BPE with at most `vocab_size` tokens: two special ones, 256 bytes, and merges."""
        smallest = len(pre_tokenizers.ByteLevel.alphabet()) + 2
        if vocab_size < smallest:
            raise ValueError(
                f"vocab_size {vocab_size} is too small: {smallest} tokens are needed to represent"
                " every byte, pad and eos"
            )
        core = tokenizers.Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[PAD, EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        core.train_from_iterator(corpus, trainer)
        return cls(core)

    @classmethod
    def load(cls, path: Path | str) -> Tokenizer:
        """Read a ``tokenizer.json``, the folder that holds one, or a tiktoken file of cl100k."""
        path = Path(path)
        file = path / FILE if path.is_dir() else path
        if not file.is_file():
            raise ValueError(f"tokenizer {path}: expected a folder with {FILE}, or that file")
        if not file.read_bytes()[:64].lstrip().startswith(b"{"):
            return cls(from_ranks(read_ranks(file), file))
        options = file.with_name(CONFIG_FILE)
        named = json.loads(options.read_text("utf-8")) if options.is_file() else {}
        try:
            core = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # what the library raises has no type of its own
            raise ValueError(f"{file} is no tokenizer file: {error}") from None
        return cls(
            core,
            _content(named.get("pad_token")) or PAD,
            _content(named.get("eos_token")) or EOS,
        )

    def save(self, folder: Path | str) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json`` into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.core.save(str(folder / FILE))
        options = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": self.pad,
            "eos_token": self.eos,
            "clean_up_tokenization_spaces": False,
        }
        (folder / CONFIG_FILE).write_text(json.dumps(options, indent=2) + "\n", "utf-8")

    def __len__(self) -> int:
        """Ids run from 0 to this, exclusive."""
        return max(self.core.get_vocab().values()) + 1

    def encode(self, text: str) -> list[int]:
        """The ids of `text`. The first texts are remembered: training meets them every epoch."""
        found = self._known.get(text)
        if found is None:
            found = self.core.encode(text, add_special_tokens=False).ids
            if len(self._known) < REMEMBERED and len(text) <= SHORT:
                self._known[text] = found
        return list(found)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, up to the first that ends it; pads are dropped."""
        ids = list(takewhile(lambda i: i not in self.end_ids, ids))
        return self.core.decode([i for i in ids if i != self.pad_id])

    def special_only(self, text: str) -> bool:
        """Whether `text` spells special tokens and says nothing else."""
        left = text
        for token in self.core.get_added_tokens_decoder().values():
            left = left.replace(token.content, "")
        return left != text and not left.strip()

    def decode_all(self, ids: Sequence[int]) -> str:
        """The text of all `ids`, special tokens spelt out."""
        return self.core.decode(list(ids), skip_special_tokens=False)


def _content(token: str | dict[str, str] | None) -> str | None:
    """A token as ``tokenizer_config.json`` writes it: a string, or an object with its content."""
    return token["content"] if isinstance(token, dict) else token


def read_ranks(file: Path) -> dict[bytes, int]:
    """Token -> rank of a tiktoken file: a token in base64 and its rank on every line."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(
                f"{file} is no tokenizer: it is neither a {FILE} nor a tiktoken file, whose line"
                f" {number} would be a token in base64 and its rank"
            ) from None
    return ranks


def from_ranks(ranks: dict[bytes, int], file: Path) -> tokenizers.Tokenizer:
    """The OLMo 2 tokenizer of cl100k's ranks: merges are recovered from the order of the ranks."""
    if sorted(ranks.values()) != list(range(CL100K)):
        raise ValueError(
            f"{file} has {len(ranks):,} ranks, but only cl100k's are known here: 0 to"
            f" {CL100K - 1:,}, each once"
        )
    from transformers.convert_slow_tokenizer import TikTokenConverter

    class Converter(TikTokenConverter):
        """Reads `ranks`, where the library would need the package tiktoken to read a file."""

        @staticmethod
        def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
            del tiktoken_url
            return ranks

    core: tokenizers.Tokenizer = Converter(extra_special_tokens=list(OLMO2_SPECIAL)).converted()
    return core
