"""What levers are made from: activations of contrast pairs and of ordinary text, read once, and levers, fitted once."""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ...bank.concept_bank import ConceptBank
from ...bank.effects import DetectorEffects
from ...evaluation.comparison import Condition, Unrelated, answer
from ...evaluation.score import Scores
from ...evaluation.text import Judge
from ...text import progress
from ..entries import ConceptRecipe
from ..recipe import DirectionRecipe
from ..record.activations import answers, tokens
from ..store import recorded, remembered
from .levers import Lever, Task, bank_of
from .methods import METHODS
from .readouts import Readout, discriminant


class Detector(NamedTuple):
    """A reading that is 1 on average where something is present and 0 where it is not, with its precision and recall by token,
    on `tokens` tokens of texts that it was not made from."""

    gate: Readout
    precision: float
    recall: float
    tokens: int

    @property
    def effects(self) -> DetectorEffects:
        """What a bank stores of it."""
        return {"precision": round(self.precision, 3), "recall": round(self.recall, 3), "tokens": self.tokens}


def fitted(method: str, task: Task) -> Lever:
    """What a method finds, or another function of its file, which is named behind it: `word control`."""
    name, _, function = method.partition(" ")
    return getattr(METHODS[name], function or "fit")(task)


TESTED = 20
"""Texts of each kind that a detector is tested on."""
PRESENT = 0.5
"""Reading above which a detector says yes."""


