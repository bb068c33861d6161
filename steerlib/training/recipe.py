"""What determines a bank: the model, the data, the search. Read from TOML; the strings under fields are its manual."""

import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import BadRecipe
from ..evaluation.probing import LEAST
from ..evaluation.text import counting
from .fit.encoder_recipe import EncoderRecipe, transcoding

TEMPLATES = ("Answer in this way: {}.", "Your whole answer has to show this: {}.", "Let your answer be full of it: {}.")
"""How a prompt asks for a concept of which only the label is known."""


class Pair(NamedTuple):
    """Two answers to one prompt, with and without the concept."""

    prompt: str
    positive: str
    negative: str


@dataclass(frozen=True, kw_only=True)
class ConceptRecipe:
    """One concept to make."""

    name: str
    label: str
    """What it means, for the card."""
    instructions: tuple[str, ...] = ()
    """How prompts would ask for it: what steering is compared with, and learned methods imitate. Default: from the label."""
    positive: tuple[str, ...] = ()
    """Example sentences that show it, ten or so; or else contrast pairs in a file."""
    negative: tuple[str, ...] = ()
    """As many that do not."""
    methods: tuple[str, ...] = ()
    """Methods to try for it, in place of the recipe's."""
    scorer: Mapping[str, Any] | None = None
    """`{count = "words"}`, or `{pattern = "...", per = "word" | "sentence"}`, where a classifier of texts would not do."""

    @property
    def asked(self) -> tuple[str, ...]:
        """The instructions, or some made from the label."""
        return self.instructions or tuple(template.format(self.label) for template in TEMPLATES)


@dataclass(frozen=True, kw_only=True)
class SiteEncoder:
    """One sparse encoder to make: in TOML, its site and the fields of `EncoderRecipe` side by side."""

    site: str
    recipe: EncoderRecipe
    level: int | None = None
    """Of a diffusion model: the timestep at whose noise it reads, and around which its latents are moved."""
    name: str = ""
    """Tells encoders of one site apart."""
    reads: str = ""
    """Where latents are read if not where they are moved: at an earlier site. It makes the encoder a transcoder."""
    seeds: int = 1
    """From how many seeds it is trained; those after the first only tell how much of it every seed finds, and are not kept."""
    verify: int = 100
    """Latents that are moved to see whether what follows them in text becomes likelier: those of which that tells most."""

    @property
    def id(self) -> str:
        """What the bank calls it."""
        level = "" if self.level is None else f"@{self.level}"
        return f"{self.site}{level}#{self.name}" if self.name else f"{self.site}{level}"

    def check(self) -> None:
        """Raise `BadRecipe` for what cannot work."""
        self.recipe.check()
        if self.seeds < 1 or self.verify < 0:
            raise BadRecipe(
                f"{self.id!r}: expected seeds of 1 or more and verify of 0 or more, got {self.seeds}, {self.verify}"
            )
        if self.level is not None and (self.level < 0 or self.reads):
            raise BadRecipe(f"{self.id!r}: expected a timestep from 0 up, and no reads beside it, got {self.level}")
        if self.reads and not self.recipe.objective.transcodes:
            raise BadRecipe(f"{self.id!r}: expected a transcoder of {transcoding()}, got {self.recipe.kind!r}")
        if self.recipe.skip and not self.reads:
            raise BadRecipe(f"{self.id!r}: expected a site that it reads beside skip; name it by reads, or leave skip out")

    @property
    def runs(self) -> dict[str, EncoderRecipe]:
        """What is trained: itself, and as `id seed 1`, … its twins."""
        twins = {f"{self.id} seed {n}": replace(self.recipe, seed=self.recipe.seed + n) for n in range(1, self.seeds)}
        return {self.id: self.recipe, **twins}

    @classmethod
    def of(cls, values: Mapping[str, Any], where: str) -> "SiteEncoder":
        """From an entry of a recipe file."""
        own = {f.name: values[f.name] for f in fields(cls) if f.name != "recipe" and f.name in values}
        rest = {key: value for key, value in values.items() if key not in own}
        return _made(cls, {**own, "recipe": _made(EncoderRecipe, rest, where)}, where)


