"""Where the recipe and the model of a bank are, and how a model is loaded with a line that says so."""

import sys
import warnings
from contextlib import suppress
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich.console import Console

import steerlib as sl

from .errors import BadBank, BadRecipe, SteerlibError, UnsupportedTarget

console = Console()


def recipes() -> Path:
    """The folder of the recipes that come with steerlib."""
    return Path(str(files("steerlib.concept_banks"))) / "recipes"


def shipped_recipe(bank: "sl.ConceptBank") -> Path:
    """Where the recipe of a bank would be, if it came with steerlib."""
    return recipes() / str(bank.provenance.get("recipe", bank.name)) / "recipe.toml"


def has_recipe(bank: "sl.ConceptBank") -> bool:
    """Whether a bank carries its recipe, or its recipe comes with steerlib."""
    from .training.carry import RECIPE

    return RECIPE in bank.files or shipped_recipe(bank).is_file()


def recipe_of(bank: "sl.ConceptBank", recipe: Path | None) -> Any:
    """The recipe given, the one that the bank carries, or the shipped one that it was made from."""
    from .training.carry import recipe_in

    if recipe is None and (own := recipe_in(bank)) is not None:
        return own
    if recipe is None and not shipped_recipe(bank).is_file():
        raise BadRecipe(f"bank {bank.name!r} comes without its recipe; name one with --recipe, or see --stored")
    return sl.Recipe.from_file(recipe or shipped_recipe(bank), to_train=False)


def source_of(bank: "sl.ConceptBank") -> str:
    """Where a bank's model is: in its folder, or where its maker, its shipped recipe or else the id of its base model says."""
    if (pipeline := bank.file("pipeline")) is not None:
        return str(pipeline)
    if bank.file("autoencoder") is not None:
        raise BadBank(
            f"bank {bank.name!r} is of an autoencoder, which takes no prompts; its card shows how to steer it in Python"
        )
    if isinstance(source := bank.provenance.get("source"), str):
        return source
    found = recipe_of(bank, None).source if shipped_recipe(bank).is_file() else bank.base.id
    if not found:
        raise BadBank(f"bank {bank.name!r} does not say for which model it is; name one with --model")
    return found


def loaded(source: str, threads: int, dtype: str = "float32") -> Any:
    """A model and its tokenizer, or a pipeline and None, with the loader's progress bars but not its remarks; its weights in
    `float32` or `bfloat16`, or, where this is `auto`, in the one with which the device computes faster."""
    import torch

    from .threads import use_threads

    if dtype == "auto":
        from .devices import best_device
        from .training.record.harvest import is_fast

        dtype = "bfloat16" if is_fast(best_device(), "bf16") else "float32"
    how = {} if dtype == "float32" else {"dtype": getattr(torch, dtype)}

    for library in ("transformers", "diffusers"):
        with suppress(ImportError):
            logging = import_module(f"{library}.utils.logging")
            logging.set_verbosity_error()
            if not sys.stderr.isatty():  # their bars would write escape codes
                logging.disable_progress_bar()
    console.print(f"loading {source} (processor threads: {use_threads(threads)})", style="dim", highlight=False, soft_wrap=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return sl.load(source, **how)
        except SteerlibError:
            raise
        except Exception as error:  # whatever a library says of a folder or an id that it cannot load
            said = str(error).strip().partition("\n")[0] or type(error).__name__
            raise UnsupportedTarget(f"no model could be loaded from {source!r}: {said}") from error
