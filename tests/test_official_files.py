"""Official checkpoints as files: there and back by command, and what is wrong with one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from unified import cli
from unified.cola.official import from_official, to_official
from unified.latents.modality import decode, encode, modes
from unified.pipeline import UnifiedPipeline

VAE, DIT, MODEL = "cola_vae", "cola_dit", "model.safetensors"


def text_only(**text: Any) -> UnifiedPipeline:
    settings = tiny.config(
        modalities={"text": {**tiny.TEXT, **text}},
        tasks={"continuation": tiny.TASKS["continuation"]},
    )
    return tiny.pipeline(settings)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    to_official(text_only(), tmp_path / "official")
    return tmp_path / "official"


def command(capsys: Any, *arguments: str | Path, code: int = 0) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main(["convert", *map(str, arguments)])
    told = capsys.readouterr()
    assert end.value.code == code, told.err
    return str(told.err if code else told.out)


def test_there_and_back_from_the_command_line(folder: Path, tmp_path: Path, capsys: Any) -> None:
    ours, back = tmp_path / "ours", tmp_path / "back"
    assert command(capsys, "official", folder, ours) == f"{ours}\n"
    assert command(capsys, "to-official", ours, back, "--max-shard-size", "20KB") == f"{back}\n"
    again = tmp_path / "again"
    command(capsys, "official", back, again)  # from shards
    for part in ("prior", "text_vae"):
        one, two = (load_file(f / part / MODEL) for f in (ours, again))
        assert one.keys() == two.keys()
        assert all(one[n].equal(two[n]) for n in one)
    said = {
        str(UnifiedPipeline.from_pretrained(f).continue_text(["a big"], seed=0))
        for f in (ours, again)
    }
    assert len(said) == 1
    assert json.loads((back / DIT / "config.json").read_text())["model_type"] == "cola_dit"


def test_rotary_frequencies_are_made_again(folder: Path) -> None:
    stored = load_file(folder / DIT / MODEL)
    name = "blocks.0.msa.rope.rope.freqs"
    torch.testing.assert_close(stored[name], 10_000.0 ** (-torch.arange(0, 6, 2) / 6))
    del stored[name]
    save_file(stored, folder / DIT / MODEL)
    from_official(folder)  # they are not needed to read a model


def tensors(part: str, change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        found = load_file(folder / part / MODEL)
        change(found)
        save_file(found, folder / part / MODEL)

    return apply


def settings(part: str, **changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / part / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return apply


def cut(folder: Path) -> None:
    data = (folder / VAE / MODEL).read_bytes()
    (folder / VAE / MODEL).write_bytes(data[: len(data) // 2])


def garbage(folder: Path) -> None:
    (folder / DIT / MODEL).write_bytes(b"\xff" * 64)


def large_vocabulary(folder: Path) -> None:
    settings(VAE, vocab_size=100)(folder)
    rows = {"encoder.wte.weight": 101, "decoder.final_layer.weight": 100}
    rows |= {"decoder.final_layer.bias": 100}
    tensors(VAE, lambda t: t.update({n: t[n][:k].clone() for n, k in rows.items()}))(folder)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (cut, "cola_vae/model.safetensors is not a whole safetensors file"),
        (garbage, "cola_dit/model.safetensors is not a whole safetensors file"),
        (tensors(VAE, lambda t: t.pop("encoder.wte.weight")), "lacks tensor encoder.wte.weight"),
        (
            tensors(DIT, lambda t: t.update(new=t["txt_in.proj.bias"] * 1)),
            "has tensor new",
        ),
        (
            tensors(DIT, lambda t: t.update({"txt_in.proj.bias": torch.zeros(3)})),
            r"has shape \[3\], but the model needs \[16\]",
        ),
        (settings(VAE, dim=32), r"has shape \[.*16.*\], but the model needs \[.*32.*\]"),
        (settings(VAE, shared_heads_kv=4), "shared_heads_kv is 4, but only 1 is supported"),
        (settings(VAE, colour="red"), "config.json: unknown key colour"),
        (settings(DIT, patch_size=2), "patch_size is 2, but only 1 is supported"),
        (settings(DIT, emb_dim=8), "emb_dim is 8, but must equal txt_dim, 16"),
        (settings(DIT, txt_in_channels=8), "must equal the VAE's latent_dim, 4"),
        (settings(DIT, heads="two"), "prior.heads is 'two' but should be a valid integer"),
        (large_vocabulary, "the tokenizer has 280 tokens, but vocab_size is 100"),
        (lambda f: (f / DIT / "config.json").write_text("{"), "cola_dit/config.json is not JSON"),
        (lambda f: (f / DIT / "config.json").unlink(), "there is no file .*cola_dit/config.json"),
    ],
)
def test_what_is_wrong_with_a_checkpoint_is_named(
    folder: Path, damage: Callable[[Path], None], says: str
) -> None:
    damage(folder)
    with pytest.raises(ValueError, match=says):
        from_official(folder)


@pytest.mark.parametrize("index", ["{}", "[]", "{", '{"weight_map": [1]}', '{"weight_map": 3}',
                                   '{"weight_map": {"a": "../b"}}'])  # fmt: skip
def test_a_broken_index_of_shards_is_named(folder: Path, index: str) -> None:
    (folder / DIT / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json is no index of shards"):
        from_official(folder)


def test_an_official_model_pads_as_it_was_trained(tmp_path: Path) -> None:
    to_official(text_only(patch_size=2), tmp_path / "official")
    settings(DIT, auto_map={"AutoModel": "x.Y"})(tmp_path / "official")  # hub models carry it
    assert from_official(tmp_path / "official").modalities["text"].boundary == "right"


def test_without_a_tokenizer_a_model_works_on_ids(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    text: Any = from_official(folder).modalities["text"]
    ids = [torch.tensor([5, 9, 2]), torch.tensor([7])]
    one, two = encode(text, ids)
    torch.testing.assert_close(two.mean_NC, encode(text, ids[1:])[0].mean_NC)
    assert [len(o) for o in decode(text, modes([one, two]))] == [3, 1]
    with pytest.raises(ValueError, match="has no tokenizer, and works on ids only"):
        text.observe("a")


def test_what_is_no_checkpoint_or_cannot_become_one(tmp_path: Path, capsys: Any) -> None:
    says = command(capsys, "official", tmp_path, tmp_path / "out", code=2)
    assert "is no official checkpoint: it should hold cola_dit/ and cola_vae/" in says
    says = command(capsys, "official", "nobody/nothing", tmp_path / "out", code=2)
    assert "no hub id that was downloaded before" in says
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="holds one modality named text and the task continuation"):
        to_official(tiny.pipeline(), tmp_path / "out")
    to_official(text_only(), tmp_path / "full")
    with pytest.raises(ValueError, match="is not empty; give a new folder"):
        to_official(text_only(), tmp_path / "full")


@pytest.mark.parametrize("prompt", ["<|endoftext|>", " <|pad|> <|endoftext|> "])
def test_a_prompt_of_only_special_tokens_is_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match="spells special tokens and no more"):
        text_only().continue_text([prompt])
