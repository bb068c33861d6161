"""From data to directions, without a search: texts or pictures with a concept and without it, each read or drawn once.

A bank of such directions carries its data in `contrast.jsonl`, where the license allows, a line for each concept: its `id`, the
`license`, and what `Contrast` has.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..bank.concept_bank import ConceptBank
from ..bank.vectors import site_name
from ..encoders import Directions
from ..errors import BadBank, BadRecipe, CorruptBank, nearest
from ..hosts import host_for
from .calibrate.prompted import Drawing
from .carry import recipe_in
from .directions.methods import Find, probe, vector_of
from .picture_recipe import PictureRecipe
from .record import means
from .record.contrasts import places

Text = str | tuple[Any, str]
"""A text, or an answer behind its prompt: a message of the user, or the messages of a chat."""


@dataclass(frozen=True)
class Contrast:
    """Texts with a concept and texts without it, of any numbers: each class counts as a whole.

    Args:
        positive: texts, or pairs of a prompt and an answer, of which only the answer counts. A prompt is a user's message or a
            list of messages.
        negative: the same without the concept.
        license: SPDX name of a license by which the data may be passed on; a bank then carries it. Without one it carries none.

    Raises `BadBank` where a class is empty.

    >>> sl.Contrast(("Kindly sit.", "Would you mind?"), ("Sit!",)).negative
    ('Sit!',)
    """

    positive: tuple[Text, ...]
    negative: tuple[Text, ...]
    license: str = ""

    def __post_init__(self) -> None:
        for side in ("positive", "negative"):
            object.__setattr__(self, side, texts := tuple(getattr(self, side)))
            if not texts or not all(_is_text(text) for text in texts):
                raise BadBank(f"expected {side} texts, or pairs of a prompt and an answer, at least one, got {texts!r:.200}")

    @classmethod
    def from_rows(
        cls, rows: Iterable[Mapping[str, Any]], *, text: str = "text", label: str = "label", positive: Any = None,
        license: str = "",
    ) -> "Contrast":  # fmt: skip
        """From rows of labelled texts: dicts, or a data set.

        Args:
            rows: one text each.
            text: the field with the text, or with the messages of a chat, whose last one counts.
            label: the field with the label.
            positive: the label of texts with the concept; all other labels are without it. Not needed for true and false, or
                1 and 0.
            license: as above.

        Raises `BadBank` where labels do not tell, or a field is missing.

        >>> rows = [{"text": "Kindly sit.", "label": 1}, {"text": "Sit!", "label": 0}]
        >>> sl.Contrast.from_rows(rows).positive
        ('Kindly sit.',)
        """
        sides: tuple[list[Text], list[Text]] = [], []
        for row in rows:
            _check(row, text, label)
            given = row[label]
            if positive is None and given not in (0, 1):
                raise BadBank(f"label {given!r} is neither true nor false; give positive=, the label of texts with the concept")
            sides[0 if given == (1 if positive is None else positive) else 1].append(_said(row[text]))
        return cls(*map(tuple, sides), license=license)

    @classmethod
    def from_preferences(
        cls,
        rows: Iterable[Mapping[str, Any]],
        prompt: str | None = "prompt",
        chosen: str = "chosen",
        rejected: str = "rejected",
        license: str = "",
    ) -> "Contrast":
        """From preference data: of each row the chosen answer has the concept, the rejected one has not.

        Args:
            rows: dicts, or a data set.
            prompt: the field with the prompt, a string or messages; None: the answers are whole chats, whose last message
                counts.
            chosen, rejected: the fields with the answers: strings, or messages.
            license: as above.

        Raises `BadBank` where a field is missing.

        >>> rows = [{"prompt": "Where?", "chosen": "Over there, please.", "rejected": "There."}]
        >>> sl.Contrast.from_preferences(rows).positive
        (('Where?', 'Over there, please.'),)
        """
        sides: tuple[list[Text], list[Text]] = [], []
        for row in rows:
            _check(row, *filter(None, (prompt, chosen, rejected)))
            for side, name in zip(sides, (chosen, rejected), strict=True):
                said = _said(row[name])
                before, answer = said if isinstance(said, tuple) else ([], said)
                if prompt is not None:
                    before = [*_messages(row[prompt]), *before] if before else row[prompt]
                side.append((before, answer) if before else answer)
        return cls(*map(tuple, sides), license=license)

    @classmethod
    def from_prompts(cls, positive: Sequence[str], negative: Sequence[str], *, license: str = "") -> "Contrast":
        """For pipelines: prompts with the concept, each beside one that differs in nothing else. The pictures of a pair are
        drawn from the same noise.

        Raises `BadBank` where prompts are not in pairs of two different ones.

        >>> sl.Contrast.from_prompts(["a hill in snow", "a town in snow"], ["a hill", "a town"]).negative
        ('a hill', 'a town')
        """
        if isinstance(positive, str) or isinstance(negative, str):
            raise BadBank(f"expected lists of prompts, got {positive!r:.80} and {negative!r:.80}")
        found = cls(tuple(positive), tuple(negative), license=license)
        found.pairs()
        return found

    def pairs(self) -> list[tuple[str, str]]:
        """Prompts in pairs of two different ones; raises `BadBank` where they are none.

        >>> sl.Contrast(("a hill in snow",), ("a hill",)).pairs()
        [('a hill in snow', 'a hill')]
        """
        one, other = self.positive, self.negative
        found = [(a, b) for a, b in zip(one, other, strict=False) if a != b and isinstance(a, str) and isinstance(b, str)]
        if not len(found) == len(one) == len(other):
            raise BadBank(
                f"expected each prompt beside one that differs in the concept alone, got {len(one)} and {len(other)}, of "
                f"which {len(found)} are such pairs"
            )
        return found


def _check(row: Mapping[str, Any], *names: str) -> None:
    if not all(name in row for name in names):
        raise BadBank(f"expected fields {', '.join(map(repr, names))} in every row, got {', '.join(map(str, row))}")


def _is_text(text: Any) -> bool:
    return isinstance(text, str) or isinstance(text, tuple) and len(text) == 2 and isinstance(text[1], str)


def _messages(prompt: Any) -> list[Any]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*prompt]


def _said(given: Any) -> Text:
    """A text, or of messages the last one behind those before."""
    if isinstance(given, str):
        return given
    *before, last = given
    return ([*before], last["content"]) if before else last["content"]


# -- directions ------------------------------------------------------------------------------------------------------------


def directions(
    model: Any, data: "Mapping[str, Contrast] | ConceptBank", *, sites: Sequence[str | int] | None = None,
    method: str | Find | None = None, tokenizer: Any = None, name: str = "directions", **drawing: Any,
) -> ConceptBank:  # fmt: skip
    """A bank of directions that tell texts or pictures with a concept from those without it, each read or drawn once.

    Of a text the mean over its tokens counts, without pads and the first one, on which attention rests; of an answer that over
    its own tokens, without prompt and chat template; of a picture that over tokens and steps. A concept moves at all of its
    sites at once. Its unit is the vector that the method gives, it reads 0 midway between the means of its classes, and no
    useful amount or safe range is known.

    Args:
        model: a language model or a pipeline.
        data: a `Contrast` by name of concept; or a bank that carries some, of which its concepts are made again.
        sites: where, as in `layers.12.attn`; a number is a block. Default: a bank's own; of a pipeline cross-attention.
        method: `difference-of-means`, which is the default; `probe`, the pattern of a logistic regression; or a function of
            mean activations with the concept, `[n, D]`, and without it, `[m, D]`, that gives a vector `[D]`.
        tokenizer: the model's (default: that of `sl.load`).
        name: of the bank.
        drawing: of a pipeline `steps`, `guidance`, `batch` and `seed`.

    Raises `UnknownSite`, and `WrongWidth` or `BadBank` for a vector that is no direction at its site.

    >>> bank = sl.directions(model, {"polite": sl.Contrast.from_rows(rows)}, sites=[12], tokenizer=tok)  # doctest: +SKIP
    """
    known, where = _data(data, sites, host_for(model))
    own = _made(data)
    how = {"drawing": {**own.get("drawing", {}), **drawing}, "method": method or own.get("method") or "difference-of-means"}
    found, norms = _means(model, known, where, tokenizer, how["drawing"])
    vectors = {c: {site: _vector(how["method"], p[site], n[site]) for site in where[c]} for c, (p, n) in found.items()}
    bank = ConceptBank.from_directions(vectors, base=model, norm=norms, name=name)
    said = {key: "a function" if callable(value) else value for key, value in how.items() if value}
    files = {CONTRAST: carried} if (carried := _lines(bank, known)) else {}
    return bank.with_concepts(encoders=_centred(bank, found), files=files, provenance={"directions": said})


def _made(data: object) -> dict[str, Any]:
    """How directions of a bank were made, as far as it says."""
    said = data.provenance.get("directions") if isinstance(data, ConceptBank) else None
    return said if isinstance(said, dict) else {}


Classes = dict[str, tuple[means.Means, means.Means]]
"""By concept mean activations with it and without it."""


def _means(
    model: Any, data: Mapping[str, Contrast], where: Mapping[str, Sequence[str]], tokenizer: Any, drawing: Mapping[str, Any]
) -> tuple[Classes, dict[str, float]]:
    """What is read or drawn, and the median length of an activation at each site."""
    host, sites = host_for(model), list(dict.fromkeys(site for at in where.values() for site in at))
    if host.has_progress:
        return _drawn(model, data, sites, drawing)
    if drawing:
        raise BadBank(f"{', '.join(sorted(drawing))}: no argument for a language model")
    read = means.Reading(model, tokenizer or host.tokenizer(), sites)
    return {name: (read.means(one.positive), read.means(one.negative)) for name, one in data.items()}, read.lengths.medians()


def _drawn(
    pipe: Any, data: Mapping[str, Contrast], sites: Sequence[str], drawing: Mapping[str, Any]
) -> tuple[Classes, dict[str, float]]:
    """Both pictures of a pair from the noise of one seed."""
    if strange := drawing.keys() - {"steps", "guidance", "batch", "seed"}:
        raise BadBank(f"{', '.join(sorted(strange))}: no argument of what is drawn")
    recipe = PictureRecipe(name="directions", base="none", source="none", **drawing)
    draw, found = means.Drawing(pipe, Drawing(pipe, recipe), sites, recipe.batch), {}
    for name, one in data.items():
        positive, negative = zip(*one.pairs(), strict=True)
        seeds = [recipe.seed + k for k in range(len(positive))]
        found[name] = draw.means(positive, seeds), draw.means(negative, seeds)
    return found, draw.lengths.medians()


def _data(
    data: "Mapping[str, Contrast] | ConceptBank", sites: Sequence[str | int] | None, host: Any
) -> tuple[dict[str, Contrast], dict[str, list[str]]]:
    """The data of each concept, and at which sites its direction is looked for."""
    if isinstance(data, ConceptBank):
        found = contrasts_in(data)
        if not found:
            raise BadBank(f"bank {data.name!r} carries no contrast data; give a Contrast for each concept")
        own = {name: list(dict.fromkeys(data.site_of(place) for place in data[name].places)) for name in found}
    elif sites is None and not host.has_progress:
        raise BadBank("expected sites=, such as [12] or ['layers.12.attn']")
    else:
        found, own = dict(data), dict.fromkeys(data, places(host) if sites is None else [])
    if not found:
        raise BadBank("expected a Contrast by name of concept, at least one")
    return found, own if sites is None else dict.fromkeys(found, [site_name(site) for site in sites])


# -- what a bank carries ---------------------------------------------------------------------------------------------------

CONTRAST = "contrast.jsonl"


def _lines(bank: ConceptBank, data: Mapping[str, Contrast]) -> bytes:
    """What a bank carries of its data: that which has a license."""
    lines = [{"id": bank[name].id, **asdict(one)} for name, one in data.items() if one.license]
    return "".join(json.dumps(line, ensure_ascii=False, sort_keys=True) + "\n" for line in lines).encode()


def contrasts_in(bank: ConceptBank) -> dict[str, Contrast]:
    """The contrast data that a bank carries, by concept: that of `directions`, or the pairs of its recipe.

    Raises `CorruptBank` where it is none.
    """
    names, found = {concept.id: concept.name for concept in bank.concepts.values()}, {}
    try:
        for line in (json.loads(line) for line in bank.content(CONTRAST).decode().split("\n") if line):
            sides = [
                tuple(text if isinstance(text, str) else tuple(text) for text in line[side])
                for side in ("positive", "negative")
            ]
            found |= {names[line["id"]]: Contrast(*sides, license=line["license"])} if line["id"] in names else {}
    except (BadBank, ValueError, TypeError, KeyError) as error:
        raise CorruptBank(f"{CONTRAST} of bank {bank.name!r} has no contrast data: {error!s:.200}") from None
    recipe: Any = recipe_in(bank)
    for concept in getattr(recipe, "concepts", ()):
        if concept.name in bank and concept.name not in found and (sides := _sides(recipe, concept)):
            found[concept.name] = Contrast(*sides, license=recipe.license)
    return found


def _sides(recipe: Any, concept: Any) -> tuple[tuple[Text, ...], tuple[Text, ...]] | None:
    """The texts or prompts of a concept's recipe; none where it has a name alone."""
    try:
        if isinstance(recipe, PictureRecipe):
            pairs = recipe.read_pairs(concept)
            return tuple(one for one, _ in pairs), tuple(other for _, other in pairs)
        positive, negative = map(tuple, recipe.read_shown(concept))
        return positive, negative
    except BadRecipe:
        return None


