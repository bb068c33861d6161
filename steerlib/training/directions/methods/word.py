"""What makes the words of the concept's name likelier: their gradients over later positions (the transposed Jacobian lens)."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ....errors import BadRecipe
from ....hosts import host_for
from ....vocabulary import aim_of, forms, unembedding
from ..lens import pulled_back
from ..levers import Lever, Task

LENGTH = 48
"""Tokens that are read of each text."""


def directions(task: Task) -> dict[str, Float[Tensor, "2 D"]]:
    """By site, the direction of the name's words, and that of a random word as a control; from one pass over the texts."""
    if "word" not in task.memo:
        own = " ".join(words_of(task.model, task.tokenizer, task.name))
        if not own:
            raise BadRecipe(f"no word of {task.name!r} is one token of this model; leave out the methods that need one")
        rows, words = unembedding(host_for(task.model).model)[1].weight, (own, random_word(task.tokenizer, task.seed))
        aims = torch.stack([aim_of(task.tokenizer, rows, word) for word in words])
        task.memo["word"] = pulled_back(task.model, task.tokenizer, aims, task.texts, sites=task.sites, length=LENGTH)
    return task.memo["word"]


def words_of(model: Any, tokenizer: Any, name: str) -> list[str]:
    """Those words of a name that are one token of the model."""
    rows = unembedding(host_for(model).model)[1].weight
    return [word for word in name.split() if forms(tokenizer, word, rows)]


def random_word(tokenizer: Any, seed: int) -> str:
    """A word of three small letters or more that is one token with a space before it."""
    for i in torch.randperm(len(tokenizer), generator=torch.Generator().manual_seed(seed)).tolist():
        word = tokenizer.decode([i]).strip()
        is_plain = len(word) > 2 and word.isalpha() and word.islower()
        if is_plain and tokenizer(f" {word}", add_special_tokens=False)["input_ids"] == [i]:
            return word
    raise BadRecipe("this tokenizer has no word that is one token")


def fit(task: Task) -> Lever:
    return task.at(directions(task)[task.site][0])


def control(task: Task) -> Lever:
    """The same of a random word."""
    return task.at(directions(task)[task.site][1])
