"""`train`: from a recipe to a bank. Each kind of recipe has a way of its own, whose stages keep their results in a folder."""

import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..bank.concept_bank import ConceptBank
from ..devices import best_device
from ..hosts import load
from .recipe import DirectionRecipe, PipelineEncoderRecipe, Recipe, TextEncoderRecipe


def train(target: Any, recipe: Recipe, *, tokenizer: Any = None, work: str | os.PathLike[str] | None = None) -> ConceptBank:
    """Make a bank for a model: record, fit, label or choose by measured effect, calibrate, evaluate.

    Args:
        target: A language model of transformers; a pipeline of diffusers for a `PipelineEncoderRecipe`; or None to load
            `recipe.source`.
        recipe: What to make; `Recipe.from_file` reads one.
        tokenizer: Of the language model. Default: that of `recipe.source`.
        work: A folder that keeps what each stage made, apart for every recipe. With the same recipe a second run goes on from
            there. Default: nothing is kept.

    Returns:
        The bank, with its card; `save_pretrained` writes it.

    Raises:
        BadRecipe: The recipe cannot work; before any model is loaded where that can be known.
        MissingExtra: A package of the extra `steerlib[train]` is not installed.

    Example:
        >>> recipe = sl.Recipe.from_file("recipe.toml")                          # doctest: +SKIP
        >>> bank = sl.train(None, recipe, work="out/work")                       # doctest: +SKIP
        >>> bank.save_pretrained("out/bank")                                     # doctest: +SKIP
    """
    recipe.check()
    if work is not None:
        return WAYS[type(recipe)](target, tokenizer, recipe, Path(work) / recipe.digest[:16])  # apart from other recipes
    with TemporaryDirectory() as place:
        return WAYS[type(recipe)](target, tokenizer, recipe, Path(place))


def _directions(target: Any, tokenizer: Any, recipe: DirectionRecipe, folder: Path) -> ConceptBank:
    from .package.directions import check_methods, train_directions

    check_methods(recipe)
    return train_directions(*_language_model(target, tokenizer, recipe), recipe, folder)


def _text_encoders(target: Any, tokenizer: Any, recipe: TextEncoderRecipe, folder: Path) -> ConceptBank:
    from .package.latents import train_latents

    return train_latents(*_language_model(target, tokenizer, recipe), recipe, folder)


def _pipeline_encoders(target: Any, tokenizer: Any, recipe: PipelineEncoderRecipe, folder: Path) -> ConceptBank:  # noqa: ARG001
    from .package.pictures import train_pictures

    pipe = load(recipe.source)[0].to(best_device()) if target is None else target
    return train_pictures(pipe, recipe, folder)


WAYS: dict[type[Recipe], Callable[[Any, Any, Any, Path], ConceptBank]] = {
    DirectionRecipe: _directions,
    TextEncoderRecipe: _text_encoders,
    PipelineEncoderRecipe: _pipeline_encoders,
}


def _language_model(target: Any, tokenizer: Any, recipe: Recipe) -> tuple[Any, Any]:
    """The target and its tokenizer; what is missing is loaded from the recipe's source."""
    if target is None or tokenizer is None:
        loaded, tokenizer = load(recipe.source)
        target = loaded.to(best_device()) if target is None else target
    return target, tokenizer
