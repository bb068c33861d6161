"""From data to directions, without a search: texts with a concept and without it, each read once."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..bank.concept_bank import ConceptBank
from ..bank.vectors import site_name
from ..encoders import Directions
from ..errors import BadBank, UnsupportedTarget, WrongWidth, nearest
from ..hosts import host_for
from .directions.methods import probe
from .record.activations import answers, by_text

Text = str | tuple[Any, str]
"""A text, or an answer behind its prompt: a message of the user, or the messages of a chat."""
Method = Callable[[Float[Tensor, "n D"], Float[Tensor, "m D"]], Tensor]
"""From mean activations of texts with a concept and of texts without it to its vector `[D]`."""


@dataclass(frozen=True)
class Contrast:
    """Texts with a concept and texts without it, of any numbers: each class counts as a whole.

    Args:
        positive: texts, or pairs of a prompt and an answer, of which only the answer counts. A prompt is a user's message or a
            list of messages.
        negative: the same without the concept.

    Raises `BadBank` where a class is empty.

    >>> sl.Contrast(("Kindly sit.", "Would you mind?"), ("Sit!",)).negative
    ('Sit!',)
    """

    positive: tuple[Text, ...]
    negative: tuple[Text, ...]

    def __post_init__(self) -> None:
        for side in ("positive", "negative"):
            object.__setattr__(self, side, texts := tuple(getattr(self, side)))
            if not texts or not all(_is_text(text) for text in texts):
                raise BadBank(f"expected {side} texts, or pairs of a prompt and an answer, at least one, got {texts!r:.200}")

    @classmethod
    def from_rows(
        cls, rows: Iterable[Mapping[str, Any]], *, text: str = "text", label: str = "label", positive: Any = None
    ) -> "Contrast":
        """From rows of labelled texts: dicts, or a data set.

        Args:
            rows: one text each.
            text: the field with the text, or with the messages of a chat, whose last one counts.
            label: the field with the label.
            positive: the label of texts with the concept; all other labels are without it. Not needed for true and false, or
                1 and 0.

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
        return cls(*map(tuple, sides))

    @classmethod
    def from_preferences(
        cls,
        rows: Iterable[Mapping[str, Any]],
        prompt: str | None = "prompt",
        chosen: str = "chosen",
        rejected: str = "rejected",
    ) -> "Contrast":
        """From preference data: of each row the chosen answer has the concept, the rejected one has not.

        Args:
            rows: dicts, or a data set.
            prompt: the field with the prompt, a string or messages; None: the answers are whole chats, whose last message
                counts.
            chosen, rejected: the fields with the answers: strings, or messages.

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
        return cls(*map(tuple, sides))


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
    model: Any,
    data: Mapping[str, Contrast],
    *,
    sites: Sequence[str | int],
    method: str | Method = "difference-of-means",
    tokenizer: Any = None,
    name: str = "directions",
) -> ConceptBank:
    """A bank of directions that tell texts with a concept from texts without it. Each text is read once, nothing is searched.

    Of a text the mean over its tokens counts, without pads and the first one, on which attention rests; of an answer the mean
    over its own tokens, without prompt and chat template. A concept moves at all of the sites at once. Its unit is the vector
    that the method gives, it reads 0 midway between the means of its classes, and no useful amount or safe range is known.

    Args:
        model: a language model.
        data: a `Contrast` by name of concept.
        sites: where, as in `layers.12.attn`; a number is a block.
        method: `difference-of-means`; `probe`, the pattern of a logistic regression; or a function of the mean activations of
            the texts with the concept, `[n, D]`, and without it, `[m, D]`, that gives a vector `[D]`.
        tokenizer: the model's (default: that of `sl.load`).
        name: of the bank.

    Raises `UnknownSite`, and `WrongWidth` or `BadBank` for a vector that is no direction at its site.

    >>> bank = sl.directions(model, {"polite": sl.Contrast.from_rows(rows)}, sites=[12], tokenizer=tok)  # doctest: +SKIP
    """
    host = host_for(model)
    if host.has_progress:
        raise UnsupportedTarget("sl.directions reads texts; give a language model, or for a pipeline a recipe to sl.train")
    read = Reading(model, tokenizer or host.tokenizer(), [site_name(site) for site in sites])
    means = {concept: (read.means(one.positive), read.means(one.negative)) for concept, one in data.items()}
    found = {concept: {site: _vector(method, p[site], n[site]) for site in read.sites} for concept, (p, n) in means.items()}
    bank = ConceptBank.from_directions(found, base=model, norm=read.norms, name=name)
    middle = {site: torch.stack([(p[site].mean(0) + n[site].mean(0)) / 2 for p, n in means.values()]) for site in read.sites}
    encoders = {site: _centred(bank.encoder(site), at) for site, at in middle.items()}
    return bank.with_concepts(encoders=encoders, provenance={"method": method if isinstance(method, str) else "a function"})


def _vector(method: str | Method, positive: Float[Tensor, "n D"], negative: Float[Tensor, "m D"]) -> Float[Tensor, " D"]:
    if not callable(method) and method not in BY_NAME:
        raise BadBank(f"no method {method!r} works without a search; {nearest(str(method), BY_NAME)}; others are for sl.train")
    found = torch.as_tensor((method if callable(method) else BY_NAME[method])(positive, negative))
    if found.shape != positive.shape[1:]:
        raise WrongWidth(f"expected a vector of {positive.shape[1]} from the method, got {tuple(found.shape)}")
    if found.requires_grad:
        raise BadBank("the method gave a vector that requires gradients; give it to ConceptBank.from_directions, or detach it")
    return found.float()


def _centred(encoder: Any, middle: Float[Tensor, "k D"]) -> Directions:
    """The same directions, each of which reads 0 at its point."""
    with torch.no_grad():
        mean = (middle * encoder.encoder).sum(-1)
    return Directions(encoder.decoder, mean)


class Reading:
    """Reads texts at some sites, once each."""

    def __init__(self, model: Any, tokenizer: Any, sites: Sequence[str]):
        self.model, self.tokenizer, self.sites = model, tokenizer, list(sites)
        self._lengths: dict[str, list[Tensor]] = {site: [] for site in sites}

    @property
    def norms(self) -> dict[str, float]:
        """Median length of the activations that were read, by site."""
        return {site: round(float(torch.cat(lengths).median()), 4) for site, lengths in self._lengths.items()}

    def means(self, texts: Sequence[Text]) -> dict[str, Float[Tensor, "n D"]]:
        """Mean activation of each text, by site."""
        rows: dict[str, dict[int, Tensor]] = {site: {} for site in self.sites}
        for read, are_plain in ((by_text, True), (answers, False)):
            given: Any = {i: text for i, text in enumerate(texts) if isinstance(text, str) is are_plain}
            found = read(self.model, self.tokenizer, [*given.values()], self.sites, what="texts") if given else {}
            for site, x in found.items():
                if empty := [text for text, one in zip(given.values(), x, strict=True) if not len(one)]:
                    raise BadBank(f"no token is left of the text {empty[0]!r:.80}; leave it out")
                rows[site] |= {i: one.mean(0) for i, one in zip(given, x, strict=True)}
                self._lengths[site].append(torch.cat(x).norm(dim=-1))
        return {site: torch.stack([by_row[i] for i in range(len(texts))]) for site, by_row in rows.items()}


def _difference(positive: Tensor, negative: Tensor) -> Tensor:
    return positive.mean(0) - negative.mean(0)


def _probe(positive: Tensor, negative: Tensor) -> Tensor:
    """The pattern, as long as the difference of means is along it."""
    found = probe.pattern(positive, negative, class_weight="balanced")
    unit = found / found.norm()
    return unit * (unit @ _difference(positive, negative))


BY_NAME: dict[str, Method] = {"difference-of-means": _difference, "probe": _probe}
