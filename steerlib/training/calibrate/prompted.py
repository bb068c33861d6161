"""What a lever of pictures does to pictures of held-out prompts, as the pipeline itself or a scorer of the user sees it.

Every pair has a plain picture, of the negative prompt, a prompted one, of the positive prompt from the same noise, and steered
ones, of the negative prompt too. With e(x|c) the denoising error of picture x under prompt c (`evaluation/denoising.py`), n the
negative and p the positive prompt, u the plain, q the prompted and s the steered picture:

    gain(x) = e(x|n) - e(x|p)                              how much better the prompt that says the concept explains x
    effect  = clip((gain(s) - gain(u)) / (gain(q) - gain(u)), 0, 1)
    natural = mean(e(u|n), e(q|p))                         the error of the pipeline's own pictures
    damage  = max(0, min(e(s|n), e(s|p)) - natural) / natural

An effect is 0 for the plain and 1 for the prompted picture. A damage of 1: neither prompt explains the steered picture
without twice the error of the pipeline's own pictures. The effect is a mean over pairs, the damage a ratio of means. The
setting with the largest effect less a quarter of the damage is chosen (`WEIGHT`).

To remove a concept, the prompted picture is steered. What it should become is any picture that does not show the concept: of
something blue, something red is as good as something green, which is what n may say. So b, the words that n and p share, is
asked in place of n:

    gain(x) = e(x|b) - e(x|p)
    effect  = clip((gain(q) - gain(s)) / (gain(q) - gain(u)), 0, 1)
    natural = mean(e(u|b), e(q|b))
    damage  = max(0, e(s|b) - natural) / natural
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cached_property
from itertools import product, takewhile
from typing import Any, NamedTuple
from warnings import catch_warnings, simplefilter

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ...bank.concept_bank import ConceptBank
from ...errors import BadRecipe
from ...evaluation.denoising import drawn, errors
from ...evaluation.pictures import Pictures, draws_classes, edit_of, stills
from ...steering.interventions import Intervention
from ...steering.session import steer
from ..picture_recipe import PictureRecipe, PromptPair

Score = Callable[[Pictures, str], Any]
"""Of pictures `[B, H, W, 3]` and the name of a concept: `[B]` numbers, how much each shows it, on any scale."""
WEIGHT, HARM = 0.25, 2.0
"""What a damage of 1 weighs against an effect of 1, and the damage up to which an amount counts as safe. Both were set by what
judges saw of four values of small scenes (day, night, blue, circle), and looked at on nothing else."""


@dataclass(frozen=True)
class Drawing:
    """A pipeline that draws as a recipe says: so many steps, this guidance, each prompt from the noise of its seed."""

    pipe: Any
    recipe: PictureRecipe

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Latents of some prompts, as the denoiser is given them."""
        return torch.cat([latents for latents, _ in self._runs(prompts, seeds, "latent")])

    def shown(self, prompts: Sequence[str], seeds: Sequence[int]) -> tuple[Tensor, Pictures]:
        """The same, and the pictures that the pipeline makes of them; of a video its middle frame."""
        latents, made = zip(*self._runs(prompts, seeds, "np"), strict=True)
        return torch.cat(latents), np.concatenate([stills(some) for some in made])

    def _runs(self, prompts: Sequence[str], seeds: Sequence[int], output: str) -> Iterator[tuple[Tensor, Any]]:
        how: dict[str, Any] = {"num_inference_steps": self.recipe.steps, "output_type": output}
        if self.recipe.guidance is not None:
            how["guidance_scale"] = self.recipe.guidance
        for start in range(0, len(prompts), self.recipe.batch):
            some = slice(start, start + self.recipe.batch)
            noises = [torch.Generator().manual_seed(seed) for seed in seeds[some]]
            yield drawn(self.pipe, prompts[some], generator=noises, **how)

    def errors(self, latents: Tensor, *arms: Sequence[str]) -> list[Float[Tensor, " B"]]:
        """How badly the prompts of each arm explain the pictures."""
        found, most = [], self.recipe.batch
        for k, some in enumerate(latents.split(most)):
            prompts = [prompt for arm in arms for prompt in arm[k * most : (k + 1) * most]]
            found.append(errors(self.pipe, some, prompts, seed=self.recipe.seed).unflatten(0, (len(arms), -1)))
        return [*torch.cat(found, 1)]


class Trial(NamedTuple):
    """What a setting did: means over pairs."""

    effect: float
    damage: float

    @property
    def score(self) -> float:
        """The more, the better."""
        return self.effect - WEIGHT * self.damage


