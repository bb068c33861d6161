"""What determines a bank: the model, the data, the search. Read from TOML; the strings under fields are its manual."""

import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import BadRecipe


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
    instruction: str
    """How a prompt would ask for it: what steering is compared with."""
    scorer: Mapping[str, Any] | None = None
    """`{count = "words"}`, or `{pattern = "...", per = "word" | "sentence"}`; without it, labelled texts are expected."""
    tolerance: float | None = None
    """In place of the recipe's."""
    shares: tuple[float, ...] = ()
    """In place of the recipe's."""
    split: str = "test"
    """Prompts to report on. A concept that is searched again after it was measured names prompts not measured on yet."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A frozen description of a bank. Paths are relative to the recipe's folder."""

    name: str
    base: str
    """Id of the model, as the bank will record it."""
    source: str
    """Where the weights are: a folder, a Hub id, or `package:<name>/<file>.gguf`."""
    concepts: tuple[ConceptRecipe, ...]
    folder: Path = field(default=Path(), repr=False)
    description: str = ""
    license: str = ""
    pairs: str = "pairs"
    """Folder of `<concept>.jsonl`, lines of prompt, positive, negative."""
    scoring: str = "scoring"
    """Folder of `<concept>.jsonl`, lines of text and label, for the scorers; no text of `pairs` may stand there."""
    reference: str = "reference.jsonl"
    """Ordinary text, from which units are measured."""
    prompts: str = "prompts.jsonl"
    """Prompts of neither, lines of prompt and split: `dev` to choose with, others to report on."""
    layers: tuple[int, ...] = ()
    """Layers to try; empty: six spread over the middle of the model."""
    methods: tuple[str, ...] = ("difference-of-means", "pca", "probe")
    shares: tuple[float, ...] = (0.1, 0.15, 0.2, 0.25, 0.3)
    """Lengths to try, as shares of the site's median activation."""
    dev_prompts: int = 10
    test_prompts: int = 40
    new_tokens: int = 48
    tolerance: float = 0.3
    """Nats per token that steered text may be less likely than prompted text, on the prompts used to choose."""
    seed: int = 0
    ship: str = "all"
    """`all` concepts, or only those `clearing` every bar; the card lists the others with what was measured."""

    @classmethod
    def from_file(cls, path: str | Path) -> "Recipe":
        """Read a recipe, and refuse what it does not know."""
        path = Path(path)
        if not path.is_file():
            raise BadRecipe(f"expected a recipe file, found none at {path.name!r}")
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise BadRecipe(f"{path.name} is not valid TOML: {error}") from None
        concepts = tuple(_made(ConceptRecipe, entry, f"{path.name}, concepts") for entry in values.pop("concepts", []))
        recipe = _made(cls, {**values, "concepts": concepts, "folder": path.parent}, path.name)
        recipe.check()
        return recipe

    def check(self) -> None:
        """Raise `BadRecipe` for what cannot work, before any model is loaded."""
        if not self.concepts or len({concept.name for concept in self.concepts}) < len(self.concepts):
            raise BadRecipe("expected at least one concept, each name once")
        if not self.shares or min(self.shares) <= 0 or not self.methods or self.dev_prompts < 1 or self.new_tokens < 1:
            raise BadRecipe("expected methods, positive shares, and at least one dev prompt and new token")
        if self.ship not in ("all", "clearing"):
            raise BadRecipe(f"expected ship to be 'all' or 'clearing', got {self.ship!r}")
        for concept in self.concepts:
            self.read_pairs(concept.name)
        self.read_reference()
        wanted = {"dev": self.dev_prompts} | {concept.split: self.test_prompts for concept in self.concepts}
        for split, count in wanted.items():
            if len(self.read_prompts(split)) < count:
                raise BadRecipe(f"{self.prompts} has {len(self.read_prompts(split))} {split} prompts, expected {count}")

    def read_pairs(self, concept: str) -> list[Pair]:
        """The contrast pairs of a concept."""
        return [Pair(*_fields(line, Pair._fields, self.pairs)) for line in self._lines(f"{self.pairs}/{concept}.jsonl")]

    def read_prompts(self, split: str) -> list[str]:
        """The prompts of a split, as many as are asked for."""
        lines = [_fields(line, ("prompt", "split"), self.prompts) for line in self._lines(self.prompts)]
        limit = self.dev_prompts if split == "dev" else self.test_prompts
        return [prompt for prompt, which in lines if which == split][:limit]

    def read_reference(self) -> list[str]:
        """The reference texts."""
        return [_fields(line, ("text",), self.reference)[0] for line in self._lines(self.reference)]

    def _lines(self, name: str) -> list[Any]:
        path = self.folder / name
        if not path.is_file():
            raise BadRecipe(f"expected {name} beside the recipe, found none")
        try:
            return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except ValueError as error:
            raise BadRecipe(f"{name} is not JSON lines: {error}") from None

    @cached_property
    def digest(self) -> str:
        """Changes with anything the result depends on."""
        sha = hashlib.sha256(
            repr({f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("folder", "ship")}).encode()
        )
        names = [self.reference, self.prompts]
        names += [f"{folder}/{concept.name}.jsonl" for folder in (self.pairs, self.scoring) for concept in self.concepts]
        for name in names:
            path = self.folder / name
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