class Studio:
    """A model, a recipe, and everything measured on the way to levers. `folder` keeps it for a later run that goes on."""

    def __init__(self, model: Any, tokenizer: Any, recipe: DirectionRecipe, sites: Sequence[str], folder: Path | None = None):
        self.model, self.tokenizer, self.recipe, self.sites, self.folder = model, tokenizer, recipe, list(sites), folder
        self._tasks: dict[str, Task] = {}
        self._levers: dict[tuple[str, str, str], Lever] = {}

    @cached_property
    def activations(self) -> dict[str, Tensor]:
        """Mean activations of every answer of the pairs, `side|concept|site`, and tokens of ordinary text, `reference|site`."""
        return recorded(self._kept("activations.safetensors"), self._read)

    def _kept(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / name

    def _read(self) -> dict[str, Tensor]:
        texts = self.recipe.read_texts(self.recipe.reference)
        found = tokens(self.model, self.tokenizer, texts, self.sites, what="reference text")
        stored = {f"reference|{site}": x for site, x in found.items()}
        for concept in progress(self.recipe.concepts, "reading contrast pairs"):
            for side, said in self.recipe.read_shown(concept)._asdict().items():
                read = answers(self.model, self.tokenizer, said, self.sites, what=concept.name)
                stored |= {f"{side}|{concept.name}|{site}": torch.stack([t.mean(0) for t in x]) for site, x in read.items()}
        return stored

    @cached_property
    def norms(self) -> dict[str, float]:
        """Median length of an activation at each site."""
        return {site: float(self.reference[site].norm(dim=-1).median()) for site in self.sites}

    @cached_property
    def reference(self) -> dict[str, Float[Tensor, "tokens D"]]:
        """Activations of ordinary text."""
        return {site: self.activations[f"reference|{site}"] for site in self.sites}

    @cached_property
    def unrelated(self) -> Unrelated:
        """Ordinary text on which side effects are measured."""
        return Unrelated(self.model, self.tokenizer, self.recipe.read_texts(self.recipe.unrelated))

    def scored(self, conditions: Sequence[Condition], prompts: Sequence[str], judge: Judge, seeds: Sequence[Any]) -> Scores:
        """Answers to prompts under conditions, as long as the recipe says, and their scores; a seed of None: greedy ones."""
        how = {"seeds": seeds, "new_tokens": self.recipe.new_tokens}
        return answer(self.model, self.tokenizer, conditions, prompts, judge, **how)

    def _means(self, side: str, concept: str) -> dict[str, Tensor]:
        return {site: self.activations[f"{side}|{concept}|{site}"] for site in self.sites}

    def task(self, concept: ConceptRecipe, instruction: str) -> Task:
        """What methods may look at for a concept."""
        if concept.name not in self._tasks:
            others = [other.name for other in self.recipe.concepts if other.name != concept.name]
            self._tasks[concept.name] = Task(
                model=self.model,
                tokenizer=self.tokenizer,
                instruction=instruction,
                shown=self.recipe.read_shown(concept),
                prompts=self.recipe.read_prompts("train"),
                texts=self.recipe.read_texts(self.recipe.reference)[: self.recipe.train_prompts],
                site=self.sites[0],
                sites=self.sites,
                positive=self._means("positive", concept.name),
                negative=self._means("negative", concept.name),
                reference=self.reference,
                norms=self.norms,
                keep={site: self._differences(others, site) for site in self.sites} if others else {},
                name=concept.name,
                seed=self.recipe.seed,
            )
        return self._tasks[concept.name]

    def _differences(self, concepts: Sequence[str], site: str) -> Float[Tensor, "k D"]:
        sides = (torch.stack([self._means(side, name)[site].mean(0) for name in concepts]) for side in ("positive", "negative"))
        found = torch.sub(*sides)
        return found / found.norm(dim=-1, keepdim=True)

    def lever(self, concept: ConceptRecipe, instruction: str, method: str, site: str) -> Lever:
        """The lever of a concept by a method at a site, fitted once."""
        key = concept.name, method, site
        if key not in self._levers:
            path = self._kept(f"levers/{concept.name}/{method}@{site}.safetensors")
            made = recorded(path, lambda: fitted(method, self.task(concept, instruction).elsewhere(site)).to_tensors())
            self._levers[key] = Lever.from_tensors(made)
        return self._levers[key]

    def bank(self, concept: ConceptRecipe, instruction: str, method: str, site: str) -> ConceptBank:
        """The same as a bank to try it with: its one concept is `lever`."""
        return bank_of(self.lever(concept, instruction, method, site), self.norms)

    def shuffled(self, concept: ConceptRecipe, site: str) -> ConceptBank:
        """Such a bank of the difference of means after the labels of all texts were permuted at random: a control."""
        task = self.task(concept, "").elsewhere(site)
        both = torch.cat((task.positive[site], task.negative[site]))
        both = both[torch.randperm(len(both), generator=torch.Generator().manual_seed(self.recipe.seed))]
        first = len(task.positive[site])
        difference = both[:first].mean(0) - both[first:].mean(0)
        return bank_of(task.at(difference), self.norms)

    def control(self, concept: ConceptRecipe, method: str, site: str) -> ConceptBank | None:
        """Such a bank of what the method has to be compared with, such as the direction of a random word; None without one."""
        return self.bank(concept, "", f"{method} control", site) if hasattr(METHODS[method], "control") else None

    def forget(self, concept: ConceptRecipe) -> None:
        """Free what only this concept needed."""
        self._tasks.pop(concept.name, None)

    def detector(self, concept: ConceptRecipe) -> Detector | None:
        """Tells tokens of texts with the concept from tokens of texts without it; None without texts to test it on."""
        positive, negative, others = self.recipe.read_scoring(concept)
        if not others:
            return None
        site = self.sites[0]
        means = [self._means(side, concept.name)[site].mean(0) for side in ("positive", "negative")]
        gate = discriminant(site, means[0], means[1], self.reference[site])
        return self._tested(concept.name, gate, lambda: [self._said(texts[:TESTED], site) for texts in (positive, negative)])

    def answering(self) -> Detector:
        """Tells tokens of chats from ordinary text. Made from answers, it reads as high in the turns of users and systems."""
        site, names = self.sites[0], [concept.name for concept in self.recipe.concepts]
        means = torch.cat([self._means(side, name)[site] for name in names for side in ("positive", "negative")])
        gate = discriminant(site, means.mean(0), self.reference[site].mean(0), self.reference[site])
        said = [text for concept in self.recipe.concepts for text in self.recipe.read_scoring(concept)[1]]
        ordinary = self.recipe.read_texts(self.recipe.unrelated)

        def texts() -> Sequence[Tensor]:
            found = tokens(self.model, self.tokenizer, ordinary, [site], what="unrelated text")
            return self._said(said[:: max(1, len(said) // (2 * TESTED))], site), found[site]

        return self._tested("answering", gate, texts)

    def _said(self, texts: Sequence[str], site: str) -> Float[Tensor, "tokens D"]:
        """Texts as answers to ordinary prompts."""
        prompts = self.recipe.read_prompts("train")
        asked = [(prompts[i % len(prompts)], text) for i, text in enumerate(texts)]
        return torch.cat(answers(self.model, self.tokenizer, asked, [site], what="held-out text")[site])

    def _tested(self, name: str, gate: Readout, texts: Callable[[], Sequence[Tensor]]) -> Detector:
        """`texts` gives the activations of tokens that should open the gate, and of tokens that should not."""

        def test() -> dict[str, Any]:
            present, absent = texts()
            right, wrong = (int((gate(x) > PRESENT).sum()) for x in (present, absent))
            total = len(present) + len(absent)
            return {"precision": right / max(1, right + wrong), "recall": right / len(present), "tokens": total}

        return Detector(gate, **remembered(self._kept(f"detectors/{name}.json"), test))