class Trials:
    """The pairs of one concept, drawn plain and prompted once, and what settings do to them.

    Args:
        drawing: How pictures are drawn.
        pairs: Pairs that no lever was made from.
        concept: Its name, which `score` is given.
        score: A scorer in place of the pipeline itself; damage stays the pipeline's.
    """

    def __init__(self, drawing: Drawing, pairs: Sequence[PromptPair], concept: str, score: Score | None = None):
        self.drawing, self.pairs, self.concept, self.score = drawing, list(pairs), concept, score
        self.seeds = [pair.seed for pair in pairs]
        self.said = {"n": [pair.negative for pair in pairs], "p": [pair.positive for pair in pairs]}
        both = [shared(pair.positive, pair.negative) for pair in pairs]
        self.said["b"] = self.said["n"] if draws_classes(drawing.pipe) else both

    def of(self, bank: ConceptBank, edits: Mapping[str, Any], *, remove: bool = False) -> Trial:
        """The effect and the damage of edits; with `remove` on pictures of positive prompts, which should lose the concept."""
        asked, less = ("p", "b") if remove else ("n", "n")
        u, q, s = (each.under(less) for each in (self._plain, self._prompted, self._seen(asked, bank, edits)))
        start, way = (q.shown, u.shown - q.shown) if remove else (u.shown, q.shown - u.shown)
        share = ((s.shown - start) / way).clamp(0, 1)[way < 0 if remove else way > 0]
        natural = (u.less + (q.less if remove else q.said)) / 2
        own = s.less if remove else torch.minimum(s.less, s.said)
        harm = (own - natural).clamp(min=0).mean() / natural.mean()
        return Trial(round(float(share.mean()) if len(share) else 0.0, 4), round(float(harm), 4))

    @property
    def told(self) -> float:
        """Share of pairs whose prompted picture scores higher than the plain one: without them, nothing can be measured."""
        return float((self._prompted.under("n").shown > self._plain.under("n").shown).float().mean())

    @cached_property
    def _plain(self) -> "_Seen":
        return self._seen("n")

    @cached_property
    def _prompted(self) -> "_Seen":
        return self._seen("p")

    def _seen(self, asked: str, bank: ConceptBank | None = None, edits: Mapping[str, Any] | None = None) -> "_Seen":
        """What is drawn of some prompts, to be judged."""
        prompts = self.said[asked]
        with steered(self.drawing.pipe, bank, edits):
            if self.score is None:
                return _Seen(self, self.drawing(prompts, self.seeds))
            latents, pictures = self.drawing.shown(prompts, self.seeds)
        shown = np.asarray(self.score(pictures, self.concept), dtype=np.float32)
        if shown.shape != (len(prompts),) or not np.isfinite(shown).all():
            raise BadRecipe(f"expected a finite number from score= for each of {len(prompts)} pictures, got {shown!r:.80}")
        return _Seen(self, latents, torch.from_numpy(shown))


class _Judged(NamedTuple):
    less: Float[Tensor, " B"]
    """Errors under the prompts that do not say the concept."""
    said: Float[Tensor, " B"]
    """Errors under those that do."""
    shown: Float[Tensor, " B"]
    """How much of the concept there is."""


class _Seen:
    """Pictures, which are judged once under each kind of prompts: always in calls of the same shape, so to the same bits."""

    def __init__(self, trials: Trials, latents: Tensor, shown: Tensor | None = None):
        self.trials, self.latents, self.shown = trials, latents, shown
        self.judged: dict[str, _Judged] = {}

    def under(self, less: str) -> _Judged:
        if less not in self.judged:
            e, c = self.trials.drawing.errors(self.latents, self.trials.said[less], self.trials.said["p"])
            self.judged[less] = _Judged(e, c, e - c if self.shown is None else self.shown)
        return self.judged[less]


def shared(positive: str, negative: str) -> str:
    """The words of a negative prompt that its positive one has too, in the same order; where there are none, all of them."""
    words = [prompt.split() for prompt in (positive, negative)]
    bare = [[word.strip(",.;:!?") for word in some] for some in words]
    blocks = SequenceMatcher(None, *bare, autojunk=False).get_matching_blocks()
    return " ".join(word for block in blocks for word in words[1][block.b : block.b + block.size]) or negative


@contextmanager
def steered(pipe: Any, bank: ConceptBank | None, edits: Mapping[str, Any] | None) -> Iterator[None]:
    """Inside a `with` block edits, if any, act on the half of guidance that reads the prompt; none is said to go too far."""
    if bank is None or not edits:
        yield
        return
    with catch_warnings():
        simplefilter("ignore")
        with steer(pipe, bank, edits, branch="cond", allow_ood=True):
            yield


EDITS = ("Add", "Set")
"""Kinds of edits that a concept can be stored with."""
TOLD, MOVED = 0.75, 0.5
"""Share of prompted pictures that have to be told from plain ones, and effect, from which on an amount counts as useful."""
REMOVED = (("Set", 0.0), ("Set", -1.0), ("Scale", -1.0), ("Add", -1.75), ("Add", -2.5))
"""Edits of which one is chosen to remove a concept: its reading set to that of pictures without it, or below, turned around
(CASteer, arXiv 2503.09630), or lowered. After one that scores `ENOUGH` no other is tried."""
ENOUGH = 0.9
FIRST, DOSES = 2.5, (1.0, 1.75, 4.0, 6.0)
"""The amount at which methods are compared, and others of the best."""


