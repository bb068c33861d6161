"""What concepts of the text bank do to answers beside their own effect, foretold and spared: `python scripts/side_effects.py`.

Moves each concept of the shipped bank alone on requests to learn from, which gives a graph of answers. Then, on requests that
nothing was made from, holds its forecasts against what happens, and compares `do="spare"` with plain edits, with `do="hold"`,
and with the same amounts dealt to other concepts than those that are carried along. About an hour on a core, in bfloat16; goes
on where it stopped. With `--into` the graph is written into a copy of the bank.

d  change of each outcome, [M requests, O]     said, happened  mean changes of pairs: a concept, an outcome of another name
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from transformers import DynamicCache

import steerlib as sl
from steerlib.evaluation.text import judge_for, repeated
from steerlib.graph.edge import ANSWERS
from steerlib.origins import recipe_of
from steerlib.steering.sparing import spared
from steerlib.text import chat, logits, ordinary, progress, tokens_of
from steerlib.training.discover.answered import answered, foretold
from steerlib.training.discover.concept_graph import Moved
from steerlib.training.discover.text_graph import scores
from steerlib.training.store import remembered

BANK, NEW, ROWS, TEMPERATURE, PART, SEEDS = "smollm2-135m-instruct", 32, 96, 0.7, 0.6, 10
LEARN, UNRELATED, DEALT, DRAWN = 24, 8, 200, 1000
"""Requests to learn from; unrelated texts; how often effects are dealt, and requests drawn again."""
NEVER_USED = (
    "Describe the view from a bridge at noon.", "Tell me about something you lost and found again.",
    "Write a short message to a new neighbour.", "Explain why people wait in queues.", "How do I keep a promise?",
    "What would you do with an empty room?", "Describe a market early in the morning.", "Tell me a story about a key.",
    "Write a note to whoever finds this bottle.", "Explain what makes a place feel like home.", "How do I ask for help?",
    "What makes a good question?", "Describe the sound of an old house.", "Tell me about a long walk.",
    "Write a review of a very ordinary chair.", "Explain how habits begin.", "How should I spend a rainy afternoon?",
    "What do two old friends talk about?", "Describe someone waiting at a station.", "Tell me about a gift nobody expected.",
    "Write the first lines of a diary.", "Explain why maps are useful.", "How do I learn from a failure?",
    "What is worth remembering about today?",
)  # fmt: skip
"""Requests that nothing was made from or chosen with."""


class Arm(NamedTuple):
    """Amounts of concepts, in useful amounts, under which requests are answered, each several times."""

    id: str
    amounts: Mapping[str, float]
    prompts: Sequence[str]
    samples: int
    seed: int = 0
    hold: tuple[str, ...] = ()


class Drawing:
    """A model that answers under edits of a bank; `folder` keeps what it said."""

    def __init__(self, bank: sl.ConceptBank, source: str, folder: Path):
        self.bank, self.source, self.folder, self.path = bank, source, folder, folder / "answers.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        self._before: torch.Tensor | None = None
        self.known: dict[str, list[list[str]]] = {line["id"]: line["texts"] for line in map(json.loads, lines)}

    @cached_property
    def model(self) -> tuple[Any, Any]:
        model, tokenizer = sl.load(self.source)
        return model.to(torch.bfloat16), tokenizer

    def texts(self, arms: Sequence[Arm]) -> dict[str, list[list[str]]]:
        """Answers by arm, prompt and sample."""
        left = [arm for arm in arms if arm.id not in self.known]
        for group in progress(_grouped(left), "answers"):
            for arm, texts in zip(group, self._drawn(group), strict=True):
                self.known[arm.id] = texts
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"id": arm.id, "texts": texts}) + "\n")
        return {arm.id: self.known[arm.id] for arm in arms}

    @torch.no_grad()
    def _drawn(self, arms: Sequence[Arm]) -> list[list[list[str]]]:
        """Answers of several arms in a batch; the same chance for each request and sample in all of them."""
        (model, tokenizer), one = self.model, arms[0]
        count, each = len(one.prompts), one.samples
        asked = tokens_of(model, tokenizer, [chat(tokenizer, prompt) for _ in arms for prompt in one.prompts])
        # each request is read once and answered several times; what a twin reads cannot be shared between rows
        before, after = (1, each) if not one.hold else (each, 1)
        mask = asked.mask.long().repeat_interleave(before, 0)
        keys = [1000 * (997 * (one.seed + s) + _place(prompt)) for prompt in one.prompts for s in range(each)]
        with ExitStack() as stack:
            session = stack.enter_context(self.steered(arms, count * before))
            given: dict[str, Any] = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
            given |= {"past_key_values": DynamicCache(), "use_cache": True}
            out = model(input_ids=asked.ids.repeat_interleave(before, 0), logits_to_keep=1, **given)
            if after > 1:
                out.past_key_values.batch_repeat_interleave(after)
                session.set(self.edits(arms, count * after))
            mask, scores, new = mask.repeat_interleave(after, 0), out.logits[:, -1].repeat_interleave(after, 0), []
            for step in range(NEW):
                noise = _gumbel(keys, step, scores.shape[1]).repeat(len(arms), 1)
                new.append((scores.float() / TEMPERATURE + noise).argmax(-1))
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
                given = {"attention_mask": mask, "position_ids": (mask.sum(1) - 1)[:, None]}
                out = model(input_ids=new[-1][:, None], past_key_values=out.past_key_values, use_cache=True, **given)
                scores = out.logits[:, -1]
        found = tokenizer.batch_decode(_ended(torch.stack(new, 1), tokenizer), skip_special_tokens=True)
        return np.array([text.strip() for text in found], dtype=object).reshape(len(arms), count, each).tolist()

    def edits(self, arms: Sequence[Arm], each: int) -> dict[str, Any]:
        """Those of all arms, each on rows of its own."""
        names = dict.fromkeys(name for arm in arms for name in arm.amounts)
        useful = {name: self.bank[name].useful or 0.0 for name in names}
        if len(arms) == 1:
            return {name: useful[name] * arms[0].amounts[name] for name in names}
        amounts = {name: [useful[name] * arm.amounts.get(name, 0.0) for arm in arms for _ in range(each)] for name in names}
        return {name: sl.Add(own) for name, own in amounts.items()}

    def steered(self, arms: Sequence[Arm], each: int) -> Any:
        how: dict[str, Any] = {"do": "hold", "hold": arms[0].hold} if arms[0].hold else {}
        return sl.steer(self.model[0], self.bank, self.edits(arms, each), **how)

    def kl(self, arm: Arm, texts: Sequence[str]) -> float:
        """What an arm does to the next token on unrelated texts, in nats per token."""
        return remembered(self.folder / "kl" / f"{arm.id}.json", lambda: self._kl(arm, texts))

    @torch.no_grad()
    def _kl(self, arm: Arm, texts: Sequence[str]) -> float:
        """KL(p_0 || p_s) of the next token on unrelated texts, in nats per token."""
        done = ordinary(*self.model, texts, NEW)
        if self._before is None:
            self._before = logits(self.model[0], done).float().log_softmax(-1)
        before = self._before
        with self.steered([arm], len(texts)):
            after = logits(self.model[0], done).float().log_softmax(-1)
        return float((before.exp() * (before - after)).sum(-1)[done.new[1]].mean())


def _grouped(arms: Sequence[Arm]) -> list[list[Arm]]:
    """Arms of the same requests that go into a batch; one that holds stays alone."""
    groups: list[list[Arm]] = []
    for arm in arms:
        fits = bool(groups) and not arm.hold and groups[-1][0][2:] == arm[2:]
        if fits and (len(groups[-1]) + 1) * len(arm.prompts) * arm.samples <= ROWS:
            groups[-1].append(arm)
        else:
            groups.append([arm])
    return groups


def _place(prompt: str) -> int:
    return sum((i + 1) * ord(letter) for i, letter in enumerate(prompt)) % 100_003


def _gumbel(keys: Sequence[int], step: int, size: int) -> torch.Tensor:
    """Noise whose maximum samples from a softmax."""
    made = torch.Generator()
    return torch.stack([-torch.empty(size).exponential_(generator=made.manual_seed(key + step)).log() for key in keys])


def _ended(new: torch.Tensor, tokenizer: Any) -> torch.Tensor:
    """Tokens up to the end of each answer."""
    over = (new == tokenizer.eos_token_id).long().cumsum(1) > 0
    return torch.where(over, torch.full_like(new, tokenizer.eos_token_id), new)


class Study:
    """Answers of all arms, with scores; arms by what they are for: to learn from, and to be measured on."""

    def __init__(self, bank: sl.ConceptBank, work: Path):
        self.bank, self.recipe = bank, recipe_of(bank, None)
        self.names = [concept.name for concept in bank.concepts.values() if concept.useful is not None]
        self.judge, self.drawing = judge_for(self.recipe.scorers), Drawing(bank, self.recipe.source, work)
        self._read: dict[str, dict[str, NDArray[Any]]] = {}

    def arms(self, kind: str, many: Mapping[str, Mapping[str, float]], samples: int = 2, hold: bool = False) -> list[Arm]:
        """One for each concept."""
        learn = kind.startswith("learn")
        prompts, seed = (self.recipe.read_prompts("train")[:LEARN], 0) if learn else (NEVER_USED, SEEDS)
        held = {name: tuple(other for other in self.names if other != name) if hold else () for name in many}
        return [Arm(f"{kind} {name}", own, prompts, samples, seed, held[name]) for name, own in many.items()]

    def read(self, arm: Arm) -> dict[str, NDArray[Any]]:
        """Of an arm's answers, means over samples: `evidence [M, O]`, `points [M, O]` and `repeated [M]`."""
        if arm.id in self._read:
            return self._read[arm.id]
        texts = self.drawing.texts([arm])[arm.id]
        flat = [text for some in texts for text in some]
        found = {"evidence": self.judge.evidence(flat), "points": self.judge(flat)}
        found["repeated"] = np.array([repeated(text) for text in flat])
        means = {name: values.reshape(len(texts), -1, *values.shape[1:]).mean(1) for name, values in found.items()}
        return self._read.setdefault(arm.id, means)

    def moves(self, arms: Sequence[Arm], plain: Arm, what: str = "evidence") -> list[Moved]:
        """What each arm's concept did."""
        before, found = self.read(plain)[what], []
        for arm in arms:
            name, share = next(iter(arm.amounts.items()))
            found.append(Moved(name, share * (self.bank[name].useful or 0.0), self.read(arm)[what] - before))
        return found

    @cached_property
    def single(self) -> dict[str, dict[str, float]]:
        """Each concept alone, at its useful amount."""
        return {name: {name: 1.0} for name in self.names}

    @cached_property
    def graph(self) -> sl.CausalGraph:
        (plain,) = self.arms("learn", {"unsteered": {}}, 4)
        arms = self.arms("learn", self.single)
        self.drawing.texts([plain, *arms])
        return answered(self.moves(arms, plain), self.judge.names)

    @cached_property
    def spare(self) -> dict[str, dict[str, float]]:
        """Of concepts that carry others along, the amounts that `do="spare"` plans."""
        bank, found = self.bank.with_concepts(graph=self.graph), {}
        for name in self.names:
            planned: Any = spared(bank, {name: sl.Add(bank[name].useful or 0.0)})
            found[name] = {other: edit.amount / (bank[other].useful or 1.0) for other, edit in planned.items()}
        return {name: own for name, own in found.items() if len(own) > 1}

    @cached_property
    def dealt(self) -> dict[str, dict[str, float]]:
        """The same with the amounts of spared concepts given to others."""
        random, found = np.random.default_rng(1), {}
        for name, own in self.spare.items():
            free = [other for other in self.names if other not in own]
            taken = [free[i] for i in random.choice(len(free), len(own) - 1, replace=False)]
            amounts = [own[other] for other in self.names if other in own and other != name]
            found[name] = {name: own[name], **dict(zip(taken, amounts, strict=True))}
        return found


