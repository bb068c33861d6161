"""What spoils contrast data, found before a model is loaded: `lint`.

A method learns whatever tells the two sides of the pairs apart. If that is their length, a subject that one side happens to be
about or an end cut off, it learns this instead of the concept. What tells them apart may also be the concept itself: texts
about cooking have the words of cooking. The scoring texts decide, which were written apart from the pairs: words that mark the
concept there too belong to it.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from ..errors import BadRecipe
from .entries import ConceptRecipe
from .recipe import DirectionRecipe, Recipe, TextEncoderRecipe

FEWEST = 4
"""Texts that a word has to be in before anything is said of it."""
OFTEN, SELDOM = 0.5, 0.1
"""Share of the texts of one side from which on a word marks it, and of the other side up to which it does."""
ORDINARY = 3
"""Texts of the reference that an ordinary word is in."""
ALIKE = 0.6
"""Share of threes of words that two texts have in common from which on they are nearly the same."""
LONGER, MOSTLY = 1.5, 0.8
"""How many times as long one side is, and in which share of the pairs, where length tells the sides apart."""
APART, CARRIED = 0.85, 0.65
"""Share of pairs that their words tell apart, and of scoring texts up to which the same words do not."""
ENDINGS = ("ing", "ers", "er", "ed", "es", "s", "y")
ENDS = frozenset(".!?…:;\"'”’»)]*~")
"""Characters that a whole text ends in."""


class Text(NamedTuple):
    """A text of a side, and where it stands."""

    file: str
    line: int
    text: str

    @property
    def words(self) -> list[str]:
        return re.findall(r"[^\W\d_]+", self.text.lower())

    @property
    def same(self) -> str:
        """Equal for texts that differ in spaces, case and punctuation only."""
        return " ".join(self.words)


@dataclass(frozen=True)
class Sides:
    """The contrast data of a concept.

    Args:
        concept: its name.
        named: roots of the words of its name and label, without ordinary ones; own: those of its instructions too.
        pairs: texts with it and texts without it, in pairs; scoring: those that its scorer learns from, if it has such.
        held_out: texts with it that only test the scorer.
        prompts: those of the pairs; kept: those that are kept for choosing and reporting.
    """

    concept: str
    named: frozenset[str] = frozenset()
    own: frozenset[str] = frozenset()
    pairs: tuple[Sequence[Text], Sequence[Text]] = ((), ())
    scoring: tuple[Sequence[Text], Sequence[Text]] = ((), ())
    held_out: Sequence[Text] = ()
    prompts: Sequence[Text] = ()
    kept: Sequence[Text] = ()

    @cached_property
    def counts(self) -> tuple[Counter[str], Counter[str]]:
        """In how many texts of each side of the pairs a word is."""
        return _counts(self.pairs[0]), _counts(self.pairs[1])


@dataclass(frozen=True)
class Finding:
    """Something that spoils contrast data.

    Attributes:
        level: "error": it cannot be meant; "advice": look at it.
        concept: whose data it is in.
        kind: what it is about.
        where: file and lines, or number of the example.
        what: what was found; do: what to do about it.
    """

    level: Literal["error", "advice"]
    concept: str
    kind: str
    where: str
    what: str
    do: str

    def __str__(self) -> str:
        return f"{self.level}: {self.concept}: {self.what} ({self.where}); {self.do}"


def lint(recipe: Recipe) -> list[Finding]:
    """Find what spoils the contrast data of a recipe; loads no model.

    Args:
        recipe: of concepts, or of encoders of a language model with `attributes`.

    Returns findings, errors first: texts that are empty, cut, or stand there twice or nearly; texts that stand on both sides,
    or in the scoring or held-out texts too; prompts that are kept for measuring; sides of other lengths or sizes; words of the
    concept on the side without it; words that mark a side and, by the scoring texts, not the concept. Without scoring texts
    words that mark a side may be the concept itself. Raises `BadRecipe` for a recipe without such data.

    >>> recipe = sl.Recipe.from_file("concept_banks/recipes/fresh/recipe.toml")
    >>> {(finding.level, finding.concept) for finding in sl.lint(recipe)}
    {('advice', 'archaic')}
    """
    found = [finding for sides in _read(recipe) for check in CHECKS for finding in check(sides)]
    return sorted(found, key=lambda finding: finding.level != "error")


# -- what is read ------------------------------------------------------------------------------------------------


def _read(recipe: Recipe) -> list[Sides]:
    if isinstance(recipe, TextEncoderRecipe) and recipe.attributes:
        return [Sides(Path(name).stem, scoring=_labelled(recipe, name)) for name in recipe.attributes]
    if not isinstance(recipe, DirectionRecipe):
        raise BadRecipe(
            f"recipe {recipe.name!r} has no contrast data of text: expected [[concepts]] of a language model, or attributes of "
            "encoders"
        )
    prompts = _lines(recipe, recipe.prompts)
    kept = [Text(recipe.prompts, n, line["prompt"]) for n, line in prompts if line["split"] != "train"]
    held = _lines(recipe, recipe.held_out)
    ordinary = _counts([Text("", 0, text) for text in recipe.read_texts(recipe.reference)])
    found = []
    for concept in recipe.concepts:
        named, own = (frozenset(map(_root, Text("", 0, said).words)) for said in _said(concept))
        name, scoring = f"{recipe.pairs}/{concept.name}.jsonl", f"{recipe.scoring}/{concept.name}.jsonl"
        lines, has_scoring = _lines(recipe, name), recipe.text_of(scoring) is not None
        sides = [_texts(name, lines, side) for side in ("positive", "negative")]
        if concept.positive:
            given = zip(("positive", "negative"), (concept.positive, concept.negative), strict=True)
            sides = [[Text(side, k, text) for k, text in enumerate(some, 1)] for side, some in given]
        found.append(
            Sides(
                concept.name,
                named - {_root(word) for word, count in ordinary.items() if count >= ORDINARY},
                own,
                (sides[0], sides[1]),
                _labelled(recipe, scoring) if has_scoring else ((), ()),
                [Text(recipe.held_out, n, line["text"]) for n, line in held if line["concept"] == concept.name],
                [] if concept.positive else [Text(name, n, _asked(line["prompt"])) for n, line in lines],
                kept,
            )
        )
    return found


def _said(concept: ConceptRecipe) -> tuple[str, str]:
    """What a concept is called, and how it is asked for beside."""
    named = f"{concept.name} {concept.label}"
    return named, f"{named} {' '.join(concept.instructions)}"


def _lines(recipe: Recipe, name: str) -> list[tuple[int, dict[str, Any]]]:
    """The lines of a file with their numbers."""
    return [(n, json.loads(line)) for n, line in enumerate((recipe.text_of(name) or "").split("\n"), 1) if line.strip()]


def _texts(name: str, lines: Iterable[tuple[int, dict[str, Any]]], key: str) -> list[Text]:
    return [Text(name, n, line[key]) for n, line in lines if key in line]


def _asked(prompt: Any) -> str:
    """A prompt, or the last of its messages."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def _labelled(recipe: Recipe, name: str) -> tuple[list[Text], list[Text]]:
    lines = _lines(recipe, name)
    one, other = (_texts(name, [(n, line) for n, line in lines if line["label"] == label], "text") for label in (1, 0))
    return one, other


