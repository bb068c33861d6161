"""Do latents chosen by their verified effect move a goal more than those that go with it? `python scripts/causes.py`. An hour.

A goal is that answers show a concept: the mean log-probability of a token of answers that show it, less that of answers that
do not; both are given, not written. Two rules choose latents of the shipped bank from the same 24 pairs of answers. *By
correlation*: those whose mean reading goes best with the concept. *By effect*: of each layer those that the gradient of the
goal on 16 pairs favours most for their length; each is moved alone on the other 8, by what costs ordinary text 0.1 nats per
token, and kept if the 95 % interval of its effect lies above 0. Beside them: random latents of the same layers that fire about
as often as these, and random directions in their place. In a set each latent is moved by the same share of the length of
activations at its layer. Sets are scaled to equal KL on other ordinary text and measured on texts that nothing was chosen
with. In bfloat16; goes on where it stopped.

`G` goals   `S` sets of latents chosen by one rule   `T` pairs of answers   `D` width
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import inf, log, sqrt
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.stats import ttest_1samp
from torch import Tensor
from torch.nn.functional import normalize

import steerlib as sl
from steerlib.encoders import Sparse
from steerlib.evaluation.comparison import TEMPERATURE, Condition, Unrelated
from steerlib.evaluation.report import markdown
from steerlib.evaluation.text import judge_for
from steerlib.origins import recipe_of
from steerlib.text import Completions, chat, complete, logits, progress, tokens_of
from steerlib.training.directions.objectives import frozen
from steerlib.training.label.attributes import select
from steerlib.training.store import remembered

BANK, TEXTS = "smollm2-135m-latents", "smollm2-135m-instruct"
"""The bank, and the one whose recipe has answers that show a concept."""
PAIRS, MEASURED, ORDINARY = 16, 12, (6, 12)
"""Pairs to screen with, before those to verify with; pairs to measure with; ordinary texts, to scale latents and sets by."""
SCREENED, RARE, ALONE = 8, 1e-4, 0.1
"""Latents of each layer that are moved alone; the least share of tokens they fire on; nats per token that it costs."""
SETTINGS = ((1, 0.1), (1, 0.3), (5, 0.1), (5, 0.3))
"""Latents in a set, and nats per token that it costs. At the last one answers are written."""
DRAWS = {"random latents": 2, "random directions": 1}
WAYS = ("correlation", "effect", *DRAWS)
READ = ("unsteered", *WAYS[:3])
BARS = (1.5, 3.0)
SHARE, NEAR, LOOKS, ALIKE, DRAWN = 0.1, 0.02, 12, 50, 2000
"""A push before it is scaled, of what activations measure; how near a KL is brought, in how many looks at most; latents nearest
in frequency among which one is drawn; bootstrap draws."""
SEED, NEW, SHOWN = 0, 40, 2
"""Of sampled answers; their tokens; requests with greedy answers that are kept for reading."""
Pair = tuple[str, str, str]
"""A request, an answer that shows a concept, and one that does not."""


class Push(NamedTuple):
    """Latents of a bank, and by how many units each is moved."""

    bank: sl.ConceptBank
    amounts: Mapping[str, float]

    def on(self, model: Any) -> Any:
        """A block inside which the model is moved, without caps."""
        return sl.steer(model, self.bank, self.amounts, allow_ood=True)


def laid(model: Any, tokenizer: Any, pairs: Sequence[Pair]) -> Completions:
    """Answers that show a concept behind their requests, then those that do not."""
    requests, shows, lacks = zip(*pairs, strict=True)
    asked = [chat(tokenizer, request) for request in requests] * 2
    new = tokenizer([*shows, *lacks], return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
    return tokens_of(model, tokenizer, asked, (new["input_ids"], new["attention_mask"].bool()))


def goal(model: Any, done: Completions) -> Float[Tensor, " T"]:
    """How much likelier a token of the answer that shows the concept is than one of the other, in nats."""
    new, real = done.new
    own = logits(model, done).float().log_softmax(-1).gather(-1, new[..., None])[..., 0]
    shows, lacks = ((own * real).sum(1) / real.sum(1)).chunk(2)
    return shows - lacks


def slopes(model: Any, done: Completions, widths: Mapping[str, int]) -> dict[str, Float[Tensor, " D"]]:
    """By site, the gradient of the goal for what is added to all tokens there."""
    added, count = {site: torch.full((width,), 1e-6, requires_grad=True) for site, width in widths.items()}, len(done.ids) // 2
    push = Push(sl.ConceptBank.from_directions({"push": added}, base=model), {"push": 1.0})
    for i in range(count):
        with frozen(model), push.on(model):
            (goal(model, done.rows([i, i + count])).sum() / count).backward()
    return {site: vector.grad for site, vector in added.items() if vector.grad is not None}


def screened(slope: Mapping[str, Tensor], encoders: Mapping[str, Sparse], each: int = SCREENED) -> list[str]:
    """Of every site the latents that gain most for the length of what they write, of those that fire."""
    found = []
    for site, encoder in encoders.items():
        gain = normalize(encoder.decoder.float(), dim=1) @ slope[site]
        gain[encoder.statistics["frequency"] < RARE] = -inf
        found += [f"{site}/{index}" for index in gain.topk(each).indices.tolist()]
    return found


def kept(effects: Mapping[str, Any]) -> list[str]:
    """Latents whose effect, by pair, lies above 0 with its 95 % interval, the largest mean first."""
    sure = [name for name, own in effects.items() if ttest_1samp(own, 0).confidence_interval().low > 0]
    return sorted(sure, key=lambda name: -float(np.mean(effects[name])))


def alike(names: Sequence[str], encoders: Mapping[str, Sparse], random: np.random.Generator) -> list[str]:
    """For each latent another of its site that fires about as often, each once."""
    found: list[str] = []
    for name in names:
        site, _, index = name.rpartition("/")
        often = encoders[site].statistics["frequency"].clamp(min=RARE).log()
        near = (often - often[int(index)]).abs().argsort(stable=True)[:ALIKE].tolist()
        free = [other for i in near if (other := f"{site}/{i}") not in (*names, *found)]
        found.append(free[int(random.integers(len(free)))])
    return found


def astray(bank: sl.ConceptBank, encoders: Mapping[str, Sparse], seed: int) -> sl.ConceptBank:
    """The same latents, each writing in a random direction."""
    g, made = torch.Generator().manual_seed(seed), {}
    for site, encoder in encoders.items():
        made[site] = replace(encoder, decoder=torch.randn(encoder.decoder.shape, generator=g))
    return sl.ConceptBank("astray", [], made, base=bank.base, sites=bank.sites)


def at_kl(target: float, kl: Callable[[float], float], near: float = NEAR) -> float:
    """A factor at which the KL is near a target. It grows about with the square of the factor."""
    below, above, factor = (0.0, 0.0), (inf, inf), 1.0
    for _ in range(LOOKS):
        found = max(kl(factor), 1e-6)
        if abs(found / target - 1) <= near:
            return factor
        below, above = ((factor, found), above) if found < target else (below, (factor, found))
        if below[0] and above[0] < inf:
            factor = below[0] * (above[0] / below[0]) ** (log(target / below[1]) / log(above[1] / below[1]))
        else:
            factor *= min(8.0, sqrt(target / found))
    raise ValueError(f"expected a KL near {target} within {LOOKS} looks, got {found:.3f}")


def ratio(some: NDArray[Any], others: NDArray[Any], *, sizes: bool = False, seed: int = 0) -> tuple[float, float, float]:
    """Mean effect of sets `[G, S, T]` over that of others; 95 % interval by bootstrap over goals, and in each over sets and
    texts. With `sizes`, of absolute effects: those of random sets have either sign and cancel."""
    random, (goals, _, texts) = np.random.default_rng(seed), some.shape

    def mean(x: NDArray[Any]) -> float:
        return float((np.abs(x.mean(2)) if sizes else x.mean(2)).mean())

    def again() -> float:
        which, picked = random.integers(0, goals, (goals, 1, 1)), random.integers(0, texts, (goals, 1, texts))
        sets = [random.integers(0, x.shape[1], (goals, x.shape[1], 1)) for x in (some, others)]
        return mean(some[which, sets[0], picked]) / mean(others[which, sets[1], picked])

    low, high = np.quantile([again() for _ in range(DRAWN)], (0.025, 0.975))
    return mean(some) / mean(others), float(low), float(high)


class Study:
    """A bank of latents, its model, and what is found of them, which `work` keeps."""

    def __init__(self, bank: sl.ConceptBank, work: Path):
        self.bank, self.work = bank, work
        self.recipe = recipe_of(sl.ConceptBank.from_pretrained(TEXTS), None)
        self.goals = {concept.name: concept for concept in self.recipe.concepts if not concept.positive}
        self.encoders = {id: encoder for id in bank.encoders if isinstance(encoder := bank.encoder(id), Sparse)}
        self.judge, (model, self.tokenizer) = judge_for(self.recipe.scorers), sl.load(self.recipe.source)
        self.model = model.to(torch.bfloat16)
        texts = [*map(self.recipe.read_texts, (self.recipe.reference, self.recipe.unrelated))]
        self.ordinary = [Unrelated(self.model, self.tokenizer, x[:n]) for x, n in zip(texts, ORDINARY, strict=True)]

    def pairs(self, name: str) -> tuple[list[Pair], list[Pair]]:
        """To choose with, and to measure with: texts that only the judge saw, as answers to requests of their own."""
        shown, scoring = self.recipe.read_shown(self.goals[name]), self.recipe.read_scoring(self.goals[name])
        chosen = [(request, shows, lacks) for (request, shows), (_, lacks) in zip(*shown, strict=True)]
        asked = self.recipe.read_prompts("evaluation") * MEASURED
        return chosen, [*zip(asked, scoring.positive, scoring.negative, strict=False)][:MEASURED]

    def push(self, names: Sequence[str], bank: sl.ConceptBank) -> Push:
        """Each latent by the same share of the length of activations at its site."""
        lengths = {name: bank[name].unit * float(bank.rows(bank[name]).write.norm()) for name in names}
        return Push(bank, {n: SHARE * (bank.sites[bank.site_of(bank[n])].norm or 1) / own for n, own in lengths.items()})

    def scaled(self, push: Push, text: Unrelated, target: float, near: float = NEAR) -> Push:
        """The push, larger or smaller, that costs a text so many nats per token."""
        times = lambda factor: Push(push.bank, {name: factor * amount for name, amount in push.amounts.items()})  # noqa: E731

        def kl(factor: float) -> float:
            with times(factor).on(self.model):
                return text.side_effects(Condition(name="")).kl

        return times(at_kl(target, kl, near))

    @torch.no_grad()
    def effects(self, pushes: Sequence[Push], pairs: Sequence[Pair]) -> list[list[float]]:
        """What each push does to the goal, by pair."""
        done, found = laid(self.model, self.tokenizer, pairs), []
        before = goal(self.model, done)
        for push in pushes:
            with push.on(self.model):
                found.append((goal(self.model, done) - before).tolist())
        return found

    def alone(self, name: str) -> dict[str, list[float]]:
        """Effects of the latents that the gradient favours, each moved alone."""
        pairs, widths = self.pairs(name)[0], {site: facts.width for site, facts in self.bank.sites.items()}
        names = screened(slopes(self.model, laid(self.model, self.tokenizer, pairs[:PAIRS]), widths), self.encoders)
        pushes = [self.push([own], self.bank) for own in names]
        scaled = [self.scaled(push, self.ordinary[0], ALONE, 0.1) for push in progress(pushes, f"latents for {name}")]
        return dict(zip(names, self.effects(scaled, pairs[PAIRS:]), strict=True))

    def sets(self, name: str, best: Sequence[str]) -> dict[str, list[Push]]:
        """By rule, sets of as many latents, or directions, as are wanted at most."""
        (_, *texts), bank = zip(*self.pairs(name)[0], strict=True), self.bank
        random, most = np.random.default_rng([*self.goals].index(name)), SETTINGS[-1][0]
        going = select(self.model, self.tokenizer, bank, *texts, count=most)
        sets = {
            "correlation": [[concept.name for concept, _ in going]],
            "effect": [best[:most]],
            "random latents": [alike(best[:most], self.encoders, random) for _ in range(DRAWS["random latents"])],
        }
        drawn = [self.push(best[:most], astray(bank, self.encoders, seed)) for seed in range(DRAWS["random directions"])]
        return {way: [self.push(own, bank) for own in some] for way, some in sets.items()} | {"random directions": drawn}

    def measured(self, name: str) -> dict[str, Any]:
        """By setting and rule, amounts of sets at equal KL and their effects `[S, T]`; and what they write."""
        tried = remembered(self.work / f"{name} alone.json", lambda: self.alone(name))
        found: dict[str, Any] = {"tried": len(tried), "kept": kept(tried), "settings": {}}
        sets, pairs = self.sets(name, found["kept"]), self.pairs(name)[1]
        for count, cost in progress(SETTINGS, f"sets for {name}"):
            own = found["settings"][f"{count}, {cost}"] = {}
            for way, some in sets.items():
                few = [Push(push.bank, dict([*push.amounts.items()][:count])) for push in some]
                scaled = [self.scaled(push, self.ordinary[1], cost) for push in few]
                own[way] = {"amounts": [push.amounts for push in scaled], "effects": self.effects(scaled, pairs)}
        amounts = {"unsteered": {}} | {way: own[way]["amounts"][0] for way in READ[1:]}
        return found | {"written": {way: self.written(name, Push(self.bank, amounts[way])) for way in READ}}

    def written(self, name: str, push: Push) -> dict[str, Any]:
        """The judge's evidence of sampled answers, a mean, and greedy ones to be read."""
        model, tokenizer = self.model, self.tokenizer
        asked, how = [chat(tokenizer, prompt) for prompt in self.recipe.read_prompts("evaluation")], {"new_tokens": NEW}
        with push.on(model):
            drawn = complete(model, tokenizer, asked, seed=SEED, temperature=TEMPERATURE, **how).texts
            greedy = complete(model, tokenizer, asked[:SHOWN], **how).texts
        evidence = self.judge.evidence(drawn)[:, self.judge.names.index(name)]
        return {"evidence": float(evidence.mean()), "greedy": greedy}