def forecasts(study: Study, plain: Arm, arms: Sequence[Arm]) -> dict[str, Any]:
    """How well the graph tells what other outcomes do, beside the same effects dealt among its edges."""
    rows = foretold(study.graph, study.moves(arms, plain), study.judge.names)
    said, happened = (np.array([getattr(row, name).mean() for row in rows]) for name in ("said", "happened"))
    error = np.array([row.happened.std(ddof=1) / np.sqrt(len(row.happened)) for row in rows])
    away, random, told = np.abs(happened) > 2 * error, np.random.default_rng(0), np.flatnonzero(said)
    found = {"pairs": len(rows), "with an edge": len(told), "moved": int(away.sum()), "r2": scores(rows)["r2"]}
    found |= {"r2 interval": scores(rows)["r2 interval"], **_signs(said, happened, away), "dealt": [], "dealt sign": []}
    for _ in range(DEALT):
        dealt = said.copy()
        dealt[told] = said[random.permutation(told)]
        found["dealt"].append(_r2(dealt, happened))
        found["dealt sign"].append(_signs(dealt, happened, away)["sign"])
    points = _points(study, plain, arms)
    return {**found, "dealt": float(np.mean(found["dealt"])), "dealt sign": float(np.mean(found["dealt sign"])), **points}


