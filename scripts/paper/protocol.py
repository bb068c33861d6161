"""What is drawn, erased and replaced, and which figure needs which instrument.

A picture shows one value of each of two domains, say an object in a style: `template` makes its prompt of both.
"""

import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from steerlib.errors import BadRecipe
from steerlib.evaluation.report import markdown
from steerlib.training.fields import made_of

Judge = Callable[[Any, Sequence[str]], Tensor]
"""Of pictures, `latents` and `pixels`, and texts, one for each: `[B]` numbers, higher where the text explains the picture."""


class Asked(NamedTuple):
    """A picture to draw."""

    prompt: str
    seed: int
    values: Mapping[str, str]
    """What it is to show, by domain."""


@dataclass(frozen=True, kw_only=True)
class Attack:
    """A concept that is no value of a domain, such as nudity, and prompts that bring it though they may not name it.

    Args:
        name: What tables call it.
        shown: A text of a picture that shows it. A picture is flagged if the judge prefers this text to the next one.
        lacking: A text of a picture that does not.
        positive: Prompts with the concept, and
        negative: as many without it: on their pictures latents are chosen.
        prompts: A file of the attack's prompts, lines of `text`, beside the protocol.
        texts: These prompts.
    """

    name: str
    shown: str
    lacking: str
    positive: tuple[str, ...]
    negative: tuple[str, ...]
    prompts: str = ""
    texts: tuple[str, ...] = ()

    def asked(self, part: int) -> list[Asked]:
        """Pictures to choose on, 0, and attacks, 1."""
        count = len(self.positive)
        if part:
            return [Asked(prompt, count + k, {}) for k, prompt in enumerate(self.texts)]
        pairs = {"shown": self.positive, "lacking": self.negative}
        return [Asked(prompt, k, {self.name: kind}) for kind, prompts in pairs.items() for k, prompt in enumerate(prompts)]

    def read(self, folder: Path) -> "Attack":
        """With the prompts of its file. Raises `BadRecipe` for what cannot work."""
        if not self.positive or len(self.positive) != len(self.negative):
            raise BadRecipe(f"{self.name!r}: expected as many positive as negative prompts")
        file = folder / self.prompts
        if not file.is_file():
            raise BadRecipe(f"{self.name!r}: expected {self.prompts or 'prompts = a file'} beside the protocol, found none")
        lines = [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        return replace(self, texts=(*self.texts, *lines))


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What is drawn and done. `protocol.toml` has these fields.

    Args:
        template: A prompt, with the name of each domain in braces.
        domains: Values of the two domains.
        erase: Concepts to erase one by one, each a value of a domain.
        replace: Pairs of concepts of one domain: the first is to become the second.
        attacks: Concepts to erase under prompts that bring them.
        latents: The number of latents of each noise level that stand for a concept.
        strengths: What is left of the readings of an erased concept, from 0 to below 1. No latent reads less than 0, so the
            negative multipliers of SAeUron, which left artefacts in more than half of pictures (arXiv 2606.31699), are refused.
        seeds: Noises of every prompt that are measured, and as many others that latents are chosen on.
        steps: Scheduler steps of a picture.
        guidance: Guidance towards the prompt.
    """

    template: str
    domains: Mapping[str, Any] = field(default_factory=dict)
    erase: tuple[str, ...] = ()
    replace: tuple[str, ...] = ()
    attacks: tuple[Attack, ...] = ()
    latents: int = 4
    strengths: tuple[float, ...] = (0.0,)
    seeds: int = 1
    steps: int = 50
    guidance: float = 7.5

    @classmethod
    def from_file(cls, path: Path) -> "Protocol":
        """Raises `BadRecipe` for what cannot work."""
        made = made_of(cls, tomllib.loads(path.read_text(encoding="utf-8")), path.name)
        if len(made.domains) != 2 or any("{" + name + "}" not in made.template for name in made.domains):
            raise BadRecipe(f"expected two domains, both named in the template, got {[*made.domains]} and {made.template!r}")
        if not all(0 <= own < 1 for own in made.strengths):
            raise BadRecipe(f"expected strengths from 0 to below 1, what is left of readings, got {[*made.strengths]}")
        known = [value for values in made.domains.values() for value in values] + [own.name for own in made.attacks]
        pairs = [value for pair in made.replace for value in pair.split(" -> ")]
        if wrong := [value for value in (*made.erase, *pairs) if known.count(value) != 1]:
            raise BadRecipe(f"expected concepts that are a value of one domain each, got {', '.join(wrong)}")
        return replace(made, attacks=tuple(own.read(path.parent) for own in made.attacks))

    def domain(self, concept: str) -> str:
        """Of which a concept is a value."""
        return next(name for name, values in self.domains.items() if concept in values)

    def says(self, values: Mapping[str, str]) -> str:
        """The prompt of a picture."""
        return self.template.format(**values)

    def asked(self, part: int) -> list[Asked]:
        """Every combination of values, from noises that no other part has: 0 to choose on, 1 to measure on."""
        both = [dict(zip(self.domains, values, strict=True)) for values in product(*self.domains.values())]
        every = [values for _ in range(self.seeds) for values in both]
        return [Asked(self.says(values), part * len(every) + k, values) for k, values in enumerate(every)]


class Figure(NamedTuple):
    """A figure of the tables, what measures it in its protocol and here, and what of it needs weights of the real model."""

    name: str
    meaning: str
    instrument: str
    package: str
    """That has the instrument; empty for what comes with steerlib."""
    here: str
    real: str


FIGURES = (
    Figure("UA, IRA, CRA", "UnlearnCanvas: erased no more shown; others of its domain, and the other domain, still are",
           "a classifier of styles and objects", "", "denoising error of the pipeline (arXiv 2303.16203), or `judge=`",
           "all: with random weights it is chance"),
    Figure("Acc_e, Acc_u", "SAFREE: artists that are still named, the erased one and others", "a vision-language model", "",
           "1 - UA and IRA", "all"),
    Figure("LPIPS_e, LPIPS_u", "SAFREE: change of pictures of the erased artist, and of others", "LPIPS", "lpips",
           "root mean square change, or `change=`", "all, and the network of LPIPS"),
    Figure("ASR", "SAFREE: pictures of attack prompts that are flagged (P4D, UnlearnDiffAtk, Ring-A-Bell, MMA, I2P)", "NudeNet",
           "nudenet", "the judge between two texts", "all: no model here knows nudity, and the prompts are not ours to ship"),
    Figure("FID", "distance from 10,000 pictures of COCO", "Inception", "torchmetrics", "", "all, and the pictures"),
    Figure("CLIP score", "pictures beside their captions", "CLIP", "torchmetrics", "`sl.ClipScore`", "all, and CLIP"),
    Figure("TIFA", "questions on captions, answered from pictures", "a vision-language model", "tifascore", "", "all"),
    Figure("explained, used, stability", "what encoders keep, and what another seed finds", "", "", "measured", "all"),
    Figure("edges", "parts of wholes, beside dealt pairs and shuffled levels", "", "", "measured",
           "whether there are any; on true graphs: `scripts/graphs`, `scripts/figures`"),
    Figure("memory, time, operations", "of every stage", "", "", "`dry`, `step`", "none: shapes decide"),
    Figure("resuming", "the same bytes after a stop", "", "", "`tests/test_paper.py`", "none"),
)  # fmt: skip


def figures_table() -> str:
    """Which figures there are, what measures them, whether that is installed, and what only real weights can tell."""
    there = {True: "installed", False: "not installed"}
    said = {f.package: f" ({there[find_spec(f.package) is not None]})" if f.package else "" for f in FIGURES}
    rows = [(f.name, f.meaning, f"{f.instrument}{said[f.package]}", f.here, f.real) for f in FIGURES]
    return markdown("figure | what it is | its instrument | here | only from real weights", rows)
