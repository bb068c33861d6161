"""The recipe that a bank carries, so that it can be measured again, or made again, where the recipe's folder is not at hand;
and the pipeline that it may carry.

The first line of `recipe.jsonl` has the fields of the recipe. Every further line is a file that it names, as `file` and `text`.
Left out are files that come with steerlib, and the corpus of encoders of a language model, which may be of any size.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

from ..bank.concept_bank import ConceptBank
from ..errors import BadRecipe, CorruptBank
from .fields import UNSAID, made_of
from .recipe import DirectionRecipe, PictureRecipe, PipelineEncoderRecipe, Recipe, TextEncoderRecipe, kind_of

R = TypeVar("R", bound=Recipe)
RECIPE = "recipe.jsonl"
LARGEST = 4 << 20
"""Most bytes of prompts that a bank of pictures carries."""
PIPELINE = "pipeline"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
PLAIN = (".json", ".safetensors", ".txt", ".model")
"""How files of weights end that a bank never carries, and how those end that it carries."""


def carried(recipe: Recipe) -> bytes:
    """The contents of `recipe.jsonl`."""
    values = {key: value for key, value in asdict(recipe).items() if key not in UNSAID and value != ()}
    for entry in values.get("encoders", ()):  # in a recipe the fields of an encoder stand beside those of its site
        entry |= entry.pop("recipe")
    lines = [_without_none(values)]
    for name in dict.fromkeys(_named(recipe)):
        if name in recipe.texts if recipe.texts is not None else (recipe.folder / name).is_file():
            lines.append({"file": name, "text": recipe.text_of(name)})
    return "".join(json.dumps(line, ensure_ascii=False, sort_keys=True) + "\n" for line in lines).encode()


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _named(recipe: Recipe) -> Iterator[str]:
    """Files that measuring a bank reads."""
    yield from (recipe.reference, recipe.unrelated)
    if isinstance(recipe, DirectionRecipe):
        yield from (recipe.prompts, recipe.held_out)
        yield from (f"{folder}/{c.name}.jsonl" for folder in (recipe.pairs, recipe.scoring) for c in recipe.concepts)
    if isinstance(recipe, TextEncoderRecipe):
        yield from recipe.attributes
    yield from recipe.listed
    if isinstance(recipe, PictureRecipe):
        yield from (recipe.prompts, *(f"{recipe.pairs}/{c.name}.jsonl" for c in recipe.concepts))
        yield from (recipe.graph.prompts,) if recipe.graph is not None and recipe.graph.prompts else ()
    if (
        isinstance(recipe, PipelineEncoderRecipe)
        and sum(len(recipe.bytes_of(name) or b"") for name in recipe.corpus) <= LARGEST
    ):
        yield from recipe.corpus


def pipeline_of(recipe: Recipe) -> dict[str, str | bytes]:
    """The files that a bank gets where its recipe says `carry_model`: those of the pipeline's components, without a word of
    where it was loaded from.

    Raises `BadRecipe` where `source` is no folder of a pipeline whose weights are safetensors.
    """
    if not getattr(recipe, "carry_model", False):
        return {}
    folder, found = Path(recipe.weights), dict[str, str | bytes]()
    if not (index := folder / "model_index.json").is_file():
        raise BadRecipe(f"carry_model needs a pipeline in a folder, saved by pipe.save_pretrained; {str(folder)!r} is none")
    parts = [name for name, value in json.loads(index.read_text()).items() if isinstance(value, list) and any(value)]
    for path in (index, *(path for part in parts for path in sorted((folder / part).rglob("*")) if path.is_file())):
        if path.suffix in PICKLED:
            raise BadRecipe(f"carry_model needs weights in safetensors, {path.name!r} holds pickles; save the pipeline anew")
        if path.suffix in PLAIN:
            found[f"{PIPELINE}/{path.relative_to(folder).as_posix()}"] = _unplaced(path) or str(path)
    return found


def _unplaced(path: Path) -> bytes:
    """What a configuration says, without the place that it was loaded from; nothing of a file that names none."""
    said = json.loads(path.read_text(encoding="utf-8")) if path.suffix == ".json" else None
    if not isinstance(said, dict) or said.pop("_name_or_path", None) is None:
        return b""
    return f"{json.dumps(said, indent=2)}\n".encode()


def recipe_in(bank: ConceptBank) -> Recipe | None:
    """The recipe that a bank carries; None for one that carries none.

    Raises `CorruptBank` where it is none.
    """
    if RECIPE not in bank.files:
        return None
    try:
        values, *others = (json.loads(line) for line in bank.content(RECIPE).decode().split("\n") if line)
        texts = {line["file"]: line["text"] for line in others}
        if not all(isinstance(part, str) for pair in texts.items() for part in pair):
            raise TypeError("file and text are texts")
        return replace(made_of(kind_of(values, RECIPE), values, RECIPE), texts=texts)
    except (BadRecipe, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CorruptBank(f"{RECIPE} of bank {bank.name!r} is no recipe that this steerlib reads: {error}") from None


def on(recipe: R, source: str, *, base: str = "", **others: Any) -> R:
    """A recipe for another model, of which nothing is known but its source: a folder, a Hub id or a package's file.

    `base` is its id, as the bank will record it; default: `source`, or the name of that folder or file. `others` are fields
    that change with it, such as `license`, which is that of another bank then; default: left empty.
    """
    named = Path(source).stem if source.startswith("package:") else Path(source).resolve().name
    known = base or (source if not source.startswith("package:") and not Path(source).exists() else named)
    return replace(recipe, **{"source": source, "base": known, "license": "", "description": "", **others})


def ported(recipe: R, bank: ConceptBank, source: str, concepts: Sequence[str] = (), **others: Any) -> R:
    """The recipe of a bank for another model, with all concepts or some: its layers become shares of the model's depth, sites
    of a pipeline those of the new one.

    `others` are what `on` takes. Raises `BadRecipe` for latents, which belong to their model, `UnknownConcept`.
    """
    if not isinstance(recipe, (DirectionRecipe, PictureRecipe)):
        raise BadRecipe(
            f"bank {bank.name!r} has latents or a context module, which belong to their model and its sites; train those of "
            f"{source!r} by a recipe with a corpus or with contexts: steerlib train recipe.toml --model {source}"
        )
    names = [bank[name].name for name in concepts] or [concept.name for concept in recipe.concepts]
    if strange := {*names} - {concept.name for concept in recipe.concepts}:
        raise BadRecipe(f"the recipe of bank {bank.name!r} has no concepts {', '.join(sorted(strange))}")
    depth = bank.base.fingerprint.get("num_hidden_layers")
    chosen: dict[str, Any] = {
        "concepts": tuple(concept for concept in recipe.concepts if concept.name in names),
        "description": f"The concepts of the bank {bank.name}, made anew for this model by its recipe.",
    }
    if isinstance(recipe, PictureRecipe):
        if "budget" in others:
            raise BadRecipe(f"bank {bank.name!r} is of pictures, whose search has no budget of answers; leave it out")
        chosen["graph"] = recipe.graph if len(names) > 1 else None
        return on(recipe, source, **{**chosen, "sites": (), "carry_model": False, **others})
    chosen["layers"] = (
        tuple(k if isinstance(k, float | str) or not k else round(k / depth, 4) for k in recipe.layers) if depth else ()
    )
    return on(recipe, source, **{**chosen, **others})
