"""Concepts of a context module at one site of a model, from prompts that are sorted by what was intervened on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from ..errors import BadRecipe
from .fields import check_file_name
from .fit.contexts import OBSERVED, ContextFit
from .picture_recipe import asked, check_template
from .recipe_base import Recipe

LEAST = 8
"""Prompts of a context: some to learn from, the others to measure on."""
FIT = ContextFit(inner=16, outer=16, depth=2, batch=512, rate=3e-3, warmup=100, steps=1000, sparse=100.0)
"""Effects are dear: what a concept does by way of another is cut where both are done, so it has to be worth that."""


@dataclass(frozen=True, kw_only=True)
class ContextRecipe(Recipe):
    """Concepts that `sl.Do` switches, at one site of a language model or a pipeline, which stays as it is.

    Args:
        contexts: In TOML `[contexts]`: the prompts of each concept, in which it was intervened on, and those of `observed`, in
            which nothing was; a list, or the name of a file of prompts, one a line. Better, of a concept the name of a .jsonl
            file of pairs, lines of `positive` and `negative`, or a list of such pairs: the same prompt with the concept and as
            observed. Lists of prompts are paired so that as little as possible differs.
        template: How a prompt says a concept, with `{prompt}` and `{concept}` in it, such as "{prompt}, {concept}". Then
            `contexts` has the words for each concept ("by night"), which the template puts into the prompts of `observed`.
        rows: In place of contexts a file of lines of `text` and `context`, or a folder with a file of each context, such as
            `observed.txt` and `night.txt` or `night.jsonl`.
        site: The site whose activations are switched: of a pipeline a block of its text encoder, or of its denoiser; of a
            language model, at the last token of a prompt.
        level: Of a pipeline's denoiser: the timestep at whose noise its activations are taken, and around which they are
            switched. Default: what the pipeline's first pass shows, as at a text encoder.
        fit: How the module is trained; in TOML `[fit]`.
        seeds: The number of seeds it is trained from. The first is kept; the others show how far effects depend on them.
        samples: Activations of each context; prompts of a pipeline are drawn again, from other noise.
        steps: Scheduler steps of a picture.
        batch: Prompts that are run together.
    """

    contexts: Mapping[str, Any] | None = None
    template: str = ""
    rows: str = ""
    site: str = ""
    level: int | None = None
    fit: ContextFit = FIT
    seeds: int = 3
    samples: int = 256
    steps: int = 20
    batch: int = 16
    digested: ClassVar[tuple[str, ...]] = (
        *("contexts", "template", "rows", "site", "level", "fit", "seeds", "samples", "steps", "batch"),
    )

    @classmethod
    def describes(cls, values: Mapping[str, Any], folder: Path) -> bool:  # noqa: ARG003
        return not (values.get("concepts") or values.get("encoders"))

    def check(self, *, to_train: bool = True) -> None:
        super().check(to_train=to_train)
        if bool(self.contexts) == bool(self.rows):
            raise BadRecipe("expected prompts by context, as [contexts], or a file of rows, and not both")
        if not self.site.strip() or min(self.seeds, self.steps, self.batch) < 1 or self.samples < LEAST:
            raise BadRecipe(f"expected a site, positive seeds, steps and batch, and samples from {LEAST} up, got {self!r:.200}")
        if self.level is not None and self.level < 0:
            raise BadRecipe(f"expected level as a timestep from 0 up, got {self.level}")
        if self.template:
            check_template(self.template)
        self.fit.check()
        if to_train:
            self._check_prompts(self.read_contexts())

    def _check_prompts(self, found: Mapping[str, list[str]]) -> None:
        if OBSERVED not in found or len(found) < 2:
            raise BadRecipe(f"expected prompts of {OBSERVED!r} and of a concept or more, got {', '.join(found) or 'none'}")
        for name, prompts in found.items():
            check_file_name(name, "concept's name")
            if len({*prompts}) < LEAST or not all(prompt.strip() for prompt in prompts):
                raise BadRecipe(
                    f"{name!r}: expected {LEAST} different prompts or more, none of them empty, got {len({*prompts})}"
                )

    def quick(self) -> "ContextRecipe":
        fit = replace(self.fit, steps=min(self.fit.steps, 300), warmup=min(self.fit.warmup, 30))
        few = {"samples": min(self.samples, 64), "steps": min(self.steps, 10), "seeds": 1}
        return replace(self, fit=fit, **few, is_quick=True)

    @property
    def listed(self) -> tuple[str, ...]:  # type: ignore[override]
        if self.rows.endswith(".jsonl"):
            return (self.rows,)
        phrases = self.template and not self.rows
        files = [given for name, given in self._given().items() if not phrases or name == OBSERVED]
        return tuple(sorted(given for given in files if isinstance(given, str)))

    def _given(self) -> Mapping[str, Any]:
        """What the recipe says of each context; of a folder, its files."""
        if self.contexts or not self.rows:
            return self.contexts or {}
        inside = self.texts if self.texts is not None else [f"{self.rows}/{p.name}" for p in self.path(self.rows).glob("*")]
        files = [Path(name) for name in inside if name.startswith(f"{self.rows}/")]
        return {file.stem: file.as_posix() for file in sorted(files) if file.suffix in (".txt", ".jsonl")}

    @property
    def plain(self) -> str:
        """A prompt in which nothing was intervened on."""
        return self.read_contexts()[OBSERVED][0]

    def with_contexts(self, made: Mapping[str, Callable[[str], str]]) -> "ContextRecipe":
        """The same recipe with further concepts, by name what a function makes of each observed prompt."""
        found: dict[str, Any] = {**self.read_contexts(), **self.read_pairs()}
        if OBSERVED not in found or found.keys() & made.keys():
            raise BadRecipe(
                f"expected prompts of {OBSERVED!r} and functions of other concepts, got {', '.join(found) or 'none'}"
            )
        pairs = {name: [(make(prompt), prompt) for prompt in found[OBSERVED]] for name, make in made.items()}
        return replace(self, contexts=found | pairs, template="", rows="")

    def read_contexts(self) -> dict[str, list[str]]:
        """The prompts of each context, `observed` first."""
        pairs = self.read_pairs()
        found: dict[str, list[str]] = {name: [prompt for prompt, _ in some] for name, some in pairs.items()}
        if self.rows.endswith(".jsonl"):
            for line in self.read_lines(self.rows, "text", "context"):
                found.setdefault(line["context"], []).append(line["text"])
        else:
            found |= {name: self._prompts(name, given) for name, given in self._given().items() if name not in found}
        if pairs:
            found.setdefault(OBSERVED, list(dict.fromkeys(plain for some in pairs.values() for _, plain in some)))
        return {name: found[name] for name in sorted(found, key=lambda name: name != OBSERVED)}

    def read_pairs(self) -> dict[str, list[tuple[str, str]]]:
        """Of each concept that has pairs: prompts in which it was intervened on, and the same ones as observed."""
        given = {} if self.rows.endswith(".jsonl") else dict(self._given())
        observed, found = given.pop(OBSERVED, []), {}
        for name, said in given.items():
            if self.template:
                if not isinstance(said, str) or not said.strip():
                    raise BadRecipe(f"{name!r}: expected words for the template, such as 'by night', got {said!r:.80}")
                found[name] = [(asked(self.template, prompt, said), prompt) for prompt in self._prompts(OBSERVED, observed)]
            elif isinstance(said, str) and said.endswith(".jsonl"):
                lines = self.read_lines(said, "positive", "negative")
                found[name] = [(line["positive"].strip(), line["negative"].strip()) for line in lines]
            elif isinstance(said, list | tuple) and any(isinstance(pair, list | tuple) for pair in said):
                found[name] = [_pair(name, pair) for pair in said]
            if bad := [prompt for prompt, plain in found.get(name, ()) if prompt == plain]:
                raise BadRecipe(f"{name!r}: expected pairs of two different prompts, got {bad[0]!r:.120} twice")
        return found

    def _prompts(self, name: str, given: Any) -> list[str]:
        if isinstance(given, str):
            if (text := self.text_of(given)) is None:
                raise BadRecipe(f"expected {given} beside the recipe, found none")
            return [line.strip() for line in text.splitlines() if line.strip()]
        if not isinstance(given, list | tuple) or not all(isinstance(prompt, str) for prompt in given):
            raise BadRecipe(f"{name!r}: expected a list of prompts, or the name of a file of some, got {given!r:.80}")
        return list(given)


def _pair(name: str, given: Any) -> tuple[str, str]:
    if not isinstance(given, list | tuple) or len(given) != 2 or not all(isinstance(text, str) for text in given):
        raise BadRecipe(f"{name!r}: expected pairs of a prompt with the concept and as observed, got {given!r:.80}")
    return given[0].strip(), given[1].strip()