def _signs(said: NDArray[Any], happened: NDArray[Any], away: NDArray[Any]) -> dict[str, Any]:
    """Of pairs that surely moved and have an edge, in how many it says the direction."""
    both = away & (said != 0)
    return {"told": int(both.sum()), "sign": float((np.sign(said) == np.sign(happened))[both].mean())}


def _r2(said: NDArray[Any], happened: NDArray[Any]) -> float:
    return 1 - float(np.square(happened - said).sum() / np.square(happened).sum())


def _points(study: Study, plain: Arm, arms: Sequence[Arm]) -> dict[str, float]:
    """The same for probabilities, as the table of the bank's specificity has them: forecasts are added to the evidence of
    unsteered answers."""
    base, names, said, happened = study.read(plain)["evidence"], study.judge.names, [], []
    for own in study.moves(arms, plain, "points"):
        told = study.graph.forecast({own.name: own.amount})
        change = np.array([told.get(ANSWERS + name, 0.0) for name in names])
        others = [k for k, name in enumerate(names) if name != own.name]
        said.append((_softmax(base + change) - _softmax(base)).mean(0)[others])
        happened.append(own.d.mean(0)[others])
    return {"r2 of probabilities": _r2(np.concatenate(said), np.concatenate(happened))}


def _softmax(x: NDArray[Any]) -> NDArray[Any]:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kept(study: Study, name: str, plain: Arm, arm: Arm, texts: Sequence[str]) -> dict[str, Any]:
    """What an arm does: the rise of its concept, specificity, repetition, and KL where a plain edit and a spared one differ."""
    before, after = study.read(plain), study.read(arm)
    own, gains = study.judge.names.index(name), after["points"] - before["points"]
    found = {"gain": float(gains.mean(0)[own]), "specificity": _specificity(gains.mean(0), own), "amounts": dict(arm.amounts)}
    found |= {"repeated": float(after["repeated"].mean()), "gains": gains.round(5).tolist(), "column": own}
    is_compared = name in study.spare and arm.id.partition(" ")[0] in ("full", "spare")
    return found | {"kl": study.drawing.kl(arm, texts) if is_compared else None}


