"""Steering and prompting on one scale, without a language model as judge.

For each text: c, the probability of the concept; rel, how much closer it is to its own request than to others; nll, its
negative log-likelihood per token under the *unsteered* model that was asked the plain request; d2, its share of distinct
word pairs; r, its share of repeated word trigrams; f, how much more it is in another language than in the one asked for. With
U for the unsteered model and P for a prompt that asks for the concept:

    C = clip((c - c_U) / (c_P - c_U), 0, 1)
    R = clip(rel / rel_P, 0, 1)
    F = exp(-max(0, nll - max(nll_U, nll_P))) * clip(d2 / d2_U, 0, 1)
    V = clip(1 - 3 (r - r_U), 0, 1)
    L = clip((1 - f) / (1 - f_U), 0, 1)
    JFS = harmonic mean of C, R, F, each at least 0.05, times V and L
    ratio = (JFS - JFS_U) / (JFS_P - JFS_U)

so that an unsteered text has ratio 0, prompting 1; where prompting does not surely help (95 %), the ratio is undefined.
V and L are there because a text that says one sentence over and over is likely under any language model, and embeddings read
it as on the subject in whatever language. f_U is that of the language of the requests. Anchors are means over a concept's
texts. The harmonic mean of three scores, and strengths chosen on other prompts than those reported on, follow AxBench (Wu et
al. 2025, arXiv 2501.17148).
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from .text import Judge, distinct, foreign, language, relevance, repeated

DRAWS = 2000
"""Of the bootstrap."""
LOOP = 1 / 3
"""Share of repeated trigrams, beyond that of unsteered texts, at which a text is worth nothing."""
LEAST = 0.05
"""Of concept, relevance and fluency: what lacks one of them is worth more than what lacks all."""


class Scores(NamedTuple):
    """What was measured of every answer, each `[conditions, seeds, prompts]`.

    `foreign` is how much more an answer is in another language than in the one that each concept asks for and, last, than in
    that of the requests.
    """

    concepts: Float[np.ndarray, "conditions seeds prompts concepts"]
    relevance: Float[np.ndarray, "conditions seeds prompts"]
    nll: Float[np.ndarray, "conditions seeds prompts"]
    distinct: Float[np.ndarray, "conditions seeds prompts"]
    repeated: Float[np.ndarray, "conditions seeds prompts"]
    foreign: Float[np.ndarray, "conditions seeds prompts languages"]
    texts: list[list[list[str]]]

    def of(self, conditions: Sequence[int], seeds: slice = slice(None)) -> "Scores":
        """Some conditions only, in the order asked for, and some seeds."""
        chosen = list(conditions)
        return Scores(*(values[chosen, seeds] for values in self[:-1]), texts=[self.texts[i][seeds] for i in chosen])


def stacked(*several: Scores) -> Scores:
    """The conditions of several measurements of the same prompts and seeds."""
    numbers = ([scores[k] for scores in several] for k in range(len(Scores._fields) - 1))
    return Scores(*map(np.concatenate, numbers), texts=[text for scores in several for text in scores.texts])


def scored(
    texts: list[list[list[str]]],
    likelihood: Float[np.ndarray, "conditions seeds prompts"],
    prompts: Sequence[str],
    judge: Judge,
) -> Scores:
    """Answers by condition, seed and prompt, with their likelihood, measured."""
    flat = [text for by_seed in texts for by_prompt in by_seed for text in by_prompt]
    shape, plain = likelihood.shape, language(prompts)
    asked = [judge.languages.get(name, plain) for name in judge.names]
    strange = {tongue: foreign(flat, tongue).reshape(shape) for tongue in {*asked, plain}}
    return Scores(
        concepts=judge(flat, [*prompts] * (shape[0] * shape[1])).reshape(*shape, -1),
        relevance=relevance(prompts, flat, [i for _ in range(shape[0] * shape[1]) for i in range(shape[2])]).reshape(shape),
        nll=likelihood,
        distinct=np.array([distinct(text) for text in flat]).reshape(shape),
        repeated=np.array([repeated(text) for text in flat]).reshape(shape),
        foreign=np.stack([strange[tongue] for tongue in (*asked, plain)], -1),
        texts=texts,
    )


class Joint(NamedTuple):
    """The five scores between their anchors and what they come to, each `[conditions, seeds, prompts]`; `before` is the
    harmonic mean of the first three, which sees no loops and no languages."""

    concept: Float[np.ndarray, "conditions seeds prompts"]
    relevance: Float[np.ndarray, "conditions seeds prompts"]
    fluency: Float[np.ndarray, "conditions seeds prompts"]
    variety: Float[np.ndarray, "conditions seeds prompts"]
    language: Float[np.ndarray, "conditions seeds prompts"]
    before: Float[np.ndarray, "conditions seeds prompts"]
    total: Float[np.ndarray, "conditions seeds prompts"]


class Anchors(NamedTuple):
    """What a concept's scores are measured from and by; the names are those of the formulas above."""

    c_U: float
    reach: float
    rel_P: float
    nll: float
    d2_U: float
    r_U: float
    f_U: float


