"""What determines a bank: the model, the data, the search. `Recipe.from_file` reads it from TOML, as one of five kinds.

    DirectionRecipe         concepts of a language model, each from contrast pairs or example sentences
    PictureRecipe           concepts of a diffusion model, each from pairs of prompts
    TextEncoderRecipe       sparse encoders of a language model, from a corpus of texts
    PipelineEncoderRecipe   sparse encoders of a diffusion model by noise level, from a corpus of prompts
    ContextRecipe           concepts of either that are switched, from prompts sorted by what was intervened on

`steerlib/training/pipeline.py` has the way from each of them to a bank.
"""

import hashlib
from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from ..errors import BadRecipe
from ..evaluation.probing import LEAST
from ..evaluation.text import Asked, Scorer, Scoring, counting
from .context_recipe import ContextRecipe as ContextRecipe
from .entries import ConceptRecipe, GraphRecipe, LatentGraphRecipe, Shown, SiteEncoder, is_prompt
from .fields import check_file_name, check_names, is_blank
from .picture_recipe import PictureRecipe as PictureRecipe
from .recipe_base import COMMON as COMMON
from .recipe_base import KINDS as KINDS
from .recipe_base import Recipe as Recipe
from .recipe_base import kind_of as kind_of
from .record.documents import parsed

RESERVED = ("answering",)
"""Names of gates that a bank of directions has beside its concepts."""
C = TypeVar("C", bound="CorpusRecipe")
QUICK = 20_000
"""Tokens that a rough version records."""


