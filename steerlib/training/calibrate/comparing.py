"""What of a bank still holds on another checkpoint, beside what the bank stores."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ...bank.concept_bank import ConceptBank
from ...bank.concepts import Concept, printable
from ...bank.manifest import BaseModel
from ...bank.matching import MISFITS, Fit
from ...errors import BadEdit, WrongModel
from ...evaluation.comparison import Condition, Unrelated
from ...evaluation.judges import Judge, judged
from ...evaluation.pictures import Pictures, edit_of
from ...hosts import host_for
from ..contrast import contrasts_in, directions
from ..picture_recipe import PictureRecipe
from ..recipe import DirectionRecipe
from ..record.activations import tokens
from .calibration import Asking, natural_of, own_judge, pairs_of, plan_of, readings, seen, sites_of, unit_of
from .doses import ORDINARY
from .prompted import Drawing, Trials

CHANCE = 3.0
"""Likenesses of directions up to so many standard deviations of random ones, `D ** -0.5`, are no more than chance."""


BASES, SURE = 40, 0.05
"""Random bases that readings are looked at in, and the share of them up to which a site is taken for the bank's own."""
SOME = 64
"""Concepts whose readings are looked at so, at most."""
NEEDED = "that needs contrast data (sl.directions, with license=) or readings that were measured (sl.calibrate, of text)"


class Both(NamedTuple):
    """A figure as the bank stores it, and as it is here; None where it is not known."""

    stored: float | None = None
    here: float | None = None

    def __repr__(self) -> str:
        return " → ".join("–" if figure is None else f"{figure:.3g}" for figure in self)


class Held(NamedTuple):
    """What holds of a concept.

    `cosine`: the likeness of its directions and those that the bank's contrast data gives here. `unit`: the spread of its
    readings on ordinary text or plain pictures, in raw coordinates. At its useful amount, `effect`: the rise of its score, of
    pictures as a share of what the prompt does; `damage`: change of ordinary text in nats per token, of pictures in shares of
    the pipeline's own error.
    """

    cosine: Both = Both()
    unit: Both = Both()
    effect: Both = Both()
    damage: Both = Both()


class Comparison(dict[str, Held]):
    """What holds of each concept, by name; `fits` says how sites fit, and `rotated` names those whose residual stream has
    another basis: there, no direction is nearer to what the bank's own data gives than chance, or, without data, readings are
    no nearer to what was measured than in random bases. `untold` names those of which the bank knows neither."""

    def __init__(self, held: Mapping[str, Held], fits: Fit, turned: Mapping[str, bool]):
        super().__init__(held)
        self.fits, self.rotated = fits, tuple(site for site, is_turned in turned.items() if is_turned)
        self.untold = tuple(site for site, how in fits.items() if site not in turned and how not in MISFITS)

    def __repr__(self) -> str:
        rows = [("stored → here", *Held._fields)] + [(printable(name, 18), *map(repr, held)) for name, held in self.items()]
        lines = ["".join(f"{cell:<20}" for cell in row).rstrip() for row in rows]
        lines += [f"{site} is rotated: what the bank has there is no nearer to its own than chance" for site in self.rotated]
        if self.untold:
            lines.append(
                f"whether {', '.join(self.untold)} {'is' if len(self.untold) == 1 else 'are'} rotated cannot be told: {NEEDED}"
            )
        return "\n".join(lines)


def compare(
    bank: ConceptBank, model: Any, concepts: Sequence[str] | None, *, prompts: Sequence[Any] | None = None,
    judge: Judge | None = None, tokenizer: Any = None, texts: Sequence[str] | None = None, new_tokens: int | None = None,
    seed: int = 0, **drawing: Any,
) -> Comparison:  # fmt: skip
    """What `ConceptBank.compare` does."""
    if isinstance(concepts, str):
        raise BadEdit(f"expected concepts as a list, got {concepts!r:.80}")
    fits, host = bank.fits(model), host_for(model)
    names = [bank[name].name for name in concepts or [c.name for c in bank.concepts.values() if c.present is None]]
    fitting = [name for name in names if not any(fits[site] in MISFITS for site in sites_of(bank, [name]))]
    if not fitting:
        said = ", ".join(f"{site} ({how})" for site, how in fits.items())
        raise WrongModel(f"no concept of bank {bank.name!r} fits this model: {said}")
    here = ConceptBank(**{**bank.contents(), "base": BaseModel()})
    if host.has_progress:
        draw = Drawing(model, plan_of(bank, PictureRecipe, seed=seed, **drawing))
        asked = prompts or draw.recipe.read_prompts()[: draw.recipe.dev_prompts]
        found, turned = _of_pictures(draw, here, fitting, asked, judge), {}
    else:
        plan, tokenizer = plan_of(bank, DirectionRecipe, **drawing), tokenizer or host.tokenizer()
        judges = judge or (own_judge(bank, plan, ()) if plan.concepts else None)
        asked = [*(prompts or plan.read_prompts("dev"))]
        asking = judges and Asking(model, tokenizer, asked, judges, new_tokens or plan.new_tokens)
        read = list(texts or plan.read_texts(plan.reference))
        x = tokens(model, tokenizer, read, sites_of(bank, fitting), what="ordinary texts")
        found = _of_texts(here, fitting, x, Unrelated(model, tokenizer, read[-ORDINARY:]), asking)
        turned = _unnatural(here, fitting, x)
    alike, by_data = _alike(bank, model, fitting, tokenizer, drawing)
    held = {name: found.get(name, Held())._replace(cosine=alike.get(name, Both())) for name in names}
    return Comparison({name: _beside(bank[name], held[name]) for name in names}, fits, turned | by_data)