def _specificity(gains: NDArray[Any], own: int) -> float:
    """Gain of the concept over the gains of all: that of `evaluation.score`."""
    gain = max(0.0, float(gains[own]))
    return gain / (gain + float(np.maximum(0, np.delete(gains, own)).sum())) if gain else 0.0


def ahead(concepts: Sequence[Mapping[str, Any]], other: str) -> tuple[float, float, float]:
    """By how much `spare` is more specific than another way, a mean over concepts; 95 % interval by bootstrap over requests."""
    random = np.random.default_rng(0)
    pairs = [[(np.array(own[w]["gains"]), own[w]["column"]) for w in ("spare", other)] for own in concepts]
    count = len(pairs[0][0][0])
    picks = [np.arange(count), *random.integers(0, count, (DRAWN, count))]
    found = [
        np.mean([_specificity(x[p].mean(0), k) - _specificity(y[p].mean(0), k) for (x, k), (y, _) in pairs]) for p in picks
    ]
    low, high = np.quantile(found[1:], (0.025, 0.975))
    return float(found[0]), float(low), float(high)


def measured(study: Study, texts: Sequence[str]) -> dict[str, Any]:
    """All figures."""
    (plain,) = study.arms("never used", {"unsteered": {}}, 4)
    full, part = study.arms("full", study.single), study.arms("part", {n: {n: PART} for n in study.names}, 3)
    carrying = {name: study.single[name] for name in study.spare}
    ways = {
        "spare": study.arms("spare", study.spare),
        "dealt": study.arms("dealt", study.dealt),
        "hold": study.arms("hold", carrying, hold=True),
    }
    study.drawing.texts([plain, *full, *part, *(arm for arms in ways.values() for arm in arms)])
    own = {name: {"plain": kept(study, name, plain, arm, texts)} for name, arm in zip(study.names, full, strict=True)}
    for way, arms in ways.items():
        for name, arm in zip(carrying, arms, strict=True):
            own[name][way] = kept(study, name, plain, arm, texts)
    told = {"useful amount": forecasts(study, plain, full), f"{PART} of it": forecasts(study, plain, part)}
    edges = [edge.to_dict() for edge in study.graph.answers]
    return {"forecasts": told, "concepts": own, "edges": edges, "repeated": float(study.read(plain)["repeated"].mean())}


