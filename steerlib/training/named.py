"""`make`: concepts from their names alone. The rest is a recipe like any other.

Of a pipeline that draws, prompts with and without the name are the contrast pairs. A language model writes its own.

Every concept joins two directions: what makes the words of its name likelier, and how answers of the model that was asked for
it differ from those of the model that was not. They act at three layers together, or at one layer in the mixture that best
tells such answers apart, under a bound on the change of ordinary text; which, and how much, is chosen by a few new answers.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..bank.concept_bank import ConceptBank
from ..devices import best_device
from ..errors import BadRecipe, UnsupportedTarget
from ..hosts import digest_of, host_for, load
from .directions.methods import word
from .directions.written import ASKINGS, written
from .entries import ConceptRecipe, Pair, PictureConcept
from .fields import check_file_name
from .pipeline import Score, precision_of, train
from .recipe import RESERVED, DirectionRecipe, PictureRecipe
from .store import remembered

METHODS = ("word-and-means-everywhere", "word-and-means", "word", "difference-of-means")
DEPTHS = (0.3, 0.4, 0.5)
"""Layers that are tried, as shares of the model's depth."""
FEW: dict[str, Any] = {"dev_prompts": 6, "evaluation_prompts": 10, "seeds": 1, "new_tokens": 24, "is_brief": True}
"""Answers to choose and to measure with."""
REFERENCE, UNRELATED = 48, 15
"""Ordinary texts to read and to measure side effects on, of those that come with steerlib."""
ABOUT = """
Concepts made from their names alone, by `steerlib make`: the model itself wrote the answers that they were made from, and a
sentence model that knows only the name scored them. Figures are of few answers. *Random word* is what the direction of a random
word, as long and in the same place, does; *best random* is a single random direction."""

DRAWN: dict[str, Any] = {"train_prompts": 32, "dev_prompts": 6, "evaluation_prompts": 8}
"""Pairs of prompts to learn from, to choose with and to measure on."""
PROMPTS = "prompts.txt"
"""What a bank calls the prompts that `make` was given."""
OF_PICTURES = "prompts=, score=, steps= and guidance="
ABOUT_PICTURES = (
    "Concepts made from their names alone, by `steerlib make`: how a prompt that says one differs from one that does not."
)


def make(
    target: Any, names: str | Sequence[str], *, tokenizer: Any = None, source: str = "", name: str = "made", seed: int = 0,
    work: str | os.PathLike[str] | None = None, prompts: Sequence[str] | None = None, score: Score | str | None = None,
    steps: int | None = None, guidance: float | None = None,
) -> ConceptBank:  # fmt: skip
    """Make a bank of concepts from nothing but their names: a few minutes each for a small model on a processor.

    Args:
        target: A language model, a pipeline of diffusers, or where it is: a folder, a Hub id, `package:<name>/<file>.gguf`.
        names: What they are about, such as `"medieval knight"`; of pictures what a prompt would say, such as `"by night"`.
        tokenizer: Of a language model. Needed with one that is loaded already.
        source: Where the model was loaded from, which the bank says. Default: as the model says.
        name, seed: Of the bank; of all random choices.
        work: A folder that keeps what each stage made, from which the same call goes on. Default: nothing is kept.
        prompts: Of a pipeline: prompts that say nothing of the names, four or more. Default: some that come with steerlib.
        score: Of a pipeline: what `sl.train` takes, or where a CLIP model is, which the recipe says then.
        steps, guidance: Of a pipeline: scheduler steps of a picture, 20 by default, and guidance, by default its own.

    Returns the bank, with its card and the recipe that it could be made again from; `save_pretrained` writes it.

    Raises:
        BadRecipe: A name is empty or given twice, the tokenizer cannot write it, or the model does not write about it.
        UnsupportedTarget: Neither a language model nor a pipeline that draws.
        MissingExtra: A package of the extra `steerlib[eval]` is not installed.

    Example:
        >>> bank = sl.make(model, ["pirate", "medieval knight"], tokenizer=tokenizer)     # doctest: +SKIP
        >>> scenes = sl.make(pipe, ["by night", "in the snow"])                           # doctest: +SKIP
    """
    check_given(names := [names] if isinstance(names, str) else list(names))
    if isinstance(target, str):
        source, target, tokenizer = source or target, *_loaded(target)
    known = source or getattr(target, "name_or_path", "") or type(target).__name__
    if host_for(target).has_progress:
        drawn: dict[str, Any] = {"steps": steps, "guidance": guidance, "score": score if isinstance(score, str) else None}
        plan = picture_recipe_of(names, known, prompts, name=name, seed=seed, **drawn)
        return train(target, plan, work=work, score=None if isinstance(score, str) else score)
    check_target(target, tokenizer, names, of_pictures=(prompts, score, steps, guidance))
    plan = DirectionRecipe(name=name, base=known, source=known, seed=seed, description=ABOUT, **FEW)
    return train(target, _in_words(plan, target, tokenizer, names, work), tokenizer=tokenizer, work=work)


