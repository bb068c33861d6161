"""Answers under every way of asking and steering, and what edits do to other text and with their dose."""

import copy
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..bank.concept_bank import BaseModel, ConceptBank, SiteFacts
from ..bank.concepts import Concept, Gate, Part
from ..encoders import Directions
from ..errors import OutOfRange
from ..steering.interventions import Add
from ..steering.session import steer
from ..text import Completions, at_once, chat, complete, logits, ordinary, progress, tokens_of
from .score import Scores, scored
from .text import Judge, nll

ROWS = 128
"""Answers written at once."""
TEMPERATURE = 0.7
RANDOM_DIRECTIONS = 3


@dataclass(frozen=True, eq=False, kw_only=True)
class Condition:
    """One way to answer requests: edits of a bank, words, both or neither.

    Edits are additions, in units, to some tokens and where the gate is open; an amount of 0 is no edit.
    """

    name: str
    bank: ConceptBank | None = None
    edits: Mapping[str, float] = field(default_factory=dict)
    instruction: str = ""
    gate: Gate | None = None
    tokens: Literal["all", "generated"] = "all"


def answer(
    model: Any,
    tokenizer: Any,
    conditions: Sequence[Condition],
    prompts: Sequence[str],
    judge: Judge,
    *,
    seeds: Sequence[int | None],
    new_tokens: int = 40,
    temperature: float = TEMPERATURE,
) -> Scores:
    """Answer every request under every condition and seed, and score the answers. A seed of None stands for greedy answers.

    Many conditions share a batch, each acting on rows of its own; those that ask in more words share others, which are longer.
    """
    plain = [chat(tokenizer, prompt, model=model) for prompt in prompts]
    at_once = max(1, ROWS // len(prompts))
    asking = [[k for k, c in enumerate(conditions) if bool(c.instruction) is with_words] for with_words in (False, True)]
    groups = [kind[i : i + at_once] for kind in asking for i in range(0, len(kind), at_once)]
    texts: list[list[list[str]]] = [[[] for _ in seeds] for _ in conditions]
    likelihood = np.zeros((len(conditions), len(seeds), len(prompts)))
    for g, s in progress([(g, s) for g in range(len(groups)) for s in range(len(seeds))], "answers"):
        some = [conditions[k] for k in groups[g]]
        asked = [chat(tokenizer, prompt, c.instruction, model) for c in some for prompt in prompts]
        how: dict[str, Any] = {"temperature": 0.0} if (seed := seeds[s]) is None else {"temperature": temperature, "seed": seed}
        with together(model, some, len(prompts)):
            done = complete(model, tokenizer, asked, new_tokens=new_tokens, **how)
        found = nll_behind(model, tokenizer, done, plain).reshape(len(some), len(prompts))
        for i, k in enumerate(groups[g]):
            texts[k][s] = done.texts[i * len(prompts) : (i + 1) * len(prompts)]
            likelihood[k, s] = found[i]
    return scored(texts, likelihood, prompts, judge)


@contextmanager
def together(model: Any, conditions: Sequence[Condition], each: int) -> Iterator[None]:
    """Inside the block, sessions of all conditions, each acting on `each` rows of its own and capped as any."""
    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.simplefilter("ignore", OutOfRange)  # what a search tries may be out of range, and stays capped
        for k, condition in enumerate(conditions):
            if condition.bank is not None and condition.edits:
                own = [row // each == k for row in range(len(conditions) * each)]
                where: Any = {"gate": condition.gate, "tokens": condition.tokens}
                edits = {n: Add([amount * mine for mine in own], **where) for n, amount in condition.edits.items()}
                stack.enter_context(steer(model, condition.bank, edits))
        yield


@torch.no_grad()
def nll_behind(model: Any, tokenizer: Any, done: Completions, requests: Sequence[str]) -> Float[np.ndarray, " rows"]:
    """Mean negative log-likelihood of answers, in nats per token, under the model as it is, had row i been asked
    `requests[i % len(requests)]`. Each request is read once where the model's cache can be shared between rows."""
    (new, real), plain = done.new, tokens_of(model, tokenizer, requests)
    index = torch.arange(len(new), device=new.device) % len(requests)
    asked, seen = plain.ids, plain.mask.long()
    first = None if plain.read else model(input_ids=asked, attention_mask=seen, use_cache=True, logits_to_keep=1)
    cache: Any = getattr(first, "past_key_values", None)
    layers = getattr(cache, "layers", [])
    if first is None or not layers or not all(hasattr(layer, "batch_select_indices") for layer in layers):
        asks: list[str] = [requests[int(i)] for i in index]
        return nll(model, tokens_of(model, tokenizer, asks, done.new))
    out = []
    for rows in index.new_tensor(range(len(new))).split(at_once(model, new.shape[1])):
        shared = copy.deepcopy(cache)
        shared.batch_select_indices(index[rows])
        mask = torch.cat((seen[index[rows]], real[rows].long()), 1)[:, :-1]
        rest = model(input_ids=new[rows, :-1], attention_mask=mask, past_key_values=shared).logits
        scores = torch.cat((first.logits[index[rows]], rest), 1).float().log_softmax(-1)
        own = scores.gather(-1, new[rows][..., None])[..., 0]
        out.append(-(own * real[rows]).sum(1) / real[rows].sum(1).clamp(min=1))
    return torch.cat(out).cpu().numpy()


def random_bank(concept: Concept, bank: ConceptBank, *, count: int = RANDOM_DIRECTIONS, seed: int = 0) -> ConceptBank:
    """Random directions wherever a concept is moved, as long as its own, sharing its units and its gate."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(own: Float[Tensor, " D"]) -> Float[Tensor, " D"]:
        found = torch.randn(len(own), generator=generator)
        return found * own.norm() / found.norm()

    writes = [bank.rows(place).write[0] for place in concept.places]
    found = [[drawn(own) for own in writes] for _ in range(count)]
    where = {f"{bank.site_of(place)}#{k}": bank.site_of(place) for k, place in enumerate(concept.places)}
    encoders = {id: Directions(torch.stack(rows)) for id, rows in zip(where, zip(*found, strict=True), strict=True)}
    sites = {site: bank.sites[site] for site in where.values()}
    concepts = []
    for i in range(count):
        first, *parts = (Part(encoder=id, index=i, unit=p.unit) for id, p in zip(where, concept.places, strict=True))
        facts = {"parts": tuple(parts), "gate": concept.gate, "match_norm": concept.match_norm, "keep_norm": concept.keep_norm}
        concepts.append(Concept(name=f"random-{i + 1}", encoder=first.encoder, index=i, unit=concept.unit, **facts))
    if concept.gate is not None:
        gate = bank[concept.gate.concept]
        read, bias, *_ = bank.rows(gate)
        site = bank.site_of(gate)
        # a direction d reads <x, d> / |d|^2 - mean
        encoders[f"{site}#gate"] = Directions(read / read.square().sum(), -bias)
        where[f"{site}#gate"] = site
        sites.setdefault(site, SiteFacts(width=read.shape[1]))
        concepts.append(Concept(name=gate.name, encoder=f"{site}#gate", index=0, unit=gate.unit, present=gate.present))
    return ConceptBank("random", concepts, encoders, base=BaseModel(), sites=sites, where=where)


class SideEffects(NamedTuple):
    """What edits do to text that has nothing to do with them, teacher-forced, per token: KL(p_0 || p_s) and the rise of the
    cross-entropy in nats, and the share of positions at which the likeliest next token stays the same."""

    kl: float
    loss: float
    agreement: float


class Unrelated:
    """Ordinary text as the unsteered model continues it; of an encoder-decoder, what it writes when its encoder reads it."""

    def __init__(self, model: Any, tokenizer: Any, texts: Sequence[str], *, length: int = 32, rows: int = 15):
        self.model = model
        done = ordinary(model, tokenizer, texts, length)
        self.parts = [done.rows(chosen) for chosen in torch.arange(len(done.ids), device=done.ids.device).split(rows)]
        self.before = [self._scores(part) for part in self.parts]

    def side_effects(self, condition: Condition) -> SideEffects:
        """Measure one condition."""
        sums = np.zeros(4)
        for part, before in zip(self.parts, self.before, strict=True):
            with together(self.model, [condition], len(part.ids)):
                after = self._scores(part)
            new, real = part.new
            kl = (before.exp() * (before - after)).sum(-1)
            fall = (before - after).gather(-1, new[..., None])[..., 0]
            same = before.argmax(-1) == after.argmax(-1)
            sums += [float(x[real].sum()) for x in (kl, fall, same.float(), real.float())]
        return SideEffects(*(float(x) for x in sums[:3] / sums[3]))

    @torch.no_grad()
    def _scores(self, part: Completions) -> Float[Tensor, "rows length vocab"]:
        return logits(self.model, part).float().log_softmax(-1)


class Response(NamedTuple):
    """How the propensity towards a concept, a mean over prompts, follows the dose.

    `slope`: least squares over all prompts, nats per unit of dose: steerability (Tan et al. 2024, arXiv 2407.12404).
    `spearman`: rank correlation of dose and propensity. `anti_steerable`: share of prompts with a negative slope. `symmetry`:
    slope of the negative doses over that of the positive ones; 1 where both pull alike.
    """

    doses: tuple[float, ...]
    propensity: tuple[float, ...]
    slope: float
    spearman: float
    anti_steerable: float
    symmetry: float


def lexicon(positive: Sequence[str], negative: Sequence[str], *, size: int = 20) -> list[str]:
    """Words that tell two sets of texts apart: log-odds ratio of smoothed document counts, among words of two texts or more."""
    counts = [_documents(texts) for texts in (positive, negative)]

    def log_odds(word: str, side: int, texts: Sequence[str]) -> float:
        n = counts[side][word]
        return float(np.log((n + 0.5) / (len(texts) - n + 0.5)))

    odds = {word: log_odds(word, 0, positive) - log_odds(word, 1, negative) for word, n in counts[0].items() if n >= 2}
    return sorted(odds, key=lambda word: (-odds[word], word))[:size]


def _documents(texts: Sequence[str]) -> Counter[str]:
    """In how many texts each word is."""
    words = ({"".join(c for c in w if c.isalpha() or c in "'’-") for w in text.lower().split()} - {""} for text in texts)
    return Counter(word for some in words for word in some)


@torch.no_grad()
def dose_response(
    model: Any,
    tokenizer: Any,
    bank: ConceptBank,
    concept: str,
    doses: Sequence[float],
    prompts: Sequence[str],
    words: Sequence[str],
    *,
    new_tokens: int = 24,
) -> Response:
    """Propensity at each dose, teacher-forced on the model's own unsteered answers: mean log-probability of the words minus
    that of other words which the unsteered model finds equally likely on average there. `doses` are amounts in units."""
    asked = [chat(tokenizer, prompt, model=model) for prompt in prompts]
    done = complete(model, tokenizer, asked, new_tokens=new_tokens)
    plain = _leaning(model, done)
    wanted = _first_tokens(tokenizer, words)
    others = _equally_likely(plain.mean(0), wanted, _word_tokens(tokenizer))
    before = _difference(plain, wanted, others)
    table = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OutOfRange)  # doses leave the safe range on purpose
        for dose in doses:
            with steer(model, bank, {concept: dose}, allow_ood=True):
                table.append(_difference(_leaning(model, done), wanted, others) - before if dose else before * 0)
    p, x = np.stack(table), np.array(doses)
    slopes, mean = _slope(x, p), p.mean(1)
    sides = [float(_slope(x[side], mean[side])) if side.sum() > 1 else 0.0 for side in (x <= 0, x >= 0)]
    return Response(
        doses=tuple(doses),
        propensity=tuple(float(v) for v in mean),
        slope=float(slopes.mean()),
        spearman=_spearman(x, mean),
        anti_steerable=float((slopes < 0).mean()),
        symmetry=sides[0] / sides[1] if sides[1] else 0.0,
    )


def _leaning(model: Any, done: Completions) -> Float[Tensor, "prompts vocab"]:
    """Mean log-probability of every token over the positions of each answer."""
    real = done.new[1][..., None].float()
    return (logits(model, done).float().log_softmax(-1) * real).sum(1) / real.sum(1)


def _first_tokens(tokenizer: Any, words: Sequence[str]) -> list[int]:
    """The first token of each word that has a letter in it, each once."""
    found = []
    for word in words:
        ids = tokenizer(" " + word, add_special_tokens=False)["input_ids"]
        found += [i for i in ids if any(map(str.isalpha, tokenizer.decode([i])))][:1]
    return list(dict.fromkeys(found))


def _word_tokens(tokenizer: Any) -> list[int]:
    """Tokens that are words with a space before them."""
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    return [i for i, token in enumerate(tokens) if token and token[0] in "Ġ▁" and len(token) > 3 and token[1:].isalpha()]


def _equally_likely(mean: Float[Tensor, " vocab"], wanted: Sequence[int], among: Sequence[int]) -> list[int]:
    """For each token another one, each once, whose mean log-probability is nearest."""
    free = {i: float(mean[i]) for i in among if i not in set(wanted)}
    chosen = []
    for token in wanted:
        best = min(free, key=lambda i: abs(free[i] - float(mean[token])))
        chosen.append(best)
        del free[best]
    return chosen


def _difference(leaning: Tensor, wanted: Sequence[int], others: Sequence[int]) -> Float[np.ndarray, " prompts"]:
    return (leaning[:, list(wanted)].mean(1) - leaning[:, list(others)].mean(1)).cpu().numpy()


def _slope(x: np.ndarray, y: np.ndarray) -> Any:
    centred = x - x.mean()
    return centred @ y / (centred @ centred)


def _spearman(x: np.ndarray, y: np.ndarray) -> float:
    first, second = (np.argsort(np.argsort(values)).astype(float) for values in (x, y))
    return float(np.corrcoef(first, second)[0, 1])
