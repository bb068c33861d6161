"""`train`: from a recipe to a bank. Each kind of recipe has a way of its own, whose stages keep their results in a folder."""

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..bank import sentences
from ..bank.concept_bank import ConceptBank
from ..bank.search import LABELS, stored, text_of
from ..devices import best_device
from ..errors import BadBank, BadRecipe
from ..hosts import host_for, load
from .carry import RECIPE, carried, pipeline_of
from .recipe import (
    ContextRecipe,
    CorpusRecipe,
    DirectionRecipe,
    PictureRecipe,
    PipelineEncoderRecipe,
    Recipe,
    TextEncoderRecipe,
)

Score = Callable[[Any, str], Any]
"""Of pictures, bytes `[B, H, W, 3]`, and the name of a concept: `[B]` numbers, how much each shows it."""
FEW = 100
"""Labels up to this number are read when they are searched; of more, what they mean is stored."""


def train(
    target: Any,
    recipe: Recipe,
    *,
    tokenizer: Any = None,
    work: str | os.PathLike[str] | None = None,
    score: Score | None = None,
    methods: Mapping[str, Any] | None = None,
    contexts: Mapping[str, Callable[[str], str]] | None = None,
) -> ConceptBank:
    """Make a bank for a model: record, fit, label or choose by measured effect, calibrate, evaluate.

    Args:
        target: A language model of transformers; a pipeline of diffusers for a `PictureRecipe` or a `PipelineEncoderRecipe`;
            either for a `ContextRecipe`; or None to load `recipe.source`.
        recipe: What to make; `Recipe.from_file` reads one.
        tokenizer: Of the language model. Default: that of `recipe.source`.
        work: A folder that keeps what each stage made, apart for every recipe. With the same recipe a second run goes on from
            there. Default: nothing is kept.
        score: Of a `PictureRecipe`: how much each of some pictures, bytes `[B, H, W, 3]`, shows the concept of a name, on any
            scale, such as `sl.ClipScore`. Default: the recipe's CLIP model, or else the pipeline itself, by how well prompts
            explain them. A run goes on where one of a scorer of the same name stopped.
        methods: Of a `DirectionRecipe`: methods of your own that it names, as functions like those of `sl.directions`.
        contexts: Of a `ContextRecipe`: further concepts, each a function that makes a prompt with it of an observed one.

    Returns:
        The bank, with its card; `save_pretrained` writes it.

    Raises:
        BadRecipe: The recipe cannot work; before any model is loaded where that can be known.
        MissingExtra: A package of the extra `steerlib[train]` is not installed.

    Example:
        >>> recipe = sl.Recipe.from_file("recipe.toml")                          # doctest: +SKIP
        >>> bank = sl.train(None, recipe, work="out/work")                       # doctest: +SKIP
    """
    recipe = _told(recipe, score, contexts)
    with _beside(recipe, methods or {}, work), TemporaryDirectory() if work is None else nullcontext(work) as place:
        check(recipe)
        return _made(target, tokenizer, recipe, Path(place), score)


def _told(recipe: Recipe, score: Score | None, contexts: Mapping[str, Callable[[str], str]] | None) -> Recipe:
    """The recipe with what functions make; raises `BadRecipe` where it has no use for what is given."""
    if score is not None and not isinstance(recipe, PictureRecipe):
        raise BadRecipe(f"score= is of pictures, and recipe {recipe.name!r} makes no concepts of them")
    if not contexts:
        return recipe
    if not isinstance(recipe, ContextRecipe):
        raise BadRecipe(f"contexts= is for a recipe of contexts, and {recipe.name!r} is none")
    return recipe.with_contexts(contexts)


def _beside(recipe: Recipe, methods: Mapping[str, Any], work: object) -> AbstractContextManager[None]:
    """Inside the block these methods are there too; raises `BadRecipe` where they could not be used or kept apart."""
    if not methods:
        return nullcontext()
    if not isinstance(recipe, DirectionRecipe) or work is not None:
        raise BadRecipe(
            "methods= is for a recipe of directions, and without work=: nothing tells a function from its next version"
        )
    from .directions.methods import beside

    return beside(methods)


