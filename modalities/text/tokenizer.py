"""The tokenizer: byte-level BPE, trained on the project's own text or read from a file.

Every string is representable (256 bytes are in the alphabet) and comes back unchanged. Two special
tokens exist: *eos* closes a text, *pad* fills the last block. Their names are the ones of the
official checkpoints, unless a ``tokenizer_config.json`` beside the file says otherwise. They are
never produced from text: a text that spells ``<|endoftext|>`` is tokenised as those 13 characters.
The folder that `save` writes is read by transformers' ``AutoTokenizer.from_pretrained`` too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

PAD, EOS = "<|pad|>", "<|endoftext|>"
FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"


class Tokenizer:
    """Text to ids and back. `pad` and `eos` are token strings that the vocabulary must hold."""

    def __init__(self, core: tokenizers.Tokenizer, pad: str = PAD, eos: str = EOS):
        self.core, self.pad, self.eos = core, pad, eos
        self.pad_id, self.eos_id = self._special("pad", pad), self._special("eos", eos)
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
        """Read a ``tokenizer.json``, or the folder that holds one."""
        path = Path(path)
        file = path / FILE if path.is_dir() else path
        if not file.is_file():
            raise ValueError(f"tokenizer {path}: expected a folder with {FILE}, or that file")
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
        return self.core.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, up to the first eos; pads are dropped."""
        ids = list(ids)
        end = ids.index(self.eos_id) if self.eos_id in ids else len(ids)
        return self.core.decode([i for i in ids[:end] if i != self.pad_id])

    def decode_all(self, ids: Sequence[int]) -> str:
        """The text of all `ids`, special tokens spelt out."""
        return self.core.decode(list(ids), skip_special_tokens=False)


def _content(token: str | dict[str, str] | None) -> str | None:
    """A token as ``tokenizer_config.json`` writes it: a string, or an object with its content."""
    return token["content"] if isinstance(token, dict) else token
