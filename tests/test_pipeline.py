"""What a user calls: lists in, lists out, each result a function of its own seed, and folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from unified.modalities.text import decoding
from unified.modalities.text.decoding import choose
from unified.pipeline import UnifiedPipeline

PROMPTS = ["a big", "a small green square", "red"]
IMAGES = [tiny.square(caption) for caption in tiny.CAPTIONS[:3]]


def random_pipeline() -> UnifiedPipeline:
    """Untrained, but every weight of the prior has its say."""
    pipeline = tiny.pipeline()
    tiny.randomise(pipeline.prior)
    return pipeline


@pytest.fixture(scope="module")
def pipeline() -> UnifiedPipeline:
    return random_pipeline()


@pytest.fixture(scope="module")
def saved(pipeline: UnifiedPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> UnifiedPipeline:
    """Its texts are shown as ids, and none of them ends of its own accord."""
    pipeline = random_pipeline()
    text = pipeline.modalities["text"]
    monkeypatch.setattr(text, "has_ended", lambda observation: False)
    monkeypatch.setattr(text, "realise", lambda observation: observation)
    return pipeline


#: method -> its first argument
CALLS: dict[str, list[Any]] = {
    "continue_text": PROMPTS,
    "caption": IMAGES,
    "text_to_image": PROMPTS,
}


def call(pipeline: UnifiedPipeline, method: str, given: Any = None, **settings: Any) -> list[Any]:
    run: Callable[..., list[Any]] = getattr(pipeline, method)
    return run(CALLS[method] if given is None else given, **settings)


def numbers(item: Any) -> Tensor:
    """Pixels or characters."""
    if isinstance(item, Image.Image):
        return pil_to_tensor(item).int()
    return torch.tensor([ord(c) for c in item])


def same(one: list[Any], two: list[Any]) -> bool:
    return all(numbers(a).equal(numbers(b)) for a, b in zip(one, two, strict=True))


# ---- lists in, lists out -------------------------------------------------------------------------


@pytest.mark.parametrize("method", CALLS)
def test_a_list_gives_a_list_of_as_many(pipeline: UnifiedPipeline, method: str) -> None:
    results = call(pipeline, method, seed=0)
    kind = Image.Image if method == "text_to_image" else str
    assert [isinstance(r, kind) for r in results] == [True] * 3
    assert call(pipeline, method, []) == []


@pytest.mark.parametrize("size", [None, 8, (8, 16)])
def test_images_have_the_size_that_was_asked_for(pipeline: UnifiedPipeline, size: Any) -> None:
    (image,) = pipeline.text_to_image(["red"], size=size, seed=0)
    height, width = {None: (16, 16), 8: (8, 8)}.get(size, size)
    assert image.size == (width, height)


def test_a_caption_depends_on_the_prompt_and_the_default_is_that_of_training() -> None:
    pipeline = random_pipeline()
    plain = pipeline.caption(IMAGES[:1], seed=1)
    instruction = pipeline.tasks["captioning"].config.instruction
    assert plain == pipeline.caption(IMAGES[:1], prompts=[instruction], seed=1)
    assert plain != pipeline.caption(IMAGES[:1], prompts=["red"], seed=1)


@pytest.mark.parametrize(
    ("method", "given", "says"),
    [
        ("continue_text", "a big", "prompts must be a list of texts, found one text"),
        ("text_to_image", "a big", "prompts must be a list of texts, found one text"),
        ("continue_text", ["a", ""], "a prompt is empty"),
        ("text_to_image", [""], "a prompt is empty"),
        ("caption", IMAGES[0], "images must be a list, found one Image"),
        ("caption", ["a.png"], "an image must be a PIL.Image, but a str was found"),
        ("continue_text", [3], "a text must be a str, but a int was found"),
    ],
)
def test_what_is_no_list_of_items_is_explained(
    pipeline: UnifiedPipeline, method: str, given: Any, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        call(pipeline, method, given)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"seed": 1, "generator": torch.Generator()}, "a seed or a generator, not both"),
        ({"seed": [1, 2]}, "3 outputs need 3 seeds, found 2"),
        ({"num_steps": 0}, "num_steps is 0 but should be greater than 0"),
        ({"solver": "rk4"}, "solver is 'rk4' but should be 'euler', 'heun' or 'ab2'"),
        ({"max_new_tokens": 0}, "at least 1 token, 0 were asked for"),
    ],
)
def test_settings_that_do_not_fit_are_explained(
    pipeline: UnifiedPipeline, settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        pipeline.continue_text(PROMPTS, **settings)


def test_what_a_model_does_not_have_is_named(pipeline: UnifiedPipeline) -> None:
    with pytest.raises(ValueError, match=r"no task 'translation'; it has continuation, captioning"):
        pipeline.generate("translation", [{}])
    with pytest.raises(ValueError, match="captioning needs I, P to generate C; given: nothing"):
        pipeline.generate("captioning", [{}])
    only = tiny.config(tasks={"continuation": tiny.TASKS["continuation"]})
    with pytest.raises(ValueError, match="no task 'text_to_image'; it has continuation"):
        tiny.pipeline(only).text_to_image(["red"])
    with pytest.raises(ValueError, match="no task 'captioning'; it has continuation"):
        tiny.pipeline(only).caption(IMAGES)
    with pytest.raises(ValueError, match="2 prompts for 3 images"):
        pipeline.caption(IMAGES, prompts=["what", "why"])


# ---- seeds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", CALLS)
def test_a_result_depends_on_its_seed_and_not_on_its_batch(
    pipeline: UnifiedPipeline, method: str
) -> None:
    given, order = CALLS[method], [2, 0, 1]
    together = call(pipeline, method, seed=[5, 6, 7])
    turned = call(pipeline, method, [given[i] for i in order], seed=[5 + i for i in order])
    for i, result in zip(order, turned, strict=True):
        alone = call(pipeline, method, [given[i]], seed=[5 + i])
        for other in (result, alone[0]):
            torch.testing.assert_close(numbers(together[i]), numbers(other), rtol=0, atol=1)
    assert not same(together, call(pipeline, method, seed=[8, 9, 10]))


@pytest.mark.parametrize("method", CALLS)
def test_seed_and_generator_repeat_and_neither_differs(
    pipeline: UnifiedPipeline, method: str
) -> None:
    def drawn() -> list[Any]:
        return call(pipeline, method, generator=torch.Generator().manual_seed(3))

    assert same(drawn(), drawn())
    assert same(call(pipeline, method, seed=4), call(pipeline, method, seed=4))
    assert not same(call(pipeline, method, seed=4), drawn())
    assert not same(call(pipeline, method), call(pipeline, method))
    one, two = call(pipeline, method, [CALLS[method][0]] * 2, seed=4)
    assert not same([one], [two])


def test_settings_reach_the_sampler_and_default_to_the_configuration(
    pipeline: UnifiedPipeline,
) -> None:
    plain = pipeline.text_to_image(["red"], seed=0)
    defaults = {"num_steps": 4, "guidance_scale": 1.5, "solver": "euler"}
    assert same(plain, pipeline.text_to_image(["red"], seed=0, **defaults))
    for change in ({"num_steps": 3}, {"guidance_scale": 4.0}, {"solver": "heun"}):
        assert not same(plain, pipeline.text_to_image(["red"], seed=0, **(defaults | change)))


# ---- texts of a length, block by block -----------------------------------------------------------


@pytest.mark.parametrize("count", [1, 4, 5, 8, 11])
@pytest.mark.parametrize("method", ["continue_text", "caption"])
def test_max_new_tokens_is_exact(endless: UnifiedPipeline, method: str, count: int) -> None:
    """Whatever the prompt's length leaves of a block of 4."""
    assert [len(ids) for ids in call(endless, method, max_new_tokens=count)] == [count] * 3