# -- what is found -----------------------------------------------------------------------------------------------


def _empty(sides: Sides) -> Iterator[Finding]:
    every = [*_both(sides.pairs), *_both(sides.scoring)]
    if blank := [text for text in every if sum(map(str.isalpha, text.text)) < 2]:
        what = f"{blank[0].text!r} is no sentence"
        yield Finding("error", sides.concept, "empty", _where(blank), what, "write a sentence, or take the line out")
    if cut := [text for text in every if text not in blank and text.text.rstrip()[-1] not in ENDS]:
        what = f"{len(cut)} of {len(every)} texts end without a mark, such as …{cut[0].text.rstrip()[-24:]!r}"
        yield Finding("advice", sides.concept, "cut", _where(cut), what, "end them where a sentence ends, on both sides alike")


def _twice(sides: Sides) -> Iterator[Finding]:
    for texts in (*sides.pairs, *sides.scoring):
        same, near = _alike(texts, texts)
        if same:
            do = "keep one of them: twice the same text counts twice"
            yield Finding("error", sides.concept, "twice", _where(same), f"{same[0].text!r:.70} stands there again", do)
        if near:
            do = "write another one: texts that are nearly the same say no more than one of them"
            yield Finding("advice", sides.concept, "twice", _where(near), f"{near[0].text!r:.70} is nearly another text", do)