def table(figures: Mapping[str, Any]) -> str:
    """Effects by goal with the judge's evidence, and ratios with their bars, as Markdown."""
    settings = [f"{count}, {cost}" for count, cost in SETTINGS]
    of = lambda setting, way: np.array([f["settings"][setting][way]["effects"] for f in figures.values()])  # noqa: E731
    effects = np.array([[of(setting, way).mean((1, 2)) for way in WAYS] for setting in settings])
    evidence = np.array([[f["written"][way]["evidence"] for f in figures.values()] for way in READ])
    chosen = [[{*f["settings"][settings[-1]][way]["amounts"][0]} for way in WAYS[:2]] for f in figures.values()]
    both = [f"{len(going & moving)} of {len(moving)}" for going, moving in chosen]
    names = [[name, f"{len(f['kept'])} of {f['tried']}", own] for (name, f), own in zip(figures.items(), both, strict=True)]
    columns = [_cells(own, "+.3f") for own in effects] + [_cells(evidence, "+.2f")]
    head = ["goal", "verified, of tried", "chosen by both rules", *settings, f"evidence at {settings[-1]}: {', '.join(READ)}"]
    bars = []
    for setting in settings:
        beside = ratio(of(setting, "effect"), of(setting, "correlation"))
        random = ratio(of(setting, "effect"), of(setting, "random latents"), sizes=True)
        bars.append([setting, *_reached(beside, BARS[0]), *_reached(random, BARS[1])])
    told = "latents, KL | effect / correlation (95 %) | ≥ {} | effect / random latents (95 %) | ≥ {}".format(*BARS)
    lines = [[*name, *cells] for name, *cells in zip([*names, ["**mean**", "", ""]], *columns, strict=True)]
    return f"{markdown(' | '.join(head), lines)}\n\n{markdown(told, bars)}"


def _cells(values: NDArray[Any], form: str) -> list[str]:
    """Of `[ways, G]`, by goal and for their mean, the values of all ways."""
    whole = np.concatenate([values, values.mean(1, keepdims=True)], 1)
    return [", ".join(format(value, form) for value in column) for column in whole.T]


def _reached(found: tuple[float, float, float], bar: float) -> tuple[str, str]:
    value, low, high = found
    said = "**no**" if value < bar else "yes" if low < bar else "yes, with its interval"
    return f"{value:.2f} ({low:.2f} to {high:.2f})", said


def main(
    work: Annotated[Path, typer.Option(help="where a run that stops goes on, and where the figures are")] = Path("out/causes"),
) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    study = Study(sl.ConceptBank.from_pretrained(BANK), work)
    make = {name: (lambda name=name: study.measured(name)) for name in study.goals}
    figures = {name: remembered(work / f"{name}.json", own) for name, own in progress(make.items(), "goals")}
    (work / "causes.json").write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(table(figures))


if __name__ == "__main__":
    typer.run(main)
