"""`sweep`: answers or pictures under many amounts, edits and sites, and what a judge and benchmarks say of them."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch

from ...bank.concept_bank import ConceptBank
from ...bank.concepts import Part
from ...bank.editing import together
from ...bank.vectors import site_name
from ...errors import BadEdit, OutOfRange, UnsupportedTarget
from ...evaluation.comparison import TEMPERATURE, nll_behind
from ...evaluation.judges import Endpoint, Judge, is_told, judged
from ...evaluation.pictures import Pictures
from ...evaluation.sweeps import MEANING, Sweep, settings_of
from ...evaluation.text import repeated
from ...hosts import host_for
from ...steering.interventions import Intervention
from ...steering.session import Banks, Steering, steer
from ...text import chat, complete, progress, stage

Benchmark = Callable[[Any], Any]


def sweep(
    target: Any, bank: Banks, edits: Mapping[str, Any], *, prompts: Sequence[str], judge: Judge | None = None,
    also: Benchmark | Sequence[Benchmark] = (), sites: Sequence[str | int] = (), seeds: Sequence[int | None] = (0,),
    tokenizer: Any = None, new_tokens: int = 40, allow_ood: bool = False, **drawing: Any,
) -> Sweep:  # fmt: skip
    """Try amounts of concepts, and sites, on the same prompts from the same seeds, and measure what they do.

    Args:
        target: a language model, or a pipeline that draws. Of a pipeline edits act on the half of guidance with the prompt.
        bank: whose concepts are edited, as for `sl.steer`.
        edits: by concept the amounts to try, or edits such as `sl.Set(1.5)`; of several concepts every combination. What edits
            nothing is always tried, and first.
        prompts: requests, or what pictures are drawn of.
        judge: a function of requests and answers, or of prompts and pictures `[B, H, W, 3]` of bytes, that gives a number for
            each, the more the better; with a parameter `concept` it is given the name. `sl.Endpoint` is one. Default: none.
        also: functions of the steered target, or one, that give a number, or numbers by name: benchmarks of one's own.
        sites: places at which concepts that have several are moved one after the other, instead of at all of them at once.
        seeds: of answers, which are drawn at a temperature of 0.7, and of noise. None: greedy answers.
        tokenizer: the model's (default: that of `sl.load`).
        new_tokens: tokens of an answer.
        allow_ood: as for `sl.steer`; without it changes are capped, and the column `capped` says so.
        drawing: what the pipeline is given beside prompts and noise, such as `num_inference_steps=20`.

    Returns a `Sweep`: printed it is a table; `rows` and `records` have its figures, `best` the best setting, `plot()` draws it,
    of pictures as a contact sheet. Raises `BadEdit`, `NoScore` and what `sl.steer` raises.

    >>> table = sl.sweep(model, bank, {"a": [0, 1, 2]}, prompts=["Where?"], judge=judge)             # doctest: +SKIP
    >>> sl.sweep(pipe, bank, {"snow": [0, 1, 2]}, prompts=["a hill"], seeds=[0, 1]).plot("sheet.png")    # doctest: +SKIP
    """
    draws = host_for(target).has_progress
    if drawing and not draws:
        raise BadEdit(f"{', '.join(drawing)}: arguments of a pipeline, and {type(target).__name__} is none")
    functions: Any = [also] if callable(also) else also
    _check(edits, prompts, seeds, draws, functions)
    chosen: Any = together([*bank]) if isinstance(bank, list | tuple) else bank
    make = _Drawing(target, prompts, drawing) if draws else _Writing(target, tokenizer, prompts, new_tokens)
    amounts = {chosen[name].name: [_plain(amount) for amount in given] for name, given in edits.items()}
    settings = settings_of(amounts, [site_name(site) for site in sites])
    branch: Any = "cond" if draws else "both"
    return _swept(target, chosen, [*amounts], settings, make, judge, functions, seeds, branch, allow_ood)


def _swept(
    target: Any, bank: ConceptBank, names: Sequence[str], settings: list[dict[str, Any]], make: Any, judge: Judge | None,
    also: Sequence[Benchmark], seeds: Sequence[int | None], branch: Any, allow_ood: bool,
) -> Sweep:  # fmt: skip
    records: list[dict[str, Any]] = []
    more: list[dict[str, Any]] = []
    with stage(1, 1 + (judge is not None), f"{len(settings)} settings, {len(make.prompts) * len(seeds)} {make.what} each"):
        for k, setting in enumerate(progress(settings, "settings")):
            with _steered(target, bank, setting, branch, allow_ood) as session:
                made = [make(seed) for seed in seeds]
                capped = [] if session is None else [line.capped for line in session.report().lines]
                more.append({name: value for function in also for name, value in _figures(function, target)})
            more[-1] |= {"capped": max(capped)} if any(capped) else {}
            for seed, answers in zip(seeds, made, strict=True):
                records += [{"setting": k, "seed": seed, **one} for one in make.records(answers)]
    if judge is not None:
        with stage(2, 2, f"judging {len(records)} {make.what}"):
            _score(judge, names, records, make.pictures)
    shown = [{name: _said(value) for name, value in setting.items()} for setting in settings]
    notes = [f"{name}: {said}" for name in names if (said := bank[name].unmeasured)]
    notes += [repr(judge)] if isinstance(judge, Endpoint) else []
    return Sweep(settings=shown, records=records, more=more, pictures=make.pictures, notes=notes)


def _check(edits: Any, prompts: Any, seeds: Sequence[Any], draws: bool, also: Sequence[Benchmark]) -> None:
    """Raise `BadEdit` for what cannot be swept, before anything is run."""
    lists = edits.values() if isinstance(edits, Mapping) else [""]
    if not edits or any(isinstance(amounts, str) or not hasattr(amounts, "__len__") for amounts in lists):
        raise BadEdit(f'expected amounts by name of concept, such as {{"polite": [0, 1, 2]}}, got {edits!r:.80}')
    if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise BadEdit(f"expected prompts as a list of texts, got {prompts!r:.80}")
    if not len(seeds) or None in seeds and draws:
        raise BadEdit(f"expected seeds as a list of numbers, of answers also None, got {seeds!r:.80}")
    names = [_called(function) for function in also]
    if len({*names, *MEANING}) < len(names) + len(MEANING):
        raise BadEdit(
            f"expected functions of different names in also=, other than {', '.join(MEANING)}; got {', '.join(names)}"
        )


def _plain(amount: Any) -> Any:
    """An amount as a number, an edit as it is."""
    if isinstance(amount, Intervention) or isinstance(amount, int) and not isinstance(amount, bool):
        return amount
    try:
        return float(amount)
    except (TypeError, ValueError):
        raise BadEdit(f"expected amounts as numbers or edits such as sl.Set(1.5), got {amount!r:.80}") from None


def _said(amount: Any) -> Any:
    """An amount as a plain value: an edit by its name and by what of it is not as usual."""
    if not isinstance(amount, Intervention):
        return amount
    own = [(f.name, getattr(amount, f.name), f.default) for f in fields(amount)]
    shown = [f"{name}={value!r}" for name, value, usual in own if not (value is usual or value == usual)]
    return f"{type(amount).__name__}({', '.join(shown)})"


@contextmanager
def _steered(
    target: Any, bank: ConceptBank, setting: Mapping[str, Any], branch: Any, allow_ood: bool
) -> Iterator[Steering | None]:
    """Inside the block the target is steered as a setting says; that amounts are beyond a range is not said."""
    edits = {name: amount for name, amount in setting.items() if name != "site"}
    if not edits:
        yield None
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OutOfRange)
        own = placed(bank, [*edits], setting["site"]) if "site" in setting else bank
        with steer(target, own, edits, branch=branch, allow_ood=allow_ood) as session:
            yield session


def placed(bank: ConceptBank, names: Sequence[str], site: str) -> ConceptBank:
    """A bank in which some concepts move at one of their sites alone; raises `BadEdit` where one does not move there."""
    own = bank.contents()
    others = [concept for concept in own["concepts"] if concept.name not in names]
    moved = []
    for concept in (bank[name] for name in names):
        here = [place for place in concept.places if bank.site_of(place) == site]
        if not here:
            known = ", ".join(dict.fromkeys(map(bank.site_of, concept.places)))
            raise BadEdit(f"{concept.name!r} moves at {known}, not at {site!r}; give a bank with its vector there, by site")
        first, *rest = here
        parts = tuple(Part(encoder=place.encoder, index=place.index, unit=place.unit) for place in rest)
        facts: dict[str, Any] = {"unit": first.unit, "natural": first.natural, "parts": parts}
        moved.append(replace(concept, encoder=first.encoder, index=first.index, **facts))
    return ConceptBank(**{**own, "concepts": [*others, *moved]})


def _called(function: Benchmark) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _figures(function: Benchmark, target: Any) -> Iterator[tuple[str, float]]:
    """What a function of the steered model gives, by name."""
    found = function(target)
    named = found if isinstance(found, Mapping) else {_called(function): found}
    yield from ((name, float(value)) for name, value in named.items())


def _score(judge: Judge, names: Sequence[str], records: Sequence[dict[str, Any]], pictures: Pictures | None) -> None:
    """Write the judge's scores into the records, of each concept where the judge tells them apart."""
    requests = [record["prompt"] for record in records]
    answers = pictures if pictures is not None else [record["answer"] for record in records]
    asked = {f"score of {name}": name for name in names} if is_told(judge) and len(names) > 1 else {"score": names[0]}
    for key, name in asked.items():
        for record, score in zip(records, judged(judge, requests, answers, name), strict=True):
            record[key] = float(score)


