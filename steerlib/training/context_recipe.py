"""Concepts of a context module at one site of a model, from prompts that are sorted by what was intervened on."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from ..errors import BadRecipe
from .fields import check_file_name
from .fit.contexts import OBSERVED, ContextFit
from .recipe_base import Recipe

LEAST = 8
"""Prompts of a context: some to learn from, the others to measure on."""


@dataclass(frozen=True, kw_only=True)
class ContextRecipe(Recipe):
    """Concepts that `sl.Do` switches, at one site of a language model or a pipeline, which stays as it is.

    Args:
        contexts: In TOML `[contexts]`: the prompts of each concept, in which it was intervened on, and those of `observed`, in
            which nothing was; a list, or the name of a file of prompts, one a line.
        rows: In place of these a file of lines of `text` and `context`.
        site: The site whose activations are switched: of a language model, at the last token of a prompt.
        level: Of a pipeline's denoiser: the timestep at whose noise its activations are taken, and around which they are
            switched. Default: what the pipeline's first pass shows, as at a text encoder.
        fit: How the module is trained; in TOML `[fit]`.
        seeds: The number of seeds it is trained from. The first is kept; the others show how far effects depend on them.
        samples: Activations of each context; prompts of a pipeline are drawn again, from other noise.
        steps: Scheduler steps of a picture.
        batch: Prompts that are run together.
    """

    contexts: Mapping[str, Any] | None = None
    rows: str = ""
    site: str = ""
    level: int | None = None
    fit: ContextFit = ContextFit(inner=8, outer=4, batch=64, steps=2000)
    seeds: int = 3
    samples: int = 256
    steps: int = 20
    batch: int = 16
    digested: ClassVar[tuple[str, ...]] = ("contexts", "rows", "site", "level", "fit", "seeds", "samples", "steps", "batch")

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
        files = [self.rows] if self.rows else [name for name in (self.contexts or {}).values() if isinstance(name, str)]
        return tuple(sorted(files))

    @property
    def plain(self) -> str:
        """A prompt in which nothing was intervened on."""
        return self.read_contexts()[OBSERVED][0]

    def read_contexts(self) -> dict[str, list[str]]:
        """The prompts of each context, `observed` first."""
        found: dict[str, list[str]] = {}
        for line in self.read_lines(self.rows, "text", "context") if self.rows else ():
            found.setdefault(line["context"], []).append(line["text"])
        for name, given in (self.contexts or {}).items():
            found[name] = self._prompts(name, given)
        return {name: found[name] for name in sorted(found, key=lambda name: name != OBSERVED)}

    def _prompts(self, name: str, given: Any) -> list[str]:
        if isinstance(given, str):
            if (text := self.text_of(given)) is None:
                raise BadRecipe(f"expected {given} beside the recipe, found none")
            return [line.strip() for line in text.splitlines() if line.strip()]
        if not isinstance(given, list | tuple) or not all(isinstance(prompt, str) for prompt in given):
            raise BadRecipe(f"{name!r}: expected a list of prompts, or the name of a file of some, got {given!r:.80}")
        return list(given)