def key_of(recipe: Recipe, precision: str = "") -> str:
    """The folder in `work` of what a recipe's stages make, apart from that of other recipes and of models in another precision.
    What only the card shows does not count: with another licence or description a run finds everything made."""
    if isinstance(recipe, CorpusRecipe):
        graph = getattr(recipe, "graph", None)
        told = sha256(f"{recipe.recorded_key} {recipe.fitted_key(recipe.encoders)} {graph!r}".encode())
        for name in getattr(graph, "environments", ()):
            told.update(recipe.bytes_of(name) or b"")
        key = told.hexdigest()[:16]
    else:
        key = replace(recipe, description="", license="", name="", base="").digest[:16]
    return f"{key}-{precision}" if precision else key


def precision_of(target: Any) -> str:
    """The types of a model's weights other than float32, such as `bfloat16`; nothing where there are none."""
    kinds = {str(weight.dtype).removeprefix("torch.") for weight in host_for(target).model.parameters()}
    return "-".join(sorted(kinds - {"float32"}))


def work_of(recipe: Recipe, work: Path, target: Any) -> list[Path]:
    """The folders in `work` that a recipe's stages fill."""
    recorded = [work / recipe.recorded_key] if isinstance(recipe, CorpusRecipe) else []
    return [work / key_of(recipe, precision_of(target)), *recorded]


def check_writable(folder: Path) -> None:
    """Raise `BadBank` for a folder that a bank could not be written to, before it is trained."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / "bank.json").is_file()):
        raise BadBank(f"{str(folder)!r} holds other things than a bank; give a new or empty folder by --out")


def check(recipe: Recipe) -> None:
    """Raise `BadRecipe` for what cannot work, as far as that can be known before a model is loaded."""
    recipe.check()
    pipeline_of(recipe)
    if isinstance(recipe, DirectionRecipe):
        from .package.directions import check_methods

        check_methods(recipe)
    if isinstance(recipe, PictureRecipe):
        from .package.prompted import check_methods as check_picture_methods

        check_picture_methods(recipe)


def _made(target: Any, tokenizer: Any, recipe: Recipe, work: Path, score: Any) -> ConceptBank:
    """The bank, with what it needs to be used and measured again: its recipe, whether its model is asked in a chat, and what
    its labels mean."""
    draws = target is not None and not isinstance(target, torch.nn.Module)
    if isinstance(recipe, (PictureRecipe, PipelineEncoderRecipe)) or (isinstance(recipe, ContextRecipe) and draws):
        target = load(recipe.weights)[0].to(best_device()) if target is None else target
    elif target is None or tokenizer is None:
        loaded, tokenizer = load(recipe.weights)
        target = loaded.to(best_device()) if target is None else target
    more = {} if score is None else {"score": score}
    precision = precision_of(target)
    bank = WAYS[type(recipe)](target, tokenizer, recipe, work / key_of(recipe, precision), **more)
    bank.provenance |= {"precision": precision} if precision else {}
    if tokenizer is not None:
        bank.provenance["chat"] = getattr(tokenizer, "chat_template", None) is not None
    bank.files = {**bank.files, **pipeline_of(recipe), RECIPE: carried(recipe)}
    if len({text_of(concept) for concept in bank.concepts.values()}) > FEW and sentences.is_installed():
        bank.files = {**bank.files, LABELS: stored(bank.concepts.values())}
    return bank


def _directions(target: Any, tokenizer: Any, recipe: DirectionRecipe, folder: Path) -> ConceptBank:
    from .package.directions import train_directions

    return train_directions(target, tokenizer, recipe, folder)


def _text_encoders(target: Any, tokenizer: Any, recipe: TextEncoderRecipe, folder: Path) -> ConceptBank:
    from .package.latents import train_latents

    return train_latents(target, tokenizer, recipe, folder)


def _pipeline_encoders(target: Any, tokenizer: Any, recipe: PipelineEncoderRecipe, folder: Path) -> ConceptBank:  # noqa: ARG001
    from .package.pictures import train_pictures

    return train_pictures(target, recipe, folder)


def _pictures(target: Any, tokenizer: Any, recipe: PictureRecipe, folder: Path, score: Any = None) -> ConceptBank:  # noqa: ARG001
    from .package.prompted import train_prompted

    return train_prompted(target, recipe, folder, score)


def _contexts(target: Any, tokenizer: Any, recipe: ContextRecipe, folder: Path) -> ConceptBank:
    from .package.contexts import train_context

    return train_context(target, tokenizer, recipe, folder)


WAYS: dict[type[Recipe], Callable[..., ConceptBank]] = {
    DirectionRecipe: _directions,
    PictureRecipe: _pictures,
    TextEncoderRecipe: _text_encoders,
    PipelineEncoderRecipe: _pipeline_encoders,
    ContextRecipe: _contexts,
}