class _Writing:
    """A language model that answers prompts."""

    what = "answers"
    pictures: Pictures | None = None

    def __init__(self, model: Any, tokenizer: Any, prompts: Sequence[str], new_tokens: int):
        self.model, self.tokenizer, self.new_tokens = model, tokenizer or host_for(model).tokenizer(), new_tokens
        self.prompts, self.asked = list(prompts), [chat(self.tokenizer, prompt, model=model) for prompt in prompts]

    def __call__(self, seed: int | None) -> Any:
        how: dict[str, Any] = {} if seed is None else {"temperature": TEMPERATURE, "seed": seed}
        return complete(self.model, self.tokenizer, self.asked, new_tokens=self.new_tokens, **how)

    def records(self, done: Any) -> Iterator[dict[str, Any]]:
        """What is known of answers; outside of a session."""
        likely = nll_behind(self.model, self.tokenizer, done, self.asked)
        for prompt, text, nll in zip(self.prompts, done.texts, likely, strict=True):
            yield {"prompt": prompt, "answer": text, "nll": float(nll), "repeated": repeated(text)}


class _Drawing:
    """A pipeline that draws prompts, each from the noise of the same seed."""

    what = "pictures"

    def __init__(self, pipe: Any, prompts: Sequence[str], how: Mapping[str, Any]):
        self.pipe, self.prompts, self.how = pipe, list(prompts), how
        self.pictures: Pictures | None = None

    def __call__(self, seed: int | None) -> Pictures:
        noises = [torch.Generator().manual_seed(int(seed or 0)) for _ in self.prompts]
        found = np.asarray(self.pipe(list(self.prompts), generator=noises, output_type="np", **self.how)[0])
        if found.ndim != 4 or found.shape[-1] != 3:
            raise UnsupportedTarget(f"expected pictures [B, H, W, 3] of {type(self.pipe).__name__}, got {found.shape}")
        return (found * 255).round().astype(np.uint8)

    def records(self, drawn: Pictures) -> Iterator[dict[str, Any]]:
        """Where pictures are kept."""
        first = 0 if self.pictures is None else len(self.pictures)
        self.pictures = drawn if self.pictures is None else np.concatenate((self.pictures, drawn))
        for k, prompt in enumerate(self.prompts):
            yield {"prompt": prompt, "picture": first + k}
