"""What a user got wrong, in one sentence: what was asked, what was found, what would be right."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

Keys = tuple[str, ...]
Model = TypeVar("Model", bound=BaseModel)


class StoppedError(Exception):
    """Something was asked to stop, and has saved what it had."""


def one_line(error: BaseException) -> str:
    """The error as one line, for a terminal."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def as_text(data: bytes, place: object) -> str:
    """`data` as text; ValueError says where the bytes that are no UTF-8 stand."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{place} should be text in UTF-8: {error.reason}, byte {error.start}"
        ) from None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown `name`: the nearest known one, or all of them."""
    known = sorted(known)
    near = get_close_matches(name, known, n=1)
    if near:
        return f"did you mean {near[0]}?"
    return f"known: {', '.join(known) or 'none'}"


def validated(
    model: type[Model], tree: Any, at: Keys = (), origin: Callable[[Keys], str] | str = ""
) -> Model:
    """`tree` as a `model`; its first mistake as a ValueError of one sentence.

    `at` is the dotted path of `tree` in the whole configuration; `origin` is the file it comes
    from, or a function from a key's path to the file that wrote the key.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        # A misspelt key is also a missing one: the misspelling is the mistake to show.
        mistakes = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        keys = tuple(str(k) for k in mistakes[0]["loc"])
        place = origin(at + keys) if callable(origin) else origin
        sentence = _sentence(mistakes[0], model, at, keys)
        raise ValueError(f"{place}: {sentence}" if place else sentence) from None


def _sentence(mistake: Any, model: type[BaseModel], at: Keys, keys: Keys) -> str:
    key, kind, text = ".".join(at + keys), mistake["type"], str(mistake["msg"])
    if kind == "extra_forbidden":
        return f"unknown key {key}; {_nearest(keys, model, at)}"
    if kind == "missing":
        return f"{key} is missing"
    if kind == "value_error":
        return str(mistake["ctx"]["error"])
    if text.startswith("Input should"):
        text = text.removeprefix("Input ").partition(" or instance of")[0]
        return f"{key} is {mistake['input']!r} but {text.replace('valid dictionary', 'mapping')}"
    return f"{key}: {text}"


def _nearest(keys: Keys, model: type[BaseModel], at: Keys) -> str:
    """Keys of the same name elsewhere, then similar names at the same place."""
    *parents, name = keys
    known = list(_schema(model))
    siblings = [
        path[-1]
        for path in known
        if len(path) == len(keys)
        and all(p in ("*", k) for p, k in zip(path[:-1], parents, strict=True))
    ]
    near = [".".join(at + path) for path in known if path[-1] == name]
    near += [".".join((*at, *parents, s)) for s in get_close_matches(name, siblings, n=1)]
    if near:
        return f"did you mean {' or '.join(near[:3])}?"
    return f"known here: {', '.join(sorted(siblings)) or 'none'}"


def _schema(kind: Any, at: Keys = ()) -> Iterator[Keys]:
    """All key paths of a model; ``*`` stands for any name of a mapping or index of a list."""
    if get_origin(kind) is None and isinstance(kind, type) and issubclass(kind, BaseModel):
        for name, field in kind.model_fields.items():
            yield (*at, name)
            yield from _schema(field.annotation, (*at, name))
        return
    step = ("*",) if get_origin(kind) in (dict, list) else ()
    for inner in get_args(kind):
        yield from _schema(inner, at + step)