def test_the_default_length_is_the_configurations(endless: UnifiedPipeline) -> None:
    assert [len(ids) for ids in endless.continue_text(PROMPTS)] == [8] * 3


def test_generate_takes_max_new_tokens_as_the_size_of_a_text(endless: UnifiedPipeline) -> None:
    made = endless.generate("continuation", [{"C": "a big"}], max_new_tokens=3, seed=0)
    assert [len(ids) for ids in made] == [3]
    with pytest.raises(ValueError, match="the size of a text that has no other size"):
        endless.generate("continuation", [{"C": "a big"}], 4, max_new_tokens=3)
    with pytest.raises(ValueError, match="the size of a text that has no other size"):
        endless.generate("text_to_image", [{"C": "a big"}], max_new_tokens=3)
    with pytest.raises(ValueError, match="one number of pixels or"):
        endless.generate("text_to_image", [{"C": "a big"}], "abc")


def test_a_text_that_ends_is_cut_there(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = random_pipeline()
    text = pipeline.modalities["text"]
    end = text.tokenizer.eos_id

    def ending(logits: Tensor, *rest: Any) -> Tensor:
        ids = choose(logits, *rest)
        return ids.index_fill(0, torch.arange(2, min(3, len(ids))), end)

    monkeypatch.setattr(decoding, "choose", ending)
    steps = list(pipeline.stream("captioning", [{"I": IMAGES[0], "P": "what"}], 12, seed=1))
    assert len(steps) == 1
    monkeypatch.setattr(decoding, "choose", choose)
    uncut = next(pipeline.stream("captioning", [{"I": IMAGES[0], "P": "what"}], 12, seed=1))
    assert uncut[0].startswith(steps[0][0])
    assert len(steps[0][0]) < len(uncut[0])


def test_streaming_grows_to_the_result(endless: UnifiedPipeline) -> None:
    given = [{"C": prompt} for prompt in PROMPTS]
    steps = list(endless.stream("continuation", given, 10, seed=1))
    whole = endless.continue_text(PROMPTS, max_new_tokens=10, seed=1)
    assert len(steps) > 2
    for i, final in enumerate(whole):
        growing = [step[i] for step in steps if i in step]
        assert [len(ids) for ids in growing] == sorted({len(ids) for ids in growing})
        for ids in growing:
            assert ids.equal(final[: len(ids)])
        assert growing[-1].equal(final)


# ---- folders -------------------------------------------------------------------------------------


def test_a_folder_holds_all_that_it_names(saved: Path) -> None:
    files = {str(p.relative_to(saved)) for p in saved.rglob("*") if p.is_file()}
    assert files == {
        "model_index.json",
        "text_vae/config.json",
        "text_vae/model.safetensors",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "image_vae/config.json",
        "image_vae/diffusion_pytorch_model.safetensors",
        "image_vae/modality.json",
        "prior/config.json",
        "prior/model.safetensors",
    }
    index = json.loads((saved / "model_index.json").read_text())
    assert index["_class_name"] == "UnifiedPipeline"
    assert index["weights"] == "raw"
    assert list(index["tasks"]) == list(tiny.TASKS)


@pytest.mark.parametrize("method", CALLS)
def test_a_model_read_back_generates_the_same_to_the_bit(
    pipeline: UnifiedPipeline, saved: Path, tmp_path: Path, method: str
) -> None:
    read = UnifiedPipeline.from_pretrained(saved)
    assert same(call(pipeline, method, seed=2), call(read, method, seed=2))
    read.save_pretrained(tmp_path / "again")
    again = UnifiedPipeline.from_pretrained(tmp_path / "again")
    assert same(call(pipeline, method, seed=2), call(again, method, seed=2))


def test_a_checkpoint_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"missing is neither a pipeline folder .* nor a hub id"):
        UnifiedPipeline.from_pretrained(tmp_path / "missing")


def test_transformers_reads_the_tokenizer_of_a_folder(saved: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(saved / "tokenizer")
    ours = UnifiedPipeline.from_pretrained(saved).modalities["text"].tokenizer
    for caption in tiny.CAPTIONS:
        assert theirs(caption)["input_ids"] == ours.encode(caption)
    assert (theirs.eos_token_id, theirs.pad_token_id) == (ours.eos_id, ours.pad_id)


def test_a_pipeline_says_what_it_is() -> None:
    told = repr(tiny.pipeline())
    assert "captioning: prompt, image -> answer (text)" in told
    assert "text_vae" in told
    assert "parameters" in told