# -- methods ---------------------------------------------------------------------------------------------------------------


def _vector(method: str | Find, positive: Float[Tensor, "n D"], negative: Float[Tensor, "m D"]) -> Float[Tensor, " D"]:
    if not callable(method) and method not in BY_NAME:
        raise BadBank(f"no method {method!r} works without a search; {nearest(str(method), BY_NAME)}; others are for sl.train")
    return vector_of(method if callable(method) else BY_NAME[method], positive, negative)


def _centred(bank: ConceptBank, found: Classes) -> dict[str, Directions]:
    """The same directions, each of which reads 0 midway between its classes."""
    made: dict[str, Directions] = {}
    for site in bank.encoder_facts:
        own: Any = bank.encoder(site)
        both = [found[c.name] for c in bank.concepts.values() for place in c.places if place.encoder == site]
        middle = torch.stack([(p[site].mean(0) + n[site].mean(0)) / 2 for p, n in both])
        made[site] = Directions(own.decoder, (middle * own.encoder).sum(-1).detach())
    return made


def _difference(positive: Tensor, negative: Tensor) -> Tensor:
    return positive.mean(0) - negative.mean(0)


def _probe(positive: Tensor, negative: Tensor) -> Tensor:
    """The pattern, as long as the difference of means is along it."""
    found = probe.pattern(positive, negative)
    unit = found / found.norm()
    return unit * (unit @ _difference(positive, negative))


BY_NAME: dict[str, Find] = {"difference-of-means": _difference, "probe": _probe}