def anchors(scores: Scores, concept: int, *, prompted: Sequence[int] = (1,)) -> Anchors:
    """Of the first condition, unsteered, and those that are `prompted`: with several prompts, each score is on the scale of the
    one that does best at it."""
    c, p = scores.concepts[..., concept], list(prompted)
    c_p, rel_p = (float(values[p].mean((1, 2)).max()) for values in (c, scores.relevance))
    reach = c_p - float(c[0].mean())
    if reach <= 0:  # a model that cannot be asked: its own spread is the scale
        reach = max(float(c[0].std()), 1e-3)
    plain = [float(values[0].mean()) for values in (c, scores.nll, scores.distinct, scores.repeated, scores.foreign[..., -1])]
    nll = max(plain[1], float(scores.nll[p].mean((1, 2)).min()))
    return Anchors(plain[0], reach, max(rel_p, 1e-3), nll, *plain[2:])


def joint(scores: Scores, concept: int, *, prompted: Sequence[int] = (1,), by: Anchors | None = None) -> Joint:
    """C, R, F, V, L and what they come to (formulas above), by anchors of the same answers unless others are given."""
    by = by or anchors(scores, concept, prompted=prompted)
    C = np.clip((scores.concepts[..., concept] - by.c_U) / by.reach, 0, 1)
    R = np.clip(scores.relevance / by.rel_P, 0, 1)
    F = np.exp(-np.maximum(0, scores.nll - by.nll)) * np.clip(scores.distinct / by.d2_U, 0, 1)
    V = np.clip(1 - (scores.repeated - by.r_U) / LOOP, 0, 1)
    L = np.clip((1 - scores.foreign[..., concept]) / (1 - by.f_U), 0, 1)
    with np.errstate(divide="ignore"):
        before = 3 / (1 / C + 1 / R + 1 / F)
    total = 3 / sum(1 / np.maximum(each, LEAST) for each in (C, R, F))
    return Joint(C, R, F, V, L, before, total * V * L)


def ratios(totals: Mapping[str, Float[np.ndarray, " cells"]]) -> dict[str, dict[str, float]]:
    """`ratio` to prompting of each condition, and its 95 % interval from `low` to `high` by paired bootstrap over cells
    (concept, prompt). Nothing where the prompt does not surely raise JFS: then the scale has no sure length.

    `totals` holds JFS by condition, the same cells in the same order, `unsteered` and `prompted` among them.
    """
    table = np.stack(list(totals.values()))
    u, p = (list(totals).index(name) for name in ("unsteered", "prompted"))
    picks = np.random.default_rng(0).integers(0, table.shape[1], (DRAWS, table.shape[1]))
    means = np.stack([row[picks].mean(1) for row in table])
    gain, whole = means[p] - means[u], table.mean(1)
    if np.quantile(gain, 0.025) <= 0:
        return {name: {} for name in totals}
    found = (whole - whole[u]) / (whole[p] - whole[u])
    sure = gain > 0
    ends = np.quantile((means - means[u])[:, sure] / gain[sure], [0.025, 0.975], axis=1)
    return {
        name: {"ratio": float(found[i]), "low": float(ends[0, i]), "high": float(ends[1, i])} for i, name in enumerate(totals)
    }


def best_prompt(scores: Scores, concept: int) -> int:
    """Which condition after the first, unsteered one asks best for the concept, by the joint score of all of them.

    The concept's score alone would pick a prompt that forgets the request.
    """
    prompted = range(1, len(scores.concepts))
    return 1 + int(joint(scores, concept, prompted=prompted).total[1:].mean((1, 2)).argmax())


def specificity(scores: Scores, concept: int, condition: int) -> float:
    """Gain of the concept over that gain plus the gains of all others: 1 where nothing else rises; 0 without a gain."""
    return kept_apart(scores.concepts[condition].mean((0, 1)) - scores.concepts[0].mean((0, 1)), concept)


def kept_apart(gains: Float[np.ndarray, " classes"], concept: int) -> float:
    """`specificity` by the gains of all concepts."""
    own = max(0.0, float(gains[concept]))
    others = float(np.maximum(0, np.delete(gains, concept)).sum())
    return own / (own + others) if own > 0 else 0.0