def _both_sides(sides: Sides) -> Iterator[Finding]:
    for one, other in (sides.pairs, sides.scoring):
        if same := _alike(other, one)[0]:
            what = f"{same[0].text!r:.70} stands on the other side too"
            yield Finding(
                "error", sides.concept, "both sides", _where(same), what, "give it to one side, and write another text"
            )


def _leaks(sides: Sides) -> Iterator[Finding]:
    scoring = [*_both(sides.scoring)]
    for texts, others, what, do in (
        (_both(sides.pairs), scoring, "the pairs", "the scorer would know the examples: write other scoring texts"),
        (_both(sides.pairs), sides.held_out, "the pairs", "write other held-out texts"),
        (scoring, sides.held_out, "the scoring texts", "held-out texts test a scorer that never saw them: write others"),
    ):
        if leaked := [text for some in _alike(others, [*texts]) for text in some]:
            said = f"{leaked[0].text!r:.70} is in {what} too, or nearly"
            yield Finding("error", sides.concept, "leak", _where(leaked), said, do)
    if asked := _alike(sides.prompts, sides.kept)[0]:
        what, do = f"{asked[0].text!r:.70} is kept for measuring", "learn from other prompts than those that are measured on"
        yield Finding("error", sides.concept, "leak", _where(asked), what, do)


def _sizes(sides: Sides) -> Iterator[Finding]:
    one, other = (np.array([len(text.words) for text in texts] or [0]) for texts in sides.pairs)
    longer = max(one.mean() / max(other.mean(), 1), other.mean() / max(one.mean(), 1))
    if longer >= LONGER and len(one) == len(other) and max((one > other).mean(), (one < other).mean()) >= MOSTLY:
        what = f"texts with it have {one.mean():.0f} words on average, those without {other.mean():.0f}"
        do = "write both sides of a pair about as long: else length is learned with the concept"
        yield Finding("advice", sides.concept, "length", sides.pairs[0][0].file, what, do)
    for one_side, other_side in (sides.pairs, sides.scoring):
        few, many = sorted(map(len, (one_side, other_side)))
        if many > 2 * few and few:
            what = f"{len(one_side)} texts with it and {len(other_side)} without"
            yield Finding("advice", sides.concept, "balance", one_side[0].file, what, "write as many of each, or nearly")


def _own_words(sides: Sides) -> Iterator[Finding]:
    """Words of the concept where it should not be."""
    one, other = (Counter(_root(word) for word in count.elements()) for count in sides.counts)
    roots = {root for root in sides.named if one[root] > other[root]}
    words = sorted(word for word in sides.counts[1] if len(word) > 3 and _root(word) in roots)
    if words and (texts := [text for text in sides.pairs[1] if {*words} & {*text.words}]):
        what = f"texts without it say {_quoted(words)}, as texts with it do"
        yield Finding("advice", sides.concept, "own words", _where(texts), what, "take these words out of the side without it")


def _marks(sides: Sides) -> Iterator[Finding]:
    """Words that mark one side of the pairs and are not the concept."""
    marks = [(word, side) for side in (0, 1) for word in _one_sided(sides, side) if not _belongs(sides, word, side)]
    for side in (0, 1):
        if words := [word for word, at in marks if at == side]:
            one, other = (sides.counts[k][words[0]] for k in (side, 1 - side))
            texts = [text for text in sides.pairs[side] if {*words} & {*text.words}]
            which = f"{len(sides.pairs[side])} texts {('with', 'without')[side]} it"
            said = f"{_quoted(words)} in {one} of {which}, {other} of the others"
            do = "spread these words over both sides, unless they are what the concept means"
            yield Finding("advice", sides.concept, "words", _where(texts), said, do)
    if not marks and sides.scoring[0] and (apart := _crossed(sides)) >= APART and (carried := _carried(sides)) <= CARRIED:
        what = f"words tell {apart:.0%} of the pairs apart and {carried:.0%} of the scoring texts: they are not the concept's"
        do = "write pairs of which both sides are about the same things"
        yield Finding("advice", sides.concept, "words", sides.pairs[0][0].file, what, do)


CHECKS: tuple[Callable[[Sides], Iterator[Finding]], ...] = (*(_empty, _twice, _both_sides, _leaks, _sizes, _own_words, _marks),)


# -- how -----------------------------------------------------------------------------------------------------------


def _both(sides: tuple[Sequence[Text], Sequence[Text]]) -> list[Text]:
    return [*sides[0], *sides[1]]


