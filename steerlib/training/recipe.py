"""What determines a bank: the model, the data, the search. `Recipe.from_file` reads it from TOML, as one of three kinds.

    DirectionRecipe         concepts of a language model, each from contrast pairs or example sentences
    TextEncoderRecipe       sparse encoders of a language model, from a corpus of texts
    PipelineEncoderRecipe   sparse encoders of a diffusion model by noise level, from a corpus of prompts

`steerlib/training/pipeline.py` has the way from each of them to a bank.
"""

import hashlib
import json
import tomllib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from ..errors import BadRecipe
from ..evaluation.probing import LEAST
from ..evaluation.text import Scorer, Scoring, counting
from .entries import ConceptRecipe, GraphRecipe, Pair, SiteEncoder
from .fields import NAMES, check_file_name, check_names, check_types, is_blank, made_of
from .record.documents import parsed

RESERVED = ("answering",)
"""Names of gates that a bank of directions has beside its concepts."""
R = TypeVar("R", bound="Recipe")
C = TypeVar("C", bound="CorpusRecipe")
QUICK = 20_000
"""Tokens that a rough version records."""
COMMON = Path(str(files("steerlib.concept_banks"))) / "recipes" / "common"
"""Files that come with steerlib, for recipes that have none of the name."""


@dataclass(frozen=True, kw_only=True)
class Recipe(ABC):
    """What every kind of recipe has. `Recipe.from_file("recipe.toml")` gives the kind that the file describes.

    Paths are relative to the folder of the file. A file that is missing there is taken from those that come with steerlib.

    Args:
        name: Name of the bank.
        base: Id of the model, as the bank will record it.
        source: Where the weights are: a folder, a Hub id, or `package:<name>/<file>.gguf`.
        folder: The folder that paths are relative to.
        texts: Of a recipe that a bank carries, the contents of the files that it names, in place of a folder.
        description: For the card.
        license: Of the bank, as a Hub licence id.
        reference: A file of ordinary text, lines of `text`, from which units are measured.
        unrelated: A file of other ordinary text, on which side effects are measured.
        seed: Seed of all random choices.
        is_quick: Whether the recipe is a rough version of itself, made by `quick`.

    Example:
        >>> import steerlib as sl
        >>> recipe = sl.Recipe.from_file("concept_banks/recipes/fresh/recipe.toml")
        >>> [concept.name for concept in recipe.concepts]
        ['law', 'romance', 'archaic', 'fashion']
    """

    name: str
    base: str
    source: str
    folder: Path = field(default=Path(), repr=False)
    texts: Mapping[str, str] | None = field(default=None, repr=False)
    description: str = ""
    license: str = ""
    reference: str = "reference.jsonl"
    unrelated: str = "unrelated.jsonl"
    seed: int = 0
    is_quick: bool = False

    @classmethod
    def from_file(cls: type[R], path: str | Path, *, to_train: bool = True) -> R:
        """Read a recipe and check it.

        Args:
            path: A TOML file.
            to_train: Whether what only training reads (the corpus of encoders, contrast pairs) has to be there.

        Raises:
            BadRecipe: The file is missing or not TOML, has unknown fields, or describes what cannot work.
        """
        path = Path(path)
        if not path.is_file():
            raise BadRecipe(f"expected a recipe file, found none at {str(path)!r}; steerlib train --template writes one")
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise BadRecipe(f"{path.name} is not valid TOML: {error}") from None
        kind = kind_of(values, path.name)
        if not issubclass(kind, cls):
            raise BadRecipe(f"{path.name}: expected a {cls.__name__}, got a {kind.__name__}")
        recipe = replace(made_of(kind, values, path.name), folder=path.parent)
        recipe.check(to_train=to_train)
        return recipe

    @abstractmethod
    def check(self, *, to_train: bool = True) -> None:  # noqa: ARG002
        """Raise `BadRecipe` for what cannot work, before any model is loaded."""
        check_types(self, f"recipe {self.name!r}")
        check_file_name(self.name, "recipe's name")
        if missing := [name for name in ("base", "source") if not getattr(self, name).strip()]:
            raise BadRecipe(f"recipe {self.name!r}: expected {' and '.join(missing)}, got an empty text")

    @abstractmethod
    def quick(self: R) -> R:
        """A rough version of it, for about two minutes: fewer texts, sites and steps. The card says that it is rough."""

    @property
    def weights(self) -> str:
        """What is loaded: `source`, or the folder of that name beside the recipe."""
        beside = self.folder / self.source
        return str(beside) if beside.is_dir() and not Path(self.source).is_dir() else self.source

    def path(self, name: str) -> Path:
        """A file beside the recipe, or else the one of that name that comes with steerlib."""
        own = self.folder / name
        return COMMON / name if (COMMON / name).is_file() and not own.is_file() else own

    def bytes_of(self, name: str) -> bytes | None:
        """What is in a file that the recipe names, or in the one of that name that comes with steerlib, or None."""
        if self.texts is not None:
            if name in self.texts or Path(name).name != name:
                return self.texts[name].encode() if name in self.texts else None
            return replace(self, texts=None, folder=COMMON).bytes_of(name)
        return self.path(name).read_bytes() if self.path(name).is_file() else None

    def text_of(self, name: str) -> str | None:
        """The same as text."""
        try:
            return None if (found := self.bytes_of(name)) is None else found.decode()
        except UnicodeDecodeError as error:
            raise BadRecipe(f"{name} is not UTF-8: {error}") from None

    def read_lines(self, name: str, *keys: str) -> list[dict[str, Any]]:
        """The lines of a JSON lines file, each with a text under every one of `keys`."""
        if (text := self.text_of(name)) is None:
            raise BadRecipe(f"expected {name} beside the recipe, found none")
        found = []
        try:
            for number, line in enumerate(text.split("\n"), 1):
                if line.strip():
                    found.append((number, json.loads(line)))
        except ValueError as error:
            raise BadRecipe(f"{name} is not JSON lines: {error}") from None
        for number, line in found:
            if not isinstance(line, dict) or not all(isinstance(line.get(key), str) and line[key].strip() for key in keys):
                raise BadRecipe(f"{name}: expected lines with {', '.join(keys)}, got {line!r:.80} in line {number}")
        return [line for _, line in found]

    def read_texts(self, name: str) -> list[str]:
        """The texts of a file, such as `recipe.reference`."""
        return [line["text"] for line in self.read_lines(name, "text")]

    def read_labelled(self, name: str) -> tuple[list[str], list[str]]:
        """The texts of a file with label 1, and those with label 0."""
        lines = self.read_lines(name, "text")
        if strange := [line for line in lines if type(line.get("label")) is not int or line["label"] not in (0, 1)]:
            raise BadRecipe(f"{name}: expected labels 0 and 1, got {strange[0].get('label')!r} of {strange[0]['text']!r:.60}")
        positive, negative = ([line["text"] for line in lines if line["label"] == side] for side in (1, 0))
        if not (positive and negative):
            raise BadRecipe(f"{name}: expected labels 0 and 1, got {sorted({line['label'] for line in lines})}")
        return positive, negative

    @property
    def provenance(self) -> dict[str, Any]:
        """What a bank says of the recipe it was made from."""
        said = {"recipe": self.name, "recipe_sha256": self.digest, "seed": self.seed, "source": self.weights}
        return said | ({"quick": True} if self.is_quick else {})

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything the bank depends on: fields, those that only another kind has with their defaults, so that
        banks made before there were kinds keep their digest, and the contents of the files that they name."""
        every: dict[str, Any] = {f.name: f.default for kind in KINDS for f in fields(kind)}
        every |= {f.name: getattr(self, f.name) for f in fields(self)}
        sha = hashlib.sha256(repr({name: every[name] for name in DIGESTED}).encode())
        names = [every["reference"], every["prompts"], every["unrelated"], *every["corpus"], *every["attributes"]]
        names += [f"{every[folder]}/{c.name}.jsonl" for folder in ("pairs", "scoring") for c in every["concepts"]]
        for name in names:
            sha.update(name.encode() + (self.bytes_of(name) or b""))
        return sha.hexdigest() if not getattr(self, "is_brief", False) else hashlib.sha256(sha.digest()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class DirectionRecipe(Recipe):
    """Concepts of a language model, each a direction or a few: methods, sites and strengths are chosen by measured effect.

    Args:
        concepts: The concepts to make; in TOML `[[concepts]]`.
        pairs: Folder of `<concept>.jsonl`, lines of `prompt`, `positive`, `negative`, for concepts without example sentences.
        scoring: Folder of `<concept>.jsonl`, lines of `text` and `label`, from which the scorer learns. Default where there is
            no such file: it learns from the examples themselves, and the card says so.
        held_out: A file of lines of `text` and `concept`, on which the scorer is tested.
        prompts: A file of lines of `prompt` and `split`: `train` (to learn from), `dev` (to choose with) or `evaluation`.
        layers: Layers, or shares of the depth between 0 and 1, to try. Default: six over the first two thirds of the model.
        methods: Methods to try, of those in `steerlib/training/directions/methods`. All are compared at the
            middle site, and further sites by the best of them.
        budget: Answers that the search may generate for each concept. Where it does not reach everything, a warning says what
            is left out, and what budget would be enough.
        train_prompts: The number of prompts to learn from.
        dev_prompts: The number of prompts to choose with.
        evaluation_prompts: The number of prompts to report on.
        seeds: Answers to each prompt in the evaluation.
        new_tokens: Tokens of each answer.
        is_brief: Whether layers and methods are compared without writing answers, and measured without most controls.
        ship: `"all"` concepts, or only those `"clearing"` every bar; the card lists the others with their measurements.
    """

    concepts: tuple[ConceptRecipe, ...] = ()
    pairs: str = "pairs"
    scoring: str = "scoring"
    held_out: str = "held_out.jsonl"
    prompts: str = "prompts.jsonl"
    layers: tuple[float, ...] = ()
    methods: tuple[str, ...] = ("difference-of-means", "several-layers")
    budget: int = 400
    train_prompts: int = 24
    dev_prompts: int = 10
    evaluation_prompts: int = 10
    seeds: int = 3
    new_tokens: int = 32
    is_brief: bool = False
    ship: str = "all"

    def check(self, *, to_train: bool = True) -> None:
        super().check(to_train=to_train)
        check_names([concept.name for concept in self.concepts])
        if min(self.budget, *self._counts.values(), self.seeds, self.new_tokens) < 1:
            raise BadRecipe("expected a positive budget and positive numbers of prompts, seeds and new tokens")
        if self.ship not in ("all", "clearing"):
            raise BadRecipe(f"expected ship to be 'all' or 'clearing', got {self.ship!r}")
        wrong = [layer for layer in self.layers if layer < 0 or (isinstance(layer, float) and not 0 < layer < 1)]
        if wrong or len({*self.layers}) < len(self.layers):
            raise BadRecipe(
                f"expected layers from 0 up, or shares of the depth such as 0.4, each once, got {list(self.layers)}"
            )
        for concept in self.concepts:
            self._check_concept(concept, to_train)
        for name in (self.reference, self.unrelated):
            self.read_texts(name)
        for split, count in self._counts.items():
            if len(self.read_prompts(split)) < count:
                raise BadRecipe(f"{self.prompts} has {len(self.read_prompts(split))} {split} prompts, expected {count}")

    def quick(self) -> "DirectionRecipe":
        few = {"train_prompts": 8, "dev_prompts": 4, "evaluation_prompts": 4, "new_tokens": 16, "budget": 80, "seeds": 1}
        smaller = {name: min(count, getattr(self, name)) for name, count in few.items()}
        concepts = tuple(replace(concept, methods=concept.methods[:1]) for concept in self.concepts)
        return replace(self, **smaller, concepts=concepts, methods=self.methods[:1], layers=self.layers[:2], is_quick=True)

    def _check_concept(self, concept: ConceptRecipe, to_train: bool) -> None:
        check_file_name(concept.name, "concept's name")
        if concept.name in RESERVED:
            raise BadRecipe(f"{concept.name!r} is the name of a gate that every bank gets; take another one")
        if blank := [field for field in ("label", "instructions", "positive", "negative") if is_blank(getattr(concept, field))]:
            raise BadRecipe(f"{concept.name!r}: expected {' and '.join(blank)} without empty texts")
        if not (concept.methods or self.methods):
            raise BadRecipe(f"{concept.name!r}: expected a method or more to try, got none")
        if to_train and len(self.read_pairs(concept)) < 2:
            raise BadRecipe(f"{concept.name!r}: expected two contrast pairs or more")
        if concept.scorer is not None:
            counting(concept.scorer)
        else:
            self.read_scoring(concept)

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
        lines = self.read_lines(f"{self.pairs}/{concept.name}.jsonl", *Pair._fields)
        return [Pair(*(line[key] for key in Pair._fields)) for line in lines]

    def read_scoring(self, concept: ConceptRecipe) -> Scoring:
        """Texts with a concept and texts without it, for its scorer: those of its file, or else its examples."""
        name = f"{self.scoring}/{concept.name}.jsonl"
        if self.text_of(name) is not None:
            return Scoring(*self.read_labelled(name), others=True)
        pairs = self.read_pairs(concept)
        return Scoring([pair.positive for pair in pairs], [pair.negative for pair in pairs], others=False)

    @property
    def scorers(self) -> dict[str, Scoring | Scorer]:
        """By concept, what its scorer learns from, or a rule that counts: what `evaluation.text.judge_for` takes."""
        return {c.name: self.read_scoring(c) if c.scorer is None else counting(c.scorer) for c in self.concepts}

    def read_held_out(self) -> tuple[list[str], list[str]]:
        """Texts that the scorer never sees and the concept of each; none without such a file."""
        own, there = [concept.name for concept in self.concepts], self.text_of(self.held_out) is not None
        lines = self.read_lines(self.held_out, "text", "concept") if there else []
        lines = [line for line in lines if line["concept"] in own]
        return [line["text"] for line in lines], [line["concept"] for line in lines]

    def read_prompts(self, split: str) -> list[str]:
        """The prompts of a split: `train`, `dev` or `evaluation`, as many as the recipe says."""
        lines = self.read_lines(self.prompts, "prompt", "split")
        return [line["prompt"] for line in lines if line["split"] == split][: self._counts[split]]


@dataclass(frozen=True, kw_only=True)
class CorpusRecipe(Recipe, ABC):
    """What both kinds of recipes for sparse encoders have.

    Args:
        encoders: The encoders to train; in TOML `[[encoders]]`.
        corpus: Files of text that they are trained on, .txt or .jsonl; of prompts for a diffusion model.
        tokens: Tokens that are recorded at each site.
        epochs: How often encoders see them.
    """

    encoders: tuple[SiteEncoder, ...] = ()
    corpus: tuple[str, ...] = ()
    tokens: int = 1_000_000
    epochs: int = 1
    has_levels: ClassVar[bool]

    def check(self, *, to_train: bool = True) -> None:
        super().check(to_train=to_train)
        check_names([made.id for made in self.encoders])
        for made in self.encoders:
            made.check()
            if made.name:
                check_file_name(made.name, "encoder's name")
        if min(self.tokens, self.epochs) < 1 or not self.corpus:
            raise BadRecipe("expected a corpus for encoders, and positive numbers of tokens and epochs")
        if any((made.level is not None) is not self.has_levels for made in self.encoders):
            raise BadRecipe("expected a level for every encoder of a diffusion model, or for none of a language model")
        if to_train:
            self.corpus_files()

    def quick(self: C) -> C:
        encoders = tuple(made.quick() for made in self.encoders)
        return replace(self, encoders=encoders, tokens=min(self.tokens, QUICK), epochs=1, is_quick=True)

    @property
    def recorded_key(self) -> str:
        """Of what a recording reads: with another encoder of the same sites, nothing is recorded again."""
        read = (self.source, self.tokens, self.seed, self.encoder_sites, [made.level for made in self.encoders])
        sha = hashlib.sha256(repr(read).encode())
        for name in self.corpus:
            sha.update(self.bytes_of(name) or b"")
        return sha.hexdigest()[:16]

    def fitted_key(self, specs: Sequence[SiteEncoder]) -> str:
        """Of what the fit of some encoders reads beside the recording."""
        return hashlib.sha256(repr((self.epochs, self.seed, tuple(specs))).encode()).hexdigest()[:16]

    @property
    def encoder_sites(self) -> list[str]:
        """Every site that an encoder reads or writes, once."""
        return list(dict.fromkeys(site for made in self.encoders for site in (made.reads, made.site) if site))

    def read_corpus(self) -> list[Any]:
        """The documents of the corpus; none of a corpus that a bank does not carry."""
        there = {name: self.text_of(name) for name in self.corpus}
        return [document for name, text in there.items() if text is not None for document in parsed(text, name)]

    def corpus_files(self) -> list[Path]:
        """Where the text for encoders is."""
        paths = [self.path(name) for name in self.corpus]
        if missing := [path.name for path in paths if not path.is_file()]:
            raise BadRecipe(f"expected {', '.join(missing)} beside the recipe, found none")
        if other := [path.name for path in paths if path.suffix not in (".txt", ".jsonl")]:
            raise BadRecipe(f"expected a corpus of .txt or .jsonl files, got {', '.join(other)}")
        return paths


@dataclass(frozen=True, kw_only=True)
class TextEncoderRecipe(CorpusRecipe):
    """Sparse encoders of a language model, whose latents are labelled, verified and joined in a causal graph.

    Args:
        attributes: Files of lines of `text` and `label` (1: has the attribute), each named as the attribute, by which latents
            are selected and probed.
        graph: How to find and verify the causal graph of the encoders, which are of layers one after the other. Default: none.
    """

    attributes: tuple[str, ...] = ()
    graph: GraphRecipe | None = None
    has_levels: ClassVar[bool] = False

    def check(self, *, to_train: bool = True) -> None:
        super().check(to_train=to_train)
        if self.graph is not None:
            self.graph.check()
            if len(self.encoders) < 2:
                raise BadRecipe("expected encoders of two layers or more of a language model for a graph")
        for name, sides in self.read_attributes().items():
            if min(map(len, sides)) < LEAST:
                raise BadRecipe(
                    f"{name}: expected {LEAST} texts or more of each label, got {len(sides[0])} and {len(sides[1])}"
                )
        for name in (self.reference, self.unrelated):
            self.read_texts(name)

    def quick(self) -> "TextEncoderRecipe":
        return replace(super().quick(), graph=None)

    def read_attributes(self) -> dict[str, tuple[list[str], list[str]]]:
        """By attribute, texts that have it and texts that do not."""
        return {Path(name).stem: self.read_labelled(name) for name in self.attributes}


@dataclass(frozen=True, kw_only=True)
class PipelineEncoderRecipe(CorpusRecipe):
    """Sparse encoders of a diffusion model, each at a noise level: every encoder has a `level`, and the corpus is prompts."""

    has_levels: ClassVar[bool] = True

    @property
    def levels(self) -> list[int]:
        """Timesteps of the noise levels, the noisiest first."""
        return sorted({made.level for made in self.encoders if made.level is not None}, reverse=True)


KINDS: tuple[type[Recipe], ...] = (DirectionRecipe, TextEncoderRecipe, PipelineEncoderRecipe)
DIGESTED = (
    *("name", "base", "source", "concepts", "encoders", "corpus", "tokens", "epochs", "description", "license", "pairs"),
    *("scoring", "reference", "unrelated", "prompts", "layers", "methods", "budget", "train_prompts", "dev_prompts"),
    *("evaluation_prompts", "seeds", "new_tokens", "seed"),
)
"""Fields that the digest is of, in this order. The others change what is measured or shown, not what is made."""


def kind_of(values: Mapping[str, Any], where: str) -> type[Recipe]:
    """The kind that a file describes: of concepts, or of encoders, of which those of a diffusion model have levels."""
    concepts, encoders = values.get("concepts"), values.get("encoders")
    if bool(concepts) == bool(encoders):
        near = [key for key in values if get_close_matches(key, ("concepts", "encoders"), n=1)] if not concepts else []
        meant = f"; {near[0]!r} is none of these names" if near and near[0] not in ("concepts", "encoders") else ""
        raise BadRecipe(f"{where}: {NAMES}, as [[concepts]] or [[encoders]]{meant}")
    entries = encoders if isinstance(encoders, list) else [encoders]
    has_levels = any(isinstance(entry, Mapping) and "level" in entry for entry in entries)
    return DirectionRecipe if concepts else PipelineEncoderRecipe if has_levels else TextEncoderRecipe