@dataclass(frozen=True, kw_only=True)
class GraphRecipe:
    """How the causal graph of text latents is found, from beginnings of the corpus' documents."""

    contexts: int = 3600
    """Documents: half are ablated at random and fitted, a third verify, the rest is for forecasts."""
    length: int = 32
    """Tokens of each."""
    parents: int = 400
    """Latents that are ablated alone, those first of which the bank says most."""
    controls: int = 40
    """As many of a model with random weights."""
    seed: int = 0

    @property
    def first(self) -> int:
        """Contexts that are fitted."""
        return self.contexts // 2

    @property
    def second(self) -> int:
        """Contexts that verify."""
        return self.contexts // 3

    @property
    def held_out(self) -> float:
        """Their share of those that are not kept for forecasts."""
        return self.second / (self.first + self.second)

    def check(self) -> None:
        """Raise `BadRecipe` for what cannot work."""
        if self.contexts < 120 or self.length < 2 or min(self.parents, self.controls) < 1:
            raise BadRecipe("expected a graph of 120 contexts of two tokens or more, and positive numbers of parents, controls")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A frozen description of a bank. Paths are relative to the recipe's folder; what is missing there comes with steerlib."""

    name: str
    base: str
    """Id of the model, as the bank will record it."""
    source: str
    """Where the weights are: a folder, a Hub id, or `package:<name>/<file>.gguf`."""
    concepts: tuple[ConceptRecipe, ...] = ()
    encoders: tuple[SiteEncoder, ...] = ()
    """Sparse encoders to train instead of concepts, from `corpus`."""
    corpus: tuple[str, ...] = ()
    """Files of text, .txt or .jsonl, that encoders are trained on."""
    tokens: int = 1_000_000
    """Tokens of it that are recorded."""
    epochs: int = 1
    """Times that encoders see them."""
    attributes: tuple[str, ...] = ()
    """Files of text and label (1: has it), each named as what the texts have, by which latents are selected and probed."""
    graph: GraphRecipe | None = None
    """Find and verify the causal graph of the encoders, which are of layers one after the other."""
    folder: Path = field(default=Path(), repr=False)
    description: str = ""
    license: str = ""
    pairs: str = "pairs"
    """Folder of `<concept>.jsonl`, lines of prompt, positive, negative."""
    scoring: str = "scoring"
    """Folder of `<concept>.jsonl`, lines of text and label, for the scorer; without it the scorer learns from the examples."""
    held_out: str = "held_out.jsonl"
    """Lines of text and concept, on which the scorer itself is tested."""
    reference: str = "reference.jsonl"
    """Ordinary text, from which units are measured."""
    unrelated: str = "unrelated.jsonl"
    """Other ordinary text, on which side effects are measured."""
    prompts: str = "prompts.jsonl"
    """Lines of prompt and split: `train` to learn from, `dev` to choose with, `evaluation` to report on."""
    layers: tuple[int, ...] = ()
    """Layers to try; empty: six spread over the first two thirds of the model."""
    methods: tuple[str, ...] = ("difference-of-means", "several-layers")
    """Methods to try, of those in `steerlib/training/methods`; sites are compared by the first."""
    budget: int = 400
    """Answers that the search may have written for each concept."""
    train_prompts: int = 24
    dev_prompts: int = 10
    evaluation_prompts: int = 10
    seeds: int = 3
    """Answers to each prompt in the evaluation."""
    new_tokens: int = 32
    seed: int = 0
    ship: str = "all"
    """`all` concepts, or only those `clearing` every bar; the card lists the others with what was measured."""

    @classmethod
    def from_file(cls, path: str | Path, *, to_train: bool = True) -> "Recipe":
        """Read a recipe, and refuse what it does not know. Where nothing is to be trained the corpus may be missing."""
        path = Path(path)
        if not path.is_file():
            raise BadRecipe(f"expected a recipe file, found none at {path.name!r}")
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise BadRecipe(f"{path.name} is not valid TOML: {error}") from None
        concepts = tuple(_made(ConceptRecipe, entry, f"{path.name}, concepts") for entry in values.pop("concepts", []))
        encoders = tuple(SiteEncoder.of(entry, f"{path.name}, encoders") for entry in values.pop("encoders", []))
        if "graph" in values:
            values["graph"] = _made(GraphRecipe, values["graph"], f"{path.name}, graph")
        recipe = _made(cls, {**values, "concepts": concepts, "encoders": encoders, "folder": path.parent}, path.name)
        recipe.check(to_train=to_train)
        return recipe

    def check(self, *, to_train: bool = True) -> None:
        """Raise `BadRecipe` for what cannot work, before any model is loaded."""
        named = [made.name for made in self.concepts] + [made.id for made in self.encoders]
        if bool(self.concepts) == bool(self.encoders) or len({*named}) < len(named):
            raise BadRecipe("expected at least one concept, or instead at least one encoder, each name once")
        if self.encoders:
            self._check_encoders()
        if self.encoders and to_train:
            self.corpus_files()
        if min(self.budget, self.train_prompts, self.dev_prompts, self.evaluation_prompts, self.seeds, self.new_tokens) < 1:
            raise BadRecipe("expected a positive budget and positive numbers of prompts, seeds and new tokens")
        if self.ship not in ("all", "clearing"):
            raise BadRecipe(f"expected ship to be 'all' or 'clearing', got {self.ship!r}")
        for concept in self.concepts:
            if not (concept.methods or self.methods):
                raise BadRecipe(f"{concept.name!r}: expected a method or more to try, got none")
            if len(self.read_pairs(concept)) < 2:
                raise BadRecipe(f"{concept.name!r}: expected two contrast pairs or more")
            if concept.scorer is not None:
                counting(concept.scorer)
        for name in (self.reference, self.unrelated):
            self.read_texts(name)
        for split, count in self._counts.items():
            if len(self.read_prompts(split)) < count:
                raise BadRecipe(f"{self.prompts} has {len(self.read_prompts(split))} {split} prompts, expected {count}")

    def _check_encoders(self) -> None:
        for made in self.encoders:
            made.check()
        if min(self.tokens, self.epochs) < 1 or not self.corpus:
            raise BadRecipe("expected a corpus for encoders, and positive numbers of tokens and epochs")
        if self.has_levels and not all(made.level is not None for made in self.encoders):
            raise BadRecipe("expected a level for every encoder of a diffusion model, or for none of a language model")
        if self.graph is not None:
            self.graph.check()
            if self.has_levels or len(self.encoders) < 2:
                raise BadRecipe("expected encoders of two layers or more of a language model for a graph")
        for name, sides in self.read_attributes().items():
            if min(map(len, sides)) < LEAST:
                raise BadRecipe(
                    f"{name}: expected {LEAST} texts or more of each label, got {len(sides[0])} and {len(sides[1])}"
                )

    @property
    def has_levels(self) -> bool:
        """Whether it is for a diffusion model."""
        return any(made.level is not None for made in self.encoders)

    @property
    def encoder_sites(self) -> list[str]:
        """Every site that an encoder reads or writes, once."""
        return list(dict.fromkeys(site for made in self.encoders for site in (made.reads, made.site) if site))

    def corpus_files(self) -> list[Path]:
        """Where the text for encoders is."""
        paths = [self._path(name) for name in self.corpus]
        if missing := [path.name for path in paths if not path.is_file()]:
            raise BadRecipe(f"expected {', '.join(missing)} beside the recipe, found none")
        return paths

    @property
    def _counts(self) -> dict[str, int]:
        return {"train": self.train_prompts, "dev": self.dev_prompts, "evaluation": self.evaluation_prompts}

    def read_pairs(self, concept: ConceptRecipe) -> list[Pair]:
        """The contrast pairs of a concept: its example sentences behind ordinary prompts, or the lines of its file."""
        if concept.positive or concept.negative:
            if len(concept.positive) != len(concept.negative):
                raise BadRecipe(
                    f"{concept.name!r}: expected as many negative examples as positive ones, got {len(concept.negative)} and "
                    f"{len(concept.positive)}"
                )
            prompts = self.read_prompts("train")
            texts = zip(concept.positive, concept.negative, strict=True)
            return [Pair(prompts[i % len(prompts)], *both) for i, both in enumerate(texts)]
        return [Pair(*_fields(line, Pair._fields, self.pairs)) for line in self._lines(f"{self.pairs}/{concept.name}.jsonl")]

    def read_scoring(self, concept: ConceptRecipe) -> tuple[list[str], list[str], bool]:
        """Texts with the concept and texts without it for the scorer, and whether they are others than the examples."""
        name = f"{self.scoring}/{concept.name}.jsonl"
        if not self._path(name).is_file():
            pairs = self.read_pairs(concept)
            return [pair.positive for pair in pairs], [pair.negative for pair in pairs], False
        return *self._labelled(name), True

    def read_attributes(self) -> dict[str, tuple[list[str], list[str]]]:
        """By attribute, texts that have it and texts that do not."""
        return {Path(name).stem: self._labelled(name) for name in self.attributes}

    def _labelled(self, name: str) -> tuple[list[str], list[str]]:
        lines = self._lines(name)
        texts = [_fields(line, ("text",), name)[0] for line in lines]
        labels = [int(line.get("label", -1)) for line in lines]
        if set(labels) != {0, 1}:
            raise BadRecipe(f"{name}: expected labels 0 and 1, got {sorted(set(labels))}")
        positive, negative = ([t for t, label in zip(texts, labels, strict=True) if label == side] for side in (1, 0))
        return positive, negative

    def read_held_out(self) -> tuple[list[str], list[str]]:
        """Texts that the scorer never sees and their concepts; none where the recipe has no such file."""
        if not self._path(self.held_out).is_file():
            return [], []
        lines = [_fields(line, ("text", "concept"), self.held_out) for line in self._lines(self.held_out)]
        return [text for text, _ in lines], [concept for _, concept in lines]

    def read_prompts(self, split: str) -> list[str]:
        """The prompts of a split, as many as are asked for."""
        lines = [_fields(line, ("prompt", "split"), self.prompts) for line in self._lines(self.prompts)]
        return [prompt for prompt, which in lines if which == split][: self._counts[split]]

    def read_texts(self, name: str) -> list[str]:
        """The texts of a file: `recipe.reference` or `recipe.unrelated`."""
        return [_fields(line, ("text",), name)[0] for line in self._lines(name)]

    def _path(self, name: str) -> Path:
        """A file beside the recipe, or the one of that name that comes with steerlib."""
        own, common = self.folder / name, Path(str(files("steerlib.concept_banks"))) / "recipes" / "common" / name
        return common if common.is_file() and not own.is_file() else own

    def _lines(self, name: str) -> list[Any]:
        path = self._path(name)
        if not path.is_file():
            raise BadRecipe(f"expected {name} beside the recipe, found none")
        try:
            return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except ValueError as error:
            raise BadRecipe(f"{name} is not JSON lines: {error}") from None

    @cached_property
    def digest(self) -> str:
        """Changes with anything the result depends on."""
        apart = ("folder", "ship", "held_out", "attributes", "graph")
        sha = hashlib.sha256(repr({f.name: getattr(self, f.name) for f in fields(self) if f.name not in apart}).encode())
        names = [self.reference, self.prompts, self.unrelated, *self.corpus, *self.attributes]
        names += [f"{folder}/{concept.name}.jsonl" for folder in (self.pairs, self.scoring) for concept in self.concepts]
        for name in names:
            path = self._path(name)
            sha.update(name.encode() + (path.read_bytes() if path.is_file() else b""))
        return sha.hexdigest()


def _made(cls: Any, values: Mapping[str, Any], where: str) -> Any:
    known = {f.name for f in fields(cls)}
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    if unknown := sorted(set(values) - known):
        raise BadRecipe(f"{where}: unknown fields {', '.join(unknown)}; known are {', '.join(sorted(known - {'folder'}))}")
    try:
        return cls(**values)
    except TypeError as error:
        raise BadRecipe(f"{where}: {error}") from None


def _fields(line: Any, names: tuple[str, ...], where: str) -> list[str]:
    if not isinstance(line, dict) or not all(isinstance(line.get(name), str) for name in names):
        raise BadRecipe(f"{where}: expected lines with {', '.join(names)}, got {line!r:.80}")
    return [line[name] for name in names]
