"""What every kind of recipe has: where its files are, how it is read and checked, and what it is told apart by.

A kind is a subclass in `KINDS`, which says by `describes` which files are its own.
"""

import hashlib
import json
import tomllib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from ..errors import BadRecipe
from .fields import NAMES, check_file_name, check_types, made_of

R = TypeVar("R", bound="Recipe")
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
    listed: ClassVar[tuple[str, ...]] = ()
    """Files that it names and the digest is of, beside those that several kinds have."""
    digested: ClassVar[tuple[str, ...]] = ()
    """Fields that the digest is of beside those of `DIGESTED`."""

    @classmethod
    @abstractmethod
    def describes(cls, values: Mapping[str, Any], folder: Path) -> bool:
        """Whether the fields of a file, in this folder, are those of such a recipe; of one kind alone they are."""

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
        kind = kind_of(values, path.name, path.parent)
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
        return place_of(self.source, self.folder)

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
        """SHA-256 of everything the bank depends on."""
        return _digest(self)


def place_of(source: str, folder: Path) -> str:
    """Where a model is: as is said, or in the folder of that name beside a recipe, whose folder is given."""
    beside = folder / source
    return str(beside) if beside.is_dir() and not Path(source).is_dir() else source


KINDS: list[type[Recipe]] = []
"""Every kind. Of a field that several have, the digest of a kind that lacks it takes the default of the first one."""
DIGESTED = (
    *("name", "base", "source", "concepts", "encoders", "corpus", "tokens", "epochs", "description", "license", "pairs"),
    *("scoring", "reference", "unrelated", "prompts", "layers", "methods", "budget", "train_prompts", "dev_prompts"),
    *("evaluation_prompts", "seeds", "new_tokens", "seed"),
)
"""Fields that the digest is of, in this order. The others change what is measured or shown, not what is made."""


def kind_of(values: Mapping[str, Any], where: str, folder: Path = Path()) -> type[Recipe]:
    """The kind that a file in a folder describes, of concepts, of encoders or of contexts."""
    concepts, encoders = values.get("concepts"), values.get("encoders") or values.get("contexts") or values.get("rows")
    if bool(concepts) == bool(encoders):
        near = [key for key in values if get_close_matches(key, ("concepts", "encoders"), n=1)] if not concepts else []
        meant = f"; {near[0]!r} is none of these names" if near and near[0] not in ("concepts", "encoders", "contexts") else ""
        raise BadRecipe(f"{where}: {NAMES}, as [[concepts]], [[encoders]] or [contexts]{meant}")
    return next(kind for kind in KINDS if kind.describes(values, folder))


def _digest(recipe: Recipe) -> str:
    """SHA-256 of the fields of a recipe, those that only another kind has with their defaults, so that banks made before there
    were kinds keep their digest, and of the contents of the files that they name."""
    every: dict[str, Any] = {f.name: f.default for kind in reversed(KINDS) for f in fields(kind)}
    every |= {f.name: getattr(recipe, f.name) for f in fields(recipe)}
    sha = hashlib.sha256(repr({name: every[name] for name in (*DIGESTED, *recipe.digested)}).encode())
    names = [every["reference"], every["prompts"], every["unrelated"], *every["corpus"], *every["attributes"]]
    names += [f"{every[folder]}/{c.name}.jsonl" for folder in ("pairs", "scoring") for c in every["concepts"]]
    for name in (*names, *recipe.listed):
        sha.update(name.encode() + (recipe.bytes_of(name) or b""))
    return sha.hexdigest() if not getattr(recipe, "is_brief", False) else hashlib.sha256(sha.digest()).hexdigest()
