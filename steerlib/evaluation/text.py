"""Does steering move the text, and what does it cost in fluency? No language model judges here.

A *scorer* never saw a text that directions were made from: sentence embeddings with a logistic regression trained on
texts of its own, or a count of words. Fluency is the likelihood of a text under the *unsteered* model.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from ..bank.sentences import embed
from ..errors import BadRecipe, MissingExtra
from ..text import Completions, at_once, logits
from .judges import Endpoint, judged

Scorer = Callable[[Sequence[str]], Float[np.ndarray, " texts"]]


class Asked(NamedTuple):
    """A judge of requests and answers in the place of a scorer, and the concept that it is asked for."""

    judge: Callable[..., Any]
    concept: str


FEW = 8
"""With fewer concepts than this, a judge learns ordinary texts as a class of their own."""
ABOUT = ("{}", "This text is about {}.", "A {} story.", "Talk about {}.", "Let me tell you about {}.")
"""What a text is compared with to see how near it is to a name."""


def counter(pattern: str, per: str) -> Scorer:
    """Matches of a pattern per `word` or per `sentence`."""
    found, whole = re.compile(pattern, re.IGNORECASE), {"word": r"\w+(?:['’]\w+)?", "sentence": r"[.!?…]+(?:\s|$)|$"}[per]
    unit = re.compile(whole)
    return lambda texts: np.array([len(found.findall(text)) / max(1, len(unit.findall(text.strip()))) for text in texts])


def shortness(texts: Sequence[str]) -> Float[np.ndarray, " texts"]:
    """Minus the logarithm of the number of words."""
    return -np.log([max(1, len(text.split())) for text in texts])


def nearness(name: str) -> Scorer:
    """Cosine of a text's sentence embedding with that of a concept's name, alone and in sentences about it."""
    said = [said.format(name) for said in ABOUT]
    return lambda texts: embed(texts) @ embed(said).mean(0)


def counting(spec: Mapping[str, Any], concept: str = "") -> Scorer | Asked:
    """The scorer that a recipe describes by what to count, by a name that texts are compared with, or by an endpoint that is
    asked for a concept."""
    if spec == {"count": "words"}:
        return shortness
    if spec.keys() >= {"endpoint", "model"}:
        return _endpoint(concept, **spec)
    if spec.keys() == {"near"} and isinstance(spec["near"], str) and spec["near"].strip():
        return nearness(spec["near"])
    if set(spec) != {"pattern", "per"} or spec["per"] not in ("word", "sentence"):
        raise BadRecipe(
            "expected a scorer with count = 'words', with near = a name, with endpoint and model, or with pattern and per = "
            f"'word' or 'sentence', got {dict(spec)}"
        )
    try:
        return counter(spec["pattern"], spec["per"])
    except (re.error, TypeError) as error:
        raise BadRecipe(f"expected a regular expression as pattern of a scorer, got {spec['pattern']!r:.80}: {error}") from None


def _endpoint(concept: str, endpoint: Any, model: Any, **options: Any) -> Asked:
    given = {"endpoint": endpoint, "model": model, **options}
    if options.keys() - {"rubric", "cache", "key"} or not all(isinstance(value, str) for value in given.values()):
        raise BadRecipe(
            f"expected a scorer with endpoint and model, and rubric, cache and key if need be, as texts, got {given}"
        )
    return Asked(Endpoint(endpoint, model, **options), concept)


class Scoring(NamedTuple):
    """Texts with a concept and texts without it, and whether they are others than the concept was made from."""

    positive: list[str]
    negative: list[str]
    others: bool


@dataclass(frozen=True, eq=False)
class Judge:
    """How much of each concept a text has: P(concept | text) over all concepts at once, by logistic regression on sentence
    embeddings; for some concepts a count.

    `names` lists the `classes` of the regression first, counted concepts after them. `languages` holds those that texts of a
    concept are in.
    """

    names: tuple[str, ...]
    classes: int
    model: Any
    counters: Mapping[str, Scorer | Asked]
    languages: Mapping[str, str]

    @classmethod
    def fit(
        cls,
        texts: Mapping[str, Sequence[str]],
        *,
        ordinary: Sequence[str] = (),
        counters: Mapping[str, Scorer | Asked] | None = None,
        shuffle: bool = False,
        seed: int = 0,
    ) -> "Judge":
        """Learn from texts of each concept; `ordinary` texts are a class of their own, which is not reported.

        With `shuffle` the labels are permuted at random: a control that must fail.
        """
        try:
            from sklearn.linear_model import LogisticRegression
        except ImportError:
            raise MissingExtra("scoring texts needs scikit-learn: pip install 'steerlib[eval]'") from None
        counters, groups = counters or {}, [*texts.values(), *([ordinary] if ordinary else [])]
        if texts and len(groups) < 2:
            raise BadRecipe("a scorer needs ordinary texts beside those of a single concept")
        labels = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
        if shuffle:
            labels = np.random.default_rng(seed).permutation(labels)
        model = LogisticRegression(C=10.0, max_iter=5000, random_state=seed)
        if texts:
            model.fit(embed([text for group in groups for text in group]), labels)
        spoken = {name: language(own) for name, own in texts.items()}
        return cls((*texts, *counters), len(texts), model, counters, spoken)

    def __call__(self, texts: Sequence[str], requests: Sequence[str] = ()) -> Float[np.ndarray, "texts concepts"]:
        """Scores by concept, of texts that answer requests, if they do."""
        asked = requests or [""] * len(texts)
        scored = [
            judged(s.judge, asked, texts, s.concept) if isinstance(s, Asked) else s(texts) for s in self.counters.values()
        ]
        counts = [score[:, None] for score in scored]
        likely = [self.model.predict_proba(embed(texts))[:, : self.classes]] if self.classes else []
        return np.concatenate([*likely, *counts], axis=1)

    def evidence(self, texts: Sequence[str]) -> Float[np.ndarray, "texts classes"]:
        """By concept of the regression, its logit: scores before concepts compete for a text. It rises and falls in proportion
        with what a text says of the concept, whatever else the text says."""
        found = self.model.decision_function(embed(texts))
        return (np.stack([-found, found], 1) if found.ndim == 1 else found)[:, : self.classes]

    def accuracy(self, texts: Sequence[str], concepts: Sequence[str]) -> float:
        """Share of texts whose own concept is the likeliest class."""
        return float((self.model.predict(embed(texts)) == [self.names.index(name) for name in concepts]).mean())


def judge_for(concepts: Mapping[str, Scoring | Scorer | Asked], *, shuffle: bool = False) -> Judge:
    """The judge of some concepts, each given by the texts to learn from or by a rule that counts.

    With `shuffle` the labels of texts are permuted at random, as a control.
    """
    read = {name: found for name, found in concepts.items() if isinstance(found, Scoring)}
    return Judge.fit(
        {name: found.positive for name, found in read.items()},
        ordinary=[text for found in read.values() for text in found.negative] if len(read) < FEW else (),
        counters={name: found for name, found in concepts.items() if not isinstance(found, Scoring)},
        shuffle=shuffle,
    )


def trust(concepts: Mapping[str, Scoring | Scorer | Asked], texts: Sequence[str], names: Sequence[str]) -> str:
    """How far the judge of some concepts can be trusted, for a card: its accuracy on texts it never saw, whose concepts are
    `names`, beside that of one that learned shuffled labels."""
    asked = [f"{name}: scored by {found.judge.model}." for name, found in concepts.items() if isinstance(found, Asked)]
    counted = [name for name, found in concepts.items() if not isinstance(found, Scoring | Asked)]
    said = [*asked, *([f"{', '.join(counted)}: scored by a rule of the recipe."] if counted else [])]
    own = [name for name, found in concepts.items() if isinstance(found, Scoring) and not found.others]
    if own:
        said.append(f"{', '.join(own)}: scored by a classifier of the very examples it was made from, for want of others.")
    if texts:
        right, shuffled = (judge_for(concepts, shuffle=shuffle).accuracy(texts, names) for shuffle in (False, True))
        said.append(
            f"The scorer (all-MiniLM-L6-v2 and logistic regression) names the concept of {right:.1%} of {len(texts)} texts it "
            f"never saw; after learning shuffled labels, of {shuffled:.1%}."
        )
    return " ".join(said)


def relevance(requests: Sequence[str], texts: Sequence[str], of: Sequence[int]) -> Float[np.ndarray, " texts"]:
    """Cosine of each text with the request it answers, `requests[of[i]]`, minus its mean cosine with the others."""
    cosines = embed(texts) @ embed(requests).T
    own = cosines[np.arange(len(texts)), list(of)]
    return own - (cosines.sum(1) - own) / max(1, len(requests) - 1)


def distinct(text: str, n: int = 2) -> float:
    """Share of a text's word n-grams that are different ones; 1 for a text too short to repeat itself."""
    words = text.lower().split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def repeated(text: str, n: int = 3) -> float:
    """Share of a text's n-grams of words and marks that it has said before: 0 for a text that never repeats itself. A word of
    more than twelve letters counts as several, so that one that never ends repeats itself."""
    words = re.findall(r"\w{1,12}(?:['’]\w+)*|[^\w\s]", text.lower())
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@cache
def _languages() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise MissingExtra("telling languages apart needs py3langid: pip install 'steerlib[eval]'") from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def language(texts: Sequence[str]) -> str:
    """The language of some texts together, as an ISO 639-1 code."""
    return _languages().classify("\n".join(texts))[0]


def foreign(texts: Sequence[str], language: str) -> Float[np.ndarray, " texts"]:
    """How much more a text is in another language than in one: the probability of the likeliest less that of this one. It is 0
    where this one is the likeliest, and small where none is sure, as for a text of one word."""
    found = [dict(_languages().rank(text)) for text in texts]
    return np.array([max(of.values()) - of[language] for of in found])


@torch.no_grad()
def nll(model: Any, done: Completions) -> Float[np.ndarray, " rows"]:
    """Mean negative log-likelihood of each answer under the model as it is, in nats per token."""
    out = []
    for rows in torch.arange(len(done.ids), device=done.ids.device).split(at_once(model, done.ids.shape[1] - done.prompt)):
        some = done.rows(rows)
        new, real = some.new
        own = torch.log_softmax(logits(model, some).float(), dim=-1).gather(-1, new[..., None])[..., 0]
        out.append(-(own * real).sum(1) / real.sum(1).clamp(min=1))
    return torch.cat(out).cpu().numpy()
