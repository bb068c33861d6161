"""The entries of a recipe: a concept with its contrast pairs, an encoder at a site, a graph."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import cycle, islice
from typing import Any, NamedTuple

from ..errors import BadRecipe
from .fields import check_known, made_of
from .fit.encoder_recipe import EncoderRecipe, transcoding

TEMPLATES = ("Answer in this way: {}.", "Your whole answer has to show this: {}.", "Let your answer be full of it: {}.")
"""How a prompt asks for a concept of which only the label is known."""


class Pair(NamedTuple):
    """Two answers to one prompt, with and without the concept."""

    prompt: str
    positive: str
    negative: str


Answer = tuple[Any, str]
"""An answer behind its prompt: a message of the user, or the messages of a chat."""


def is_prompt(given: Any) -> bool:
    """Whether something is a message of the user, or the messages of a chat."""
    if isinstance(given, str):
        return bool(given.strip())
    messages = given if isinstance(given, list) else []
    parts = [one.get(part) if isinstance(one, Mapping) else None for one in messages for part in ("role", "content")]
    return bool(parts) and all(isinstance(part, str) for part in parts)


class Shown(NamedTuple):
    """Answers with a concept and answers without it, of any numbers: each class counts as a whole."""

    positive: Sequence[Answer]
    negative: Sequence[Answer]


@dataclass(frozen=True, kw_only=True)
class ConceptRecipe:
    """One concept to make.

    Args:
        name: What edits call it.
        label: What it means, for the card.
        instructions: How prompts would ask for it: what steering is compared with and what learned methods imitate. Default:
            made from the label.
        positive: Ten or so example sentences that show it. Without them, contrast pairs are read from a file.
        negative: Sentences that do not show it, about as many.
        methods: Methods to try for it, in place of the recipe's.
        scorer: `{count = "words"}`, or `{pattern = "...", per = "word"}` (or `per = "sentence"`), where counting measures the
            concept better than a classifier of texts; `{near = "a name"}` compares sentence embeddings with that of the name,
            and needs no texts to learn from; `{endpoint = "http://localhost:8000/v1", model = "m"}` asks an `sl.Endpoint`, of
            which `rubric`, `cache` and `key` may be given. Default: the classifier.
    """

    name: str
    label: str
    instructions: tuple[str, ...] = ()
    positive: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    scorer: Mapping[str, Any] | None = None

    @property
    def asked(self) -> tuple[str, ...]:
        """The instructions, or some made from the label."""
        return self.instructions or tuple(template.format(self.label) for template in TEMPLATES)


@dataclass(frozen=True, kw_only=True)
class PictureConcept:
    """One concept of pictures to make.

    Args:
        name: What edits call it, and what the recipe's template says of it.
        label: What it means, for the card. Default: the name.
        positive: Prompts that show it, or, of a pipeline of classes, their names or numbers. Without them pairs are read from a
            file, or made by the template.
        negative: As many prompts that do not, each like its partner but for the concept.
    """

    name: str
    label: str = ""
    positive: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SiteEncoder:
    """One sparse encoder to make. In TOML its fields stand beside those of its `EncoderRecipe`.

    Args:
        site: The site whose activations its latents write, such as `layers.15`.
        recipe: How it is trained.
        level: Of a diffusion model: the timestep at whose noise it is trained, and around which its latents are moved.
        name: Tells encoders of one site apart.
        reads: The site whose activations it reads, if that is another, earlier one. This makes it a transcoder.
        seeds: The number of seeds it is trained from. Only the first encoder is kept; the others measure how much of it every
            seed finds.
        verify: The number of latents to verify by moving them: those whose following tokens are the most telling ones.
        epochs: Of a diffusion model: how often it sees its activations. Default: as often as the recipe says. More is needed at
            `site.mean`, where a picture is one token.
    """

    site: str
    recipe: EncoderRecipe
    level: int | None = None
    name: str = ""
    reads: str = ""
    seeds: int = 1
    verify: int = 100
    epochs: int | None = None

    @property
    def id(self) -> str:
        """Its name in the bank: `site[@level][#name]`."""
        level = "" if self.level is None else f"@{self.level}"
        return f"{self.site}{level}#{self.name}" if self.name else f"{self.site}{level}"

    def check(self) -> None:
        """Raise `BadRecipe` for what cannot work."""
        self.recipe.check()
        if self.seeds < 1 or self.verify < 0:
            raise BadRecipe(
                f"{self.id!r}: expected seeds of 1 or more and verify of 0 or more, got {self.seeds}, {self.verify}"
            )
        if self.epochs is not None and (self.epochs < 1 or self.level is None):
            raise BadRecipe(f"{self.id!r}: expected epochs of 1 or more, and a level, got {self.epochs} and {self.level}")
        if self.level is not None and (self.level < 0 or self.reads):
            raise BadRecipe(f"{self.id!r}: expected a timestep from 0 up, and no reads beside it, got {self.level}")
        if self.reads and not self.recipe.objective.transcodes:
            raise BadRecipe(f"{self.id!r}: expected a transcoder of {transcoding()}, got {self.recipe.kind!r}")
        if self.recipe.skip and not self.reads:
            raise BadRecipe(f"{self.id!r}: expected a site that it reads beside skip; name it by reads, or leave skip out")

    def quick(self) -> "SiteEncoder":
        """A rough version of it: fewer latents, one seed, small batches."""
        small = replace(self.recipe, latents=min(self.recipe.latents, 512), k=min(self.recipe.k, 32), groups=())
        return replace(self, recipe=replace(small, batch=min(self.recipe.batch, 512)), seeds=1, verify=min(self.verify, 10))

    @property
    def runs(self) -> dict[str, EncoderRecipe]:
        """What is trained: the encoder itself, and its twins of other seeds as `id seed 1`, …"""
        twins = {f"{self.id} seed {n}": replace(self.recipe, seed=self.recipe.seed + n) for n in range(1, self.seeds)}
        return {self.id: self.recipe, **twins}

    @classmethod
    def from_dict(cls, values: Any, where: str) -> "SiteEncoder":
        """From an entry of a recipe file; `where` names it in errors."""
        own, others = ({f.name for f in fields(kind)} - {"recipe"} for kind in (cls, EncoderRecipe))
        if isinstance(values, Mapping):
            check_known(values, own | others, cls.__name__, where)
            rest = {key: value for key, value in values.items() if key not in own}
            values = {key: values[key] for key in own & {*values}} | {"recipe": made_of(EncoderRecipe, rest, where)}
        return made_of(cls, values, where)


@dataclass(frozen=True, kw_only=True)
class GraphRecipe:
    """How the causal graph of text latents is found, from the beginnings of the documents of the corpus, or of `environments`.

    Args:
        contexts: The number of documents. Half are ablated at random and fitted, a third verify, a sixth measures forecasts.
        length: Tokens of each.
        parents: The number of latents that are ablated alone, starting with those of which the bank says most.
        controls: The same number for a model with random weights.
        environments: Files of texts, in place of the corpus: as many documents of each, in turn. Edges that are there in all of
            them, with effects that do not differ, are marked (`Edge.everywhere`).
        seed: Seed of all random choices.
    """

    contexts: int = 3600
    length: int = 32
    parents: int = 400
    controls: int = 40
    environments: tuple[str, ...] = ()
    seed: int = 0

    @property
    def labels(self) -> list[str] | None:
        """The environment of each context."""
        return [*islice(cycle(self.environments), self.contexts)] if self.environments else None

    @property
    def first(self) -> int:
        """The number of contexts that are fitted."""
        return self.contexts // 2

    @property
    def second(self) -> int:
        """The number of contexts that verify."""
        return self.contexts // 3

    @property
    def held_out(self) -> float:
        """Share of verifying contexts among those that are fitted or verify."""
        return self.second / (self.first + self.second)

    def check(self) -> None:
        """Raise `BadRecipe` for what cannot work."""
        if self.contexts < 120 or self.length < 2 or min(self.parents, self.controls) < 1:
            raise BadRecipe("expected a graph of 120 contexts of two tokens or more, and positive numbers of parents, controls")
        if self.environments and len({*self.environments}) < max(2, len(self.environments)):
            raise BadRecipe(f"expected two environments or more, each once, got {', '.join(self.environments)}")


@dataclass(frozen=True, kw_only=True)
class ConceptGraphRecipe:
    """How the causal graph of concepts of a diffusion model is found: each is moved alone by its useful amount.

    Args:
        contexts: Pictures that each is moved in; a quarter of them measures forecasts.
        prompts: A file of prompts of these pictures, one a line, that leave much unsaid, so that it can follow from what is
            moved. Default: the negative prompts that the recipe's concepts are measured on.
        pairs: Pairs of each concept, at most, of those that it is found by, chosen with and measured on: from their pictures
            it is learned what shows it, from where on, and how well that can be told.
        controls: The number of concepts in whose place random directions are moved.
        seed: Seed of all random choices.
    """

    contexts: int = 64
    prompts: str = ""
    pairs: int = 24
    controls: int = 4
    seed: int = 0

    def check(self) -> None:
        """Raise `BadRecipe` for what cannot work."""
        if self.contexts < 8 or min(self.pairs, self.controls) < 1:
            raise BadRecipe("expected a graph of 8 contexts or more, and positive numbers of pairs and controls")


@dataclass(frozen=True, kw_only=True)
class LatentGraphRecipe:
    """How the graph of a diffusion model's latents is found: which are parts of which, from readings of pictures of the
    corpus' prompts, and whether moving a whole moves its parts later on.

    Args:
        contexts: Pictures. Edges come from the readings of the first two thirds; the others verify them.
        parents: The number of latents of each level that are moved alone, starting with those that go best with a word.
        seed: Seed of all random choices.
    """

    contexts: int = 1200
    parents: int = 40
    seed: int = 0

    @property
    def first(self) -> int:
        """The number of contexts that are read."""
        return self.contexts * 2 // 3

    def check(self) -> None:
        """Raise `BadRecipe` for what cannot work."""
        if self.contexts < 120 or self.parents < 1:
            raise BadRecipe("expected a graph of 120 contexts or more, and a positive number of parents")
