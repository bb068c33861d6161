"""`words`: every word of a model's vocabulary as a concept, made when it is first asked for."""

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...bank.concept_bank import BaseModel, ConceptBank, SiteFacts
from ...bank.concepts import Concept
from ...bank.manifest import EncoderFacts, file_of
from ...bank.shelf import Maker, Shelf
from ...encoders import Directions
from ...errors import BadBank
from ...hosts import host_for
from ...vocabulary import forms, site_for, unembedding
from ..calibrate.doses import statistics
from ..directions.lens import word_directions
from ..recipe import COMMON
from ..record.activations import tokens

USEFUL = 0.16
"""Length of a useful amount, as a share of the median length of an activation there: the mean of these amounts."""
TEXTS = 16
"""Texts from which a direction is made."""


def words(model: Any, tokenizer: Any = None) -> ConceptBank:
    """A bank in which every word of a model's vocabulary is a concept, made when it is first asked for, and kept.

    A word is moved along the direction that makes it, capitalised or in the plural too, likelier at all later positions: the
    gradient of its logit, averaged over ordinary text that comes with steerlib. It takes seconds a word. `find`, iteration and
    `save_pretrained` know the words that were asked for so far; what is saved is an ordinary bank of these.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        tokenizer: the model's own. Default: the one in the model's folder or repository.

    Returns:
        The bank. One unit of a word is the standard deviation of its reading on ordinary text; its useful amount follows from
        a rule and was not measured for the word.

    Raises:
        UnsupportedTarget: not a causal language model.
        UnknownConcept: of a word that is several tokens, when it is asked for.
        Unanswerable: a session steers the model while a word is made; ask for the word before: `bank["ocean"]`.

    Example:
        >>> bank = sl.words(model, tokenizer)                                    # doctest: +SKIP
        >>> with sl.steer(model, bank, {"ocean": bank["ocean"].useful}):         # doctest: +SKIP
        ...     model.generate(**inputs, max_new_tokens=60)
    """
    made = _Words(model, host_for(model).tokenizer() if tokenizer is None else tokenizer)
    width, what = made.rows.shape[1], "and every other word that is one token of the model, made when it is asked for"
    shelf = Shelf(
        {made.site: EncoderFacts(site=made.site, kind="directions", file=file_of(made.site))},
        {made.site: Directions(torch.empty(0, width))},
        maker=Maker(what, made.can, made.make),
    )
    sites = {made.site: SiteFacts(width=width, norm=round(made.norm, 4))}
    return ConceptBank("words", [], shelf, base=BaseModel.of(made.model), sites=sites, provenance={"method": "words"})


class _Words:
    """Makes the concepts."""

    def __init__(self, model: Any, tokenizer: Any):
        self.model, self.tokenizer = host_for(model).model, tokenizer
        self.rows: Tensor = unembedding(self.model)[1].weight
        if len(tokenizer) > len(self.rows):
            raise BadBank(f"the tokenizer has {len(tokenizer)} tokens, and the model {len(self.rows)}; give the model's own")
        self.site = site_for(host_for(model))
        self._made: dict[str, tuple[Concept, Directions]] = {}

    @cached_property
    def texts(self) -> Sequence[str]:
        """Ordinary text."""
        lines = (COMMON / "reference.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["text"] for line in lines]

    @cached_property
    def reference(self) -> Tensor:
        """Activations of its tokens at the site."""
        return tokens(self.model, self.tokenizer, self.texts, [self.site], what="reference text")[self.site]

    @cached_property
    def norm(self) -> float:
        """Their median length."""
        return float(self.reference.norm(dim=-1).median())

    def can(self, name: str) -> bool:
        """Whether a name is that of a word, or of several with spaces between them."""
        return bool(name.split()) and all(forms(self.tokenizer, word, self.rows) for word in name.split())

    def make(self, name: str) -> tuple[Concept, Directions]:
        """The concept of a word, and its row."""
        word = " ".join(name.split())
        if word not in self._made:
            found = word_directions(self.model, self.tokenizer, [word], self.texts[:TEXTS], sites=[self.site])[word][self.site]
            direction = found / found.norm()
            fact = statistics(direction, self.reference)
            concept = Concept(
                name=word,
                encoder=self.site,
                index=0,
                unit=fact.std,
                natural=(fact.low, fact.high),
                useful=round(USEFUL * self.norm / fact.std, 3),
                label=f"the word “{word}”, made likelier at later positions",
                source=f"gradient of its logit on {TEXTS} texts; the useful amount is {USEFUL:.0%} of an activation's length",
            )
            self._made[word] = concept, Directions(direction[None], torch.tensor([fact.mean]))
        return self._made[word]