def _alike(texts: Sequence[Text], others: Sequence[Text]) -> tuple[list[Text], list[Text]]:
    """Of some texts those that others are equal to, and those that others nearly are; each text itself, and those behind it
    where both are the same list, do not count."""
    places: dict[Any, list[int]] = defaultdict(list)
    for k, other in enumerate(others):
        for key in (other.same, *_threes(other)):
            places[key].append(k)
    same, near = [], []
    for n, text in enumerate(texts):
        before = len(others) if texts is not others else n
        threes = _threes(text)
        shared = Counter(k for three in threes for k in places.get(three, ()) if k < before)
        if any(k < before for k in places.get(text.same, ())):
            same.append(text)
        elif any(n / len(threes | _threes(others[k])) >= ALIKE for k, n in shared.items()):
            near.append(text)
    return same, near


def _threes(text: Text) -> set[tuple[str, ...]]:
    words = text.words
    return {*zip(words, words[1:], words[2:], strict=False)}


def _counts(texts: Sequence[Text]) -> Counter[str]:
    return Counter(word for text in texts for word in {*text.words})


def _one_sided(sides: Sides, side: int) -> list[str]:
    """Words that mark a side of the pairs, the most frequent first."""
    one, other = sides.counts[side], sides.counts[1 - side]
    many, rest = len(sides.pairs[side]), len(sides.pairs[1 - side])
    found = [w for w, n in one.items() if n >= max(FEWEST, OFTEN * many) and other[w] <= SELDOM * rest]
    return sorted(found, key=lambda word: (-one[word], word))


def _belongs(sides: Sides, word: str, side: int) -> bool:
    """Whether a word that marks a side of the pairs belongs to the concept: it says what that means, or marks the same side of
    the scoring texts."""
    one, other = (_counts(sides.scoring[k])[word] for k in (side, 1 - side))
    return _root(word) in sides.own or one > max(2 * other, 1)


def _weights(texts: tuple[Sequence[Text], Sequence[Text]]) -> dict[str, float]:
    """Log odds of each word between two sides, of texts that have it."""
    counts = [_counts(some) for some in texts]
    words = {*counts[0], *counts[1]}
    one, other = ({w: np.log((c[w] + 0.5) / (len(t) + 1)) for w in words} for c, t in zip(counts, texts, strict=True))
    return {word: one[word] - other[word] for word in words}


def _right(weights: dict[str, float], texts: tuple[Sequence[Text], Sequence[Text]]) -> float:
    """Share of texts whose side their words tell, the mean of both sides; half of those of which they tell nothing."""
    scores = [np.array([sum(weights.get(word, 0.0) for word in {*text.words}) for text in some]) for some in texts]
    return float(np.mean([np.mean(np.sign(score) * sign + 1) / 2 for score, sign in zip(scores, (1, -1), strict=True)]))


def _crossed(sides: Sides, folds: int = 6) -> float:
    """Share of pairs that the words of the other pairs tell apart."""
    one, other = sides.pairs
    if min(len(one), len(other)) < folds:
        return 0.0
    parts = [([*one[k::folds]], [*other[k::folds]]) for k in range(folds)]
    rest = [tuple([t for i, t in enumerate(some) if i % folds != k] for some in (one, other)) for k in range(folds)]
    return float(np.mean([_right(_weights((a, b)), part) for (a, b), part in zip(rest, parts, strict=True)]))


def _carried(sides: Sides) -> float:
    """Share of scoring texts that the words of the pairs tell apart."""
    return _right(_weights(sides.pairs), sides.scoring)


def _root(word: str) -> str:
    """A word without its endings."""
    end = next((end for end in ENDINGS if word.endswith(end) and len(word) > len(end) + 3), "")
    return _root(word[: -len(end)]) if end else word


def _where(texts: Sequence[Text]) -> str:
    """Files and lines."""
    lines: dict[str, list[int]] = {}
    for text in texts:
        lines.setdefault(text.file, []).append(text.line)
    shown = {file: [*dict.fromkeys(some)] for file, some in lines.items()}
    return "; ".join(f"{file} {', '.join(map(str, some[:5]))}{', …' if len(some) > 5 else ''}" for file, some in shown.items())


def _quoted(words: Sequence[str]) -> str:
    return ", ".join(map(repr, words[:6])) + (f" and {len(words) - 6} more" if len(words) > 6 else "")