WAYS = ("plain", "hold", "spare", "dealt")


def table(figures: Mapping[str, Any]) -> str:
    """Both tables, as Markdown."""
    head = "amount | R² | R², probabilities | right sign | dealt: R² | dealt: right sign | pairs with an edge, of all"
    lines = [f"| {head} |", "|---" * 7 + "|"]
    for name, f in figures["forecasts"].items():
        low, high = f["r2 interval"]
        cells = [
            f"{f['r2']:.2f} ({low:.2f} to {high:.2f})",
            f"{f['r2 of probabilities']:.2f}",
            f"{f['sign']:.0%} of {f['told']}",
        ]
        cells += [f"{f['dealt']:.2f}", f"{f['dealt sign']:.0%}", f"{f['with an edge']} of {f['pairs']}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", f"| concept | {' | '.join(WAYS)} | amounts of `spare`, in useful amounts |", "|---" * 6 + "|"]
    for name, own in figures["concepts"].items():
        amounts = ", ".join(f"{other} {amount:+.2f}" for other, amount in own.get("spare", own["plain"])["amounts"].items())
        cells = [_cell(own[way]) if way in own else "as plain" if way == "spare" else "" for way in WAYS]
        lines.append(f"| {name} | {' | '.join(cells)} | {amounts} |")
    carrying = [own for own in figures["concepts"].values() if "spare" in own]
    whole = {way: [own.get(way, own["plain"]) for own in figures["concepts"].values()] for way in ("plain", "spare")}
    some = {way: [own[way] for own in carrying] for way in WAYS}
    lines.append(f"| **mean of these {len(carrying)}** | {' | '.join(_mean(some[way]) for way in WAYS)} | |")
    cells = [_mean(whole[way]) if way in whole else "" for way in WAYS]
    lines.append(f"| **mean of all {len(figures['concepts'])}** | {' | '.join(cells)} | |")
    more = ["{} {:+.2f} ({:+.2f} to {:+.2f})".format(way, *ahead(carrying, way)) for way in WAYS if way != "spare"]
    said = f"Specificity of `spare`, on these {len(carrying)}, less that of {', of '.join(more)}."
    return "\n".join([*lines, "", f"{said} Unsteered answers repeat {figures['repeated']:.3f} of their trigrams."])


def _cell(own: Mapping[str, Any]) -> str:
    kl = "–" if own["kl"] is None else f"{own['kl']:.2f}"
    return f"{own['gain']:.2f}, **{own['specificity']:.2f}**, {kl}, {own['repeated']:.3f}"


def _mean(some: Sequence[Mapping[str, Any]]) -> str:
    columns = {key: [own[key] for own in some] for key in ("gain", "specificity", "kl", "repeated")}
    return _cell({key: None if None in own else float(np.mean(own)) for key, own in columns.items()})


def main(
    out: Annotated[Path, typer.Option(help="write the figures here as JSON")] = Path("out/side_effects.json"),
    work: Annotated[Path, typer.Option(help="where a run that stops goes on")] = Path("out/side-effects"),
    into: Annotated[Path | None, typer.Option(help="write the bank with the graph to this folder")] = None,
) -> None:
    """Measure and print."""
    study = Study(sl.ConceptBank.from_pretrained(BANK), work)
    unrelated = study.recipe.read_texts(study.recipe.unrelated)[:UNRELATED]
    figures = measured(study, unrelated)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(figures, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    print(table(figures))
    if into is not None:
        study.bank.with_concepts(graph=study.graph).save_pretrained(into)


if __name__ == "__main__":
    typer.run(main)
