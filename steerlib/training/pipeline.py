"""`train`: from a recipe to a bank. Each kind of recipe has a way of its own, whose stages keep their results in a folder."""

import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..bank.concept_bank import ConceptBank
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
    folder = None if work is None else Path(work) / recipe.digest[:16]  # so that results of another recipe are never mixed in
    return WAYS[type(recipe)](target, tokenizer, recipe, folder)


def best_device() -> torch.device:
    """An accelerator where there is one."""
    return (torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None) or torch.device("cpu")


# -- a way for each kind of recipe -----------------------------------------------------------------------------


def _directions(target: Any, tokenizer: Any, recipe: DirectionRecipe, folder: Path | None) -> ConceptBank:
    from .package.directions import check_methods, train_directions

    check_methods(recipe)
    return train_directions(*_language_model(target, tokenizer, recipe), recipe, folder)


def _text_encoders(target: Any, tokenizer: Any, recipe: TextEncoderRecipe, folder: Path | None) -> ConceptBank:
    from .package.latents import train_latents

    model, tokenizer = _language_model(target, tokenizer, recipe)
    return _in_folder(folder, lambda place: train_latents(model, tokenizer, recipe, place))


def _pipeline_encoders(target: Any, tokenizer: Any, recipe: PipelineEncoderRecipe, folder: Path | None) -> ConceptBank:  # noqa: ARG001
    from .package.pictures import train_pictures

    pipe = load(recipe.source)[0].to(best_device()) if target is None else target
    return _in_folder(folder, lambda place: train_pictures(pipe, recipe, place))


WAYS: dict[type[Recipe], Callable[[Any, Any, Any, Path | None], ConceptBank]] = {
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


def _in_folder(folder: Path | None, make: Callable[[Path], ConceptBank]) -> ConceptBank:
    """Make a bank in a folder, or in a temporary one."""
    if folder is not None:
        return make(folder)
    with TemporaryDirectory() as place:
        return make(Path(place))