class Attempt(NamedTuple):
    """A setting and what it did."""

    method: str
    edit: str
    amount: float
    effect: float
    damage: float

    @property
    def setting(self) -> Intervention:
        """The edit."""
        return edit_of(self.edit, self.amount)

    @property
    def score(self) -> float:
        """The more, the better."""
        return self.effect - WEIGHT * self.damage


class Choice(NamedTuple):
    """What was chosen for a concept, of all that was tried, and what shows that it can be measured."""

    best: Attempt
    tried: list[Attempt]
    told: float

    @property
    def doses(self) -> list[Attempt]:
        """What was tried of the method and the kind of edit, from the smallest amount on."""
        own = [line for line in self.tried if line[:2] == self.best[:2]]
        return sorted(own, key=lambda line: line.amount)

    @property
    def range(self) -> tuple[float, float]:
        """From 0 to the largest amount up to which no smaller one did harm."""
        return 0.0, max((line.amount for line in takewhile(lambda line: line.damage <= HARM, self.doses)), default=0.0)

    @property
    def is_useful(self) -> bool:
        """Whether it moves the concept clearly, and more than it harms."""
        return self.told >= TOLD and self.best.effect >= MOVED and self.best.damage <= HARM

    @property
    def beyond(self) -> str:
        """What is known of amounts beyond the range, or why there is no useful one."""
        if self.told < TOLD:
            return f"only {self.told:.0%} of pictures whose prompt says it are told from plain ones, so nothing is known of it"
        if not self.is_useful:
            return f"no amount that was tried moved it by {MOVED:.0%} without a damage above {HARM:g}"
        harmful = next((line for line in self.doses if line.damage > HARM), None)
        return "" if harmful is None else f"at {harmful.amount:g} a damage of {harmful.damage:.1f}"

    @classmethod
    def from_json(cls, values: Sequence[Any]) -> "Choice":
        """What `remembered` gives back."""
        best, tried, *_, told = values  # between them was once the way of removal
        return cls(Attempt(*best), [Attempt(*line) for line in tried], told)


def most_trials(methods: Sequence[str], narrower: int) -> int:
    """How often `chosen` and `removals` have the pairs drawn, at most, beside plain and prompted."""
    return len(methods) * len(EDITS) + 2 * len(DOSES) + narrower + len(DOSES) + len(REMOVED)


def hoped(tried: Iterable[Attempt], method: str, edit: str, amount: float) -> float:
    """The most that a setting can score, if both effect and damage grow with its amount, by what was tried of the same."""
    own = [line for line in tried if (line.method, line.edit) == (method, edit)]
    effect = min((line.effect for line in own if line.amount > amount), default=1.0)
    return effect - WEIGHT * max((line.damage for line in own if line.amount < amount), default=0.0)


def chosen(
    trials: Trials, bank: Callable[[str], ConceptBank], methods: Sequence[str], narrower: Callable[[str, str], Sequence[str]]
) -> Choice:
    """The best method, kind of edit and amount for a concept; then whether it does better at fewer sites or levels. Of the
    second best at first, amounts are left out that cannot become the best (`hoped`).

    Args:
        bank: Gives a bank by the name of a method.
        methods: Names of methods.
        narrower: Gives the names under which a method and a kind of edit act at fewer sites or levels, or otherwise.
    """
    tried: list[Attempt] = []

    def attempt(methods: Iterable[tuple[str, str]], amounts: Sequence[float]) -> Attempt:
        for method, edit in methods:
            for amount in amounts:
                tried.append(Attempt(method, edit, amount, *trials.of(bank(method), {trials.concept: edit_of(edit, amount)})))
        tried.sort(key=lambda line: -line.score)
        return tried[0]

    attempt(product(methods, EDITS), [FIRST])
    first, *second = tried[:2]
    best = attempt([first[:2]], DOSES)
    for line, amount in product(second, DOSES):
        if line[:2] == best[:2] or hoped(tried, line.method, line.edit, amount) > best.score:
            best = attempt([line[:2]], [amount])
    if (fewer := attempt([(name, best.edit) for name in narrower(best.method, best.edit)], [best.amount])) != best:
        best = attempt([(fewer.method, fewer.edit)], [amount for amount in (FIRST, *DOSES) if amount != fewer.amount])
    return Choice(best, tried, round(trials.told, 4))


def removals(trials: Trials, bank: ConceptBank, method: str) -> list[Attempt]:
    """What edits do that may remove a concept, the best first; the bank has it as a method made it."""
    tried: list[Attempt] = []
    for way in REMOVED:
        tried.append(Attempt(method, *way, *trials.of(bank, {trials.concept: edit_of(*way)}, remove=True)))
        if tried[-1].score >= ENOUGH:
            break
    return sorted(tried, key=lambda line: -line.score)