def picture_recipe_of(names: Sequence[str], source: str, prompts: Sequence[str] | None, **others: Any) -> PictureRecipe:
    """The recipe of concepts of pictures by name, over prompts that say nothing of them. What is None stays as it is."""
    if prompts is not None and (isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts)):
        raise BadRecipe(f"expected prompts as a list of texts, got {prompts!r:.80}")
    concepts = tuple(PictureConcept(name=name) for name in names)
    given = DRAWN | {name: value for name, value in others.items() if value is not None}
    plan = PictureRecipe(base=source, source=source, concepts=concepts, description=ABOUT_PICTURES, **given)
    if prompts is None:
        return plan
    return replace(plan, prompts=PROMPTS, texts={PROMPTS: "".join(f"{' '.join(prompt.split())}\n" for prompt in prompts)})


def _loaded(where: str) -> tuple[Any, Any]:
    target, tokenizer = load(where)
    return target.to(best_device()), tokenizer


def _in_words(plan: DirectionRecipe, target: Any, tokenizer: Any, names: list[str], work: Any) -> DirectionRecipe:
    """The recipe, from what the model writes, or what an earlier call wrote."""
    host, precision = host_for(target), [precision_of(target)] if precision_of(target) else []
    key = sha256(repr((names, plan.seed, host.fingerprint(), digest_of(host), *precision)).encode()).hexdigest()[:16]
    path = None if work is None else Path(work) / f"pairs-{key}.json"
    pairs = remembered(path, lambda: written(target, tokenizer, names, plan.read_prompts("train"), seed=plan.seed))
    return recipe_of(plan, target, tokenizer, pairs)


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, one a line; raises `BadRecipe` where there is none."""
    if not path.is_file():
        raise BadRecipe(f"expected a file of prompts, one a line, found none at {str(path)!r}")
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def check_given(names: Sequence[str]) -> None:
    """Raise `BadRecipe` for names that no bank could have, before a model is loaded."""
    if not names or not all(isinstance(name, str) for name in names):
        raise BadRecipe(f"expected a name or more to make concepts from, got {names!r:.80}")
    for name in names:
        check_file_name(name, "name")
        if name in RESERVED or name != " ".join(name.split()):
            raise BadRecipe(f"expected names of words with one space between them, other than {RESERVED[0]!r}, got {name!r}")
    if len({name.casefold() for name in names}) < len(names):
        raise BadRecipe(f"expected each name once, got {', '.join(names)}")


def check_target(target: Any, tokenizer: Any, names: Sequence[str], *, of_pictures: Sequence[Any] = ()) -> None:
    """Raise `UnsupportedTarget` for what is no language model with its tokenizer, `BadRecipe` for names it cannot write and for
    arguments that are of pictures."""
    if any(given is not None for given in of_pictures):
        raise BadRecipe(f"{OF_PICTURES} are of pictures, and {type(target).__name__} is no pipeline that draws")
    layers = [site for site in host_for(target).sites() if site.removeprefix("layers.").isdigit()]
    if not layers or not hasattr(target, "generate"):
        raise UnsupportedTarget(f"expected a language model that writes answers, got {type(target).__name__}")
    if tokenizer is None:
        raise UnsupportedTarget("expected the tokenizer beside a model that is loaded already: make(model, names, tokenizer=…)")
    for name in names:
        ids = tokenizer(f" {name}", add_special_tokens=False)["input_ids"]
        if _letters(tokenizer.decode(ids)) != _letters(name):
            raise BadRecipe(f"the tokenizer of this model cannot write {name!r}; take another word for it")


def _letters(text: str) -> str:
    return "".join(text.split()).casefold()


def recipe_of(
    plan: DirectionRecipe, target: Any, tokenizer: Any, pairs: Mapping[str, Sequence[Sequence[str]]]
) -> DirectionRecipe:
    """The recipe of concepts by name: pairs of the model's own, scorers that know the name, methods that can be used for it."""
    depth = sum(site.removeprefix("layers.").isdigit() for site in host_for(target).sites())
    concepts = [
        ConceptRecipe(
            name=name,
            label=name,
            instructions=tuple(asking.format(name) for asking in ASKINGS),
            methods=METHODS if word.words_of(target, tokenizer, name) else METHODS[-1:],
            scorer={"near": name},
        )
        for name in pairs
    ]
    texts = {f"{plan.pairs}/{name}.jsonl": _lines([Pair(*pair)._asdict() for pair in some]) for name, some in pairs.items()}
    for file, count in ((plan.reference, REFERENCE), (plan.unrelated, UNRELATED)):
        texts[file] = _lines([{"text": text} for text in plan.read_texts(file)[:count]])
    layers = tuple(sorted({round(depth * share) for share in DEPTHS}))
    return replace(plan, concepts=tuple(concepts), layers=layers, texts=texts)


def _lines(values: Sequence[Mapping[str, str]]) -> str:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)