def _of_texts(
    bank: ConceptBank, names: Sequence[str], x: Mapping[str, Tensor], ordinary: Unrelated, asking: Asking | None
) -> dict[str, Held]:
    found = {}
    for name, z in readings(bank, names, x).items():
        concept, effect, damage = bank[name], None, None
        if concept.useful is not None and concept.useful_as == "Add":
            steered = Condition(name="steered", bank=bank, edits={name: concept.useful})
            damage = ordinary.side_effects(steered).kl
            if asking and asking.knows(name):
                scores = asking(name, [Condition(name="unsteered"), steered]).concepts[..., 0].mean((1, 2))
                effect = float(scores[1] - scores[0])
        unit = unit_of(z, bank.rows(concept).is_sparse)
        found[name] = Held(unit=Both(here=unit), effect=Both(here=effect), damage=Both(here=damage))
    return found


def _unnatural(bank: ConceptBank, names: Sequence[str], x: Mapping[str, Tensor]) -> dict[str, bool]:
    """By site, whether what is natural for concepts there is matched no better by their readings than by those of the same
    activations in other bases, in each of which coordinates change places and signs at random."""
    known = [name for name in names if bank[name].natural is not None]
    some, draw = known[:: max(1, len(known) // SOME)], torch.Generator().manual_seed(0)

    def turned(own: Tensor) -> Tensor:
        signs = torch.randint(2, own.shape[-1:], generator=draw) * 2 - 1
        return own[:, torch.randperm(own.shape[-1], generator=draw)] * signs

    others = [_misses(bank, some, {site: turned(own) for site, own in x.items()}) for _ in range(BASES)] if some else []
    return {site: sum(other[site] <= miss for other in others) > SURE * BASES for site, miss in _misses(bank, some, x).items()}


def _misses(bank: ConceptBank, names: Sequence[str], x: Mapping[str, Tensor]) -> dict[str, float]:
    """By site, by how much the ends of readings miss those that are natural, in shares of what lies between these."""
    found: dict[str, list[float]] = {}
    for name, z in readings(bank, names, x).items():
        natural, here = bank[name].natural or (0.0, 0.0), natural_of(z, bank.rows(bank[name]).is_sparse)
        miss = sum(abs(one - other) for one, other in zip(natural, here, strict=True)) / max(1e-12, natural[1] - natural[0])
        found.setdefault(bank.read_at(bank[name]), []).append(miss)
    return {site: sum(misses) / len(misses) for site, misses in found.items()}


def _of_pictures(
    drawing: Drawing, bank: ConceptBank, names: Sequence[str], prompts: Sequence[Any], judge: Judge | None
) -> dict[str, Held]:
    pairs, found = {name: pairs_of(bank[name], prompts, drawing.recipe) for name in names}, {}
    for name, z in seen(drawing, bank, pairs[names[0]], names)[0].items():
        concept, plain = bank[name], [pair.negative for pair in pairs[name]]

        def score(pictures: Pictures, name: str, plain: list[str] = plain) -> Any:
            assert judge is not None
            return judged(judge, plain, pictures, name)

        effect = damage = None
        if concept.useful is not None:
            trials = Trials(drawing, pairs[name], name, score if judge else None)
            effect, damage = trials.of(bank, {name: edit_of(concept.useful_as, concept.useful)})
        unit = unit_of(z, bank.rows(concept).is_sparse)
        found[name] = Held(unit=Both(here=unit), effect=Both(here=effect), damage=Both(here=damage))
    return found


def _beside(concept: Concept, held: Held) -> Held:
    """The same beside what the bank stores of the concept."""
    effects, table = concept.effects, concept.effects.get("conditions", {})
    plain, steered = (table.get(name, {}) for name in ("unsteered", "steered"))
    effect = steered["score"] - plain["score"] if steered and plain else effects.get("effect")
    unit = concept.unit if concept.natural is not None else None
    damage = steered.get("kl", effects.get("damage"))
    stored = {"unit": unit, "effect": effect, "damage": damage}
    return held._replace(**{key: Both(figure, getattr(held, key).here) for key, figure in stored.items()})


def _alike(
    bank: ConceptBank, model: Any, names: Sequence[str], tokenizer: Any, drawing: Mapping[str, Any]
) -> tuple[dict[str, Both], dict[str, bool]]:
    """Likenesses of the bank's directions and those that its contrast data gives here, and by site whether all are chance."""
    own = bank.contents()
    chosen = [bank[name] for name in names if name in contrasts_in(bank) and not bank.rows(bank[name]).is_sparse]
    if not chosen:
        return {}, {}
    some = ConceptBank(**{**own, "concepts": [_free(concept) for concept in chosen], "graph": None})
    again = directions(model, some, tokenizer=tokenizer, **drawing)
    found: dict[str, Both] = {}
    by_site: dict[str, list[float]] = {}
    for concept in chosen:
        there = {again.site_of(place): again.rows(place).write[0] for place in again[concept.name].places}
        sites = [bank.site_of(place) for place in concept.places]
        ours, theirs = [bank.rows(place).write[0] for place in concept.places], [there[site] for site in sites]
        for site, one, other in zip(sites, ours, theirs, strict=True):
            by_site.setdefault(site, []).append(_cosine(one, other) * len(one) ** 0.5)
        found[concept.name] = Both(None, _cosine(torch.cat(ours), torch.cat(theirs)))
    return found, {site: max(map(abs, alike)) <= CHANCE for site, alike in by_site.items()}


def _free(concept: Concept) -> Concept:
    """The same without its gate, which may be none of those that are looked at."""
    return Concept(name=concept.name, encoder=concept.encoder, index=concept.index, parts=concept.parts)


def _cosine(one: Tensor, other: Tensor) -> float:
    return float(cosine_similarity(one.double(), other.double(), dim=0))
