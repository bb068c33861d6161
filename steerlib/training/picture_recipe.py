"""Concepts of a diffusion model from prompts alone: pairs of prompts that differ in the concept, and in nothing else."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from ..errors import BadRecipe
from .entries import ConceptGraphRecipe, PictureConcept
from .fields import check_file_name, check_names, is_blank
from .recipe_base import Recipe

TEMPLATE = "{prompt}, {concept}"
"""How a prompt says a concept unless a recipe says otherwise."""
LEAST = 4
"""Pairs of prompts: some to learn from, one or more to choose with and to measure on."""

SEEDS = 100_003
"""Seeds of noise that no other seed of a recipe uses."""


def asked(template: str, prompt: str, concept: str) -> str:
    """A prompt that says a concept."""
    return template.replace("{prompt}", prompt).replace("{concept}", concept)


def check_template(template: str) -> None:
    """Raise `BadRecipe` for a template without a place for either."""
    for part in ("{prompt}", "{concept}"):
        if part not in template:
            raise BadRecipe(f"expected a template such as {TEMPLATE!r}, with {part}; got {template!r}")


class PromptPair(NamedTuple):
    """A prompt that shows a concept and one that does not, both to be drawn from the noise of one seed."""

    positive: str
    negative: str
    seed: int


class Splits(NamedTuple):
    """Pairs to learn from, to choose with, and to measure on: other prompts each, and other noise."""

    train: list[PromptPair]
    dev: list[PromptPair]
    evaluation: list[PromptPair]


@dataclass(frozen=True, kw_only=True)
class PictureRecipe(Recipe):
    """Concepts of a diffusion model, each a direction at every site and noise level: found, scored and calibrated by prompts.

    Args:
        concepts: The concepts to make; in TOML `[[concepts]]`.
        prompts: A file of prompts that say nothing of the concepts, one a line; for concepts without prompts of their own.
        template: How a prompt says a concept, with `{prompt}` and `{concept}` in it.
        pairs: Folder of `<concept>.jsonl`, lines of `positive` and `negative`, for concepts without lists of prompts.
        sites: Sites to find it at. Default: what cross-attention adds, or, where there is none, what blocks add.
        levels: Timesteps of noise levels; each has directions of its own, and acts at the noise that is nearest to it.
        methods: Methods to try, of those in `steerlib/training/directions/prompted.py`; `text` where there is a text encoder.
        train_prompts: The number of pairs to learn from. Fewer prompts are drawn again, from other noise.
        dev_prompts: The number of pairs to choose with.
        evaluation_prompts: The number of pairs to report on.
        steps: Scheduler steps of a picture.
        guidance: Guidance towards the prompt. Default: the pipeline's own.
        batch: Pictures that are drawn together; two of each pair.
        score: A CLIP model, a folder or a Hub id, that tells in the place of the pipeline how much pictures show of a concept.
        carry_model: Whether the bank carries the pipeline, as `pipeline/`. `source` is a folder of safetensors then.
        graph: How to find which concept brings or takes which. Default: not at all.
    """

    concepts: tuple[PictureConcept, ...] = ()
    prompts: str = "pictures.txt"
    template: str = TEMPLATE
    pairs: str = "pairs"
    sites: tuple[str, ...] = ()
    levels: tuple[int, ...] = (850, 500, 150)
    methods: tuple[str, ...] = ("mean", "weighed", "placed", "text")
    train_prompts: int = 48
    dev_prompts: int = 8
    evaluation_prompts: int = 12
    steps: int = 20
    guidance: float | None = None
    batch: int = 16
    score: str = ""
    carry_model: bool = False
    graph: ConceptGraphRecipe | None = None
    digested: ClassVar[tuple[str, ...]] = ("template", "sites", "levels", "steps", "guidance", "batch")

    @classmethod
    def describes(cls, values: Mapping[str, Any], folder: Path) -> bool:
        """A recipe of concepts with a `template`, with prompts in a .txt file, or of a pipeline that lies in a folder."""
        if not values.get("concepts"):
            return False
        source, prompts = values.get("source"), values.get("prompts")
        said = "template" in values or (isinstance(prompts, str) and prompts.endswith(".txt"))
        return said or (
            isinstance(source, str) and any((place / "model_index.json").is_file() for place in (folder / source, Path(source)))
        )

    def check(self, *, to_train: bool = True) -> None:
        super().check(to_train=to_train)
        check_names([concept.name for concept in self.concepts])
        check_template(self.template)
        if min(*self._counts, self.steps, len(self.methods)) < 1 or self.batch < 2:
            raise BadRecipe("expected a method or more, positive numbers of prompts and steps, and a batch of 2 or more")
        if not self.levels or min(self.levels) < 0 or len({*self.levels}) < len(self.levels):
            raise BadRecipe(f"expected levels as timesteps from 0 up, each once, got {list(self.levels)}")
        for concept in self.concepts:
            check_file_name(concept.name, "concept's name")
            if to_train:
                self.read_splits(concept)
        if self.graph is not None:
            self.graph.check()
            if len(self.concepts) < 2:
                raise BadRecipe("expected two concepts or more for a graph")
            if to_train:
                self.read_contexts(self.graph)

    def quick(self) -> "PictureRecipe":
        few = {"train_prompts": 16, "dev_prompts": 4, "evaluation_prompts": 4, "steps": 10}
        return replace(self, **{name: min(n, getattr(self, name)) for name, n in few.items()}, graph=None, is_quick=True)

    @property
    def _counts(self) -> tuple[int, int, int]:
        return self.train_prompts, self.dev_prompts, self.evaluation_prompts

    def read_pairs(self, concept: PictureConcept) -> list[tuple[str, str]]:
        """The pairs of a concept: its own prompts, those of its file, or the recipe's prompts with and without it."""
        name = f"{self.pairs}/{concept.name}.jsonl"
        if concept.positive or concept.negative:
            if len(concept.positive) != len(concept.negative):
                raise BadRecipe(
                    f"{concept.name!r}: expected as many negative prompts as positive ones, got {len(concept.negative)} and "
                    f"{len(concept.positive)}"
                )
            pairs = [*zip(concept.positive, concept.negative, strict=True)]
        elif self.text_of(name) is not None:
            pairs = [(line["positive"], line["negative"]) for line in self.read_lines(name, "positive", "negative")]
        else:
            pairs = [(self.asked(p, concept.name), p) for p in self.read_prompts()]
        if bad := [pair for pair in pairs if is_blank(pair) or pair[0] == pair[1]]:
            raise BadRecipe(f"{concept.name!r}: expected pairs of two different prompts, got {bad[0]!r:.120}")
        return pairs

    def asked(self, prompt: str, concept: str) -> str:
        """A prompt that says a concept."""
        return asked(self.template, prompt, concept)

    @property
    def provenance(self) -> dict[str, Any]:
        said = super().provenance | {"steps": self.steps, "guidance": self.guidance}
        return {key: value for key, value in said.items() if key != "source" or not self.carry_model}

    @property
    def plain(self) -> str:
        """A prompt that says nothing of the first concept, of those that concepts are measured on."""
        return self.read_splits(self.concepts[0]).evaluation[0].negative

    def read_prompts(self, name: str = "") -> list[str]:
        """The prompts that say nothing of the concepts, or those of another file."""
        if (text := self.text_of(name or self.prompts)) is None:
            raise BadRecipe(f"expected {name or self.prompts} beside the recipe, found none")
        return [line.strip() for line in text.splitlines() if line.strip()]

    def read_contexts(self, graph: ConceptGraphRecipe) -> list[tuple[str, int]]:
        """The prompts of a graph's pictures with seeds; fewer are drawn again, from other noise."""
        pairs = zip(*(self.read_splits(concept).evaluation for concept in self.concepts), strict=True)
        said = self.read_prompts(graph.prompts) if graph.prompts else [pair.negative for some in pairs for pair in some]
        if not (prompts := [*dict.fromkeys(said)]):
            raise BadRecipe(f"expected prompts in {graph.prompts}, found none")
        first = self.seed * SEEDS + SEEDS // 2
        return [(prompt, first + k) for k, prompt in enumerate(islice(cycle(prompts), graph.contexts))]

    def read_splits(self, concept: PictureConcept) -> Splits:
        """The pairs of a concept in three parts, as many as the recipe says; no prompt is in two of them."""
        pairs = list(dict.fromkeys(self.read_pairs(concept)))
        if len(pairs) < LEAST:
            raise BadRecipe(f"{concept.name!r}: expected {LEAST} different pairs of prompts or more, got {len(pairs)}")
        n, total = len(pairs), sum(self._counts)
        first, second = (round(n * sum(self._counts[:k]) / total) for k in (1, 2))
        first = max(1, min(first, n - 2))
        second = max(first + 1, min(second, n - 1))
        parts, seed = [], self.seed * SEEDS
        for part, count in zip((pairs[:first], pairs[first:second], pairs[second:]), self._counts, strict=True):
            parts.append([PromptPair(*pair, seed + k) for k, pair in enumerate(islice(cycle(part), count))])
            seed += count
        return Splits(*parts)