@dataclass(frozen=True, kw_only=True)
class DirectionRecipe(Recipe):
    """Concepts of a language model, each a direction or a few: methods, sites and strengths are chosen by measured effect.

    Args:
        concepts: The concepts to make; in TOML `[[concepts]]`.
        pairs: Folder of `<concept>.jsonl`, for concepts without example sentences: lines of `prompt`, a text or the messages of
            a chat, with `positive` or `negative` or both.
        scoring: Folder of `<concept>.jsonl`, lines of `text` and `label`, from which the scorer learns. Default where there is
            no such file: it learns from the examples themselves, and the card says so.
        held_out: A file of lines of `text` and `concept`, on which the scorer is tested.
        prompts: A file of lines of `prompt` and `split`: `train` (to learn from), `dev` (to choose with) or `evaluation`.
        layers: Layers, shares of the depth between 0 and 1, or names of sites such as `layers.12.attn`, to try. Default: six
            layers over the first two thirds of the model.
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
        answers: The number of prompts to learn from on which each concept is moved alone, to see what else answers show: edges
            from concepts to answers, by which `do="spare"` plans. 0: no such graph.
    """

    concepts: tuple[ConceptRecipe, ...] = ()
    pairs: str = "pairs"
    scoring: str = "scoring"
    held_out: str = "held_out.jsonl"
    prompts: str = "prompts.jsonl"
    layers: tuple[float | str, ...] = ()
    methods: tuple[str, ...] = ("difference-of-means", "several-layers")
    budget: int = 400
    train_prompts: int = 24
    dev_prompts: int = 10
    evaluation_prompts: int = 10
    seeds: int = 3
    new_tokens: int = 32
    is_brief: bool = False
    ship: str = "all"
    answers: int = 0

    @classmethod
    def describes(cls, values: Mapping[str, Any], folder: Path) -> bool:
        return bool(values.get("concepts")) and not PictureRecipe.describes(values, folder)

    def check(self, *, to_train: bool = True) -> None:
        super().check(to_train=to_train)
        check_names([concept.name for concept in self.concepts])
        if min(self.budget, *self._counts.values(), self.seeds, self.new_tokens) < 1:
            raise BadRecipe("expected a positive budget and positive numbers of prompts, seeds and new tokens")
        if self.ship not in ("all", "clearing"):
            raise BadRecipe(f"expected ship to be 'all' or 'clearing', got {self.ship!r}")
        if not 0 <= self.answers <= self.train_prompts:
            raise BadRecipe(f"expected answers from 0 to train_prompts = {self.train_prompts}, got {self.answers}")
        given = [layer for layer in self.layers if not isinstance(layer, str)]
        wrong = [layer for layer in given if layer < 0 or (isinstance(layer, float) and not 0 < layer < 1)]
        if wrong or len({*self.layers}) < len(self.layers):
            raise BadRecipe(
                f"expected layers from 0 up, shares of the depth such as 0.4, or sites, each once, got {list(self.layers)}"
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
        few["answers"] = 0
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
        if to_train and min(map(len, self.read_shown(concept))) < 2:
            raise BadRecipe(f"{concept.name!r}: expected two texts or more with it, and two without")
        if concept.scorer is not None:
            counting(concept.scorer)
        else:
            self.read_scoring(concept)

    @property
    def _counts(self) -> dict[str, int]:
        return {"train": self.train_prompts, "dev": self.dev_prompts, "evaluation": self.evaluation_prompts}

    def read_shown(self, concept: ConceptRecipe) -> Shown:
        """Answers with a concept and answers without it: its example sentences behind ordinary prompts, or its file."""
        if concept.positive or concept.negative:
            prompts = self.read_prompts("train")
            sides = concept.positive, concept.negative
            return Shown(*([(prompts[i % len(prompts)], text) for i, text in enumerate(texts)] for texts in sides))
        name = f"{self.pairs}/{concept.name}.jsonl"
        lines = self.read_lines(name)
        for number, line in enumerate(lines, 1):
            said = [line[side] for side in Shown._fields if side in line]
            if (
                not is_prompt(line.get("prompt"))
                or not said
                or not all(isinstance(text, str) and text.strip() for text in said)
            ):
                raise BadRecipe(f"{name}: expected lines with prompt, positive, negative, got {line!r:.80} in line {number}")
        return Shown(*([(line["prompt"], line[side]) for line in lines if side in line] for side in Shown._fields))

    def read_scoring(self, concept: ConceptRecipe) -> Scoring:
        """Texts with a concept and texts without it, for its scorer: those of its file, or else its examples."""
        name = f"{self.scoring}/{concept.name}.jsonl"
        if self.text_of(name) is not None:
            return Scoring(*self.read_labelled(name), others=True)
        positive, negative = ([text for _, text in side] for side in self.read_shown(concept))
        return Scoring(positive, negative, others=False)

    @property
    def scorers(self) -> dict[str, Scoring | Scorer | Asked]:
        """By concept, what its scorer learns from, or a rule that counts: what `evaluation.text.judge_for` takes."""
        return {c.name: self.read_scoring(c) if c.scorer is None else counting(c.scorer, c.label) for c in self.concepts}

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
        read += tuple(self.encoder_places) if self.has_levels else ()
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

    @property
    def encoder_places(self) -> list[str]:
        """Every `site@level` of an encoder, once."""
        return sorted({made.id.partition("#")[0] for made in self.encoders})

    def read_corpus(self) -> list[Any]:
        """The documents of the corpus; none of a corpus that a bank does not carry."""
        there = {name: self.text_of(name) for name in self.corpus}
        return [document for name, text in there.items() if text is not None for document in parsed(text, name)]

    def corpus_files(self, names: Sequence[str] = ()) -> list[Path]:
        """Where the text for encoders is, or other text by the names of its files."""
        paths = [self.path(name) for name in names or self.corpus]
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

    @classmethod
    def describes(cls, values: Mapping[str, Any], folder: Path) -> bool:
        return bool(values.get("encoders")) and not PipelineEncoderRecipe.describes(values, folder)

    def check(self, *, to_train: bool = True) -> None:
        super().check(to_train=to_train)
        if self.graph is not None:
            self.graph.check()
            if len(self.encoders) < 2:
                raise BadRecipe("expected encoders of two layers or more of a language model for a graph")
            if to_train:
                self.corpus_files(self.graph.environments)
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
    """Sparse encoders of a diffusion model, each at a noise level: every encoder has a `level`, and the corpus is prompts.

    Args:
        graph: How to find the graph of the encoders, which are then one for each noise level. Default: none.
    """

    graph: LatentGraphRecipe | None = None
    has_levels: ClassVar[bool] = True

    @classmethod
    def describes(cls, values: Mapping[str, Any], folder: Path) -> bool:  # noqa: ARG003
        entries = values.get("encoders")
        given = entries if isinstance(entries, list) else [entries]
        return any(isinstance(entry, Mapping) and "level" in entry for entry in given)

    def check(self, *, to_train: bool = True) -> None:
        super().check(to_train=to_train)
        if self.graph is not None:
            self.graph.check()
            if not 2 <= len(self.encoders) == len(self.levels):
                raise BadRecipe("expected encoders of two noise levels or more for a graph, one at each")

    def quick(self) -> "PipelineEncoderRecipe":
        return replace(super().quick(), graph=None)

    @property
    def levels(self) -> list[int]:
        """Timesteps of the noise levels, the noisiest first."""
        return sorted({made.level for made in self.encoders if made.level is not None}, reverse=True)


KINDS += [DirectionRecipe, TextEncoderRecipe, PipelineEncoderRecipe, PictureRecipe, ContextRecipe]
