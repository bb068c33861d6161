"""What moving something does to what comes out: an input, a coordinate, an activation, or what lies between (2505.03530).

The four manipulations of Roy et al., and a swap of codes, for anything that is run alike every time: an autoencoder's decoder,
a pipeline from fixed noise, a language model's next token. Each gives an `Effect`: the change of the outcome, its interval, and
that of a control.

`R` runs that are averaged, `B` rows of the input, `...` axes of an outcome
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from ..bank.concept_bank import ConceptBank
from ..bank.concepts import Concept
from ..encoders import Directions, Encoder
from ..errors import BadEdit
from ..steering.interventions import Intervention, Patch, Set
from ..steering.recording import observing, record, replacing
from ..steering.session import steer
from ..steering.swapping import Swap
from .mediation import mediation, places_of

Run = Callable[[Any], Tensor]
"""Runs the target on inputs, with the same random numbers every time, and gives the outcome `[B, ...]`."""
RESAMPLED = 2000
"""Draws of the bootstrap."""


@dataclass(frozen=True, eq=False, repr=False)
class Decoder:
    """What is studied: a model, how it is run, and the bank whose concepts are its coordinates.

    Args:
        target: the module or pipeline that `run` uses; what `sl.steer` takes.
        run: inputs to outcome `[B, ...]`; `steerlib.evaluation.decoders` has some.
        bank: made for the target.

    >>> studied = Decoder(model, lambda ids: model(ids).logits[:, -1].softmax(-1), bank)
    >>> by_latent(studied, torch.tensor([[1, 2, 3], [4, 5, 6]]), "a").strength > 0
    True
    """

    target: Any
    run: Run
    bank: ConceptBank

    @torch.no_grad()
    def __call__(self, inputs: Any, edits: "Mapping[Any, Intervention] | None" = None) -> Tensor:
        """The outcome, with edits of the bank or without, float32 on the CPU."""
        return self.edited(self.bank, inputs, edits or {})

    @torch.no_grad()
    def edited(self, bank: ConceptBank, inputs: Any, edits: Mapping[Any, Intervention]) -> Tensor:
        """The outcome with edits of any bank."""
        if not edits:
            return self.run(inputs).float().cpu()
        with steer(self.target, bank, edits, allow_ood=True):
            return self.run(inputs).float().cpu()


class Interval(NamedTuple):
    """A mean over rows, and its 95 % interval by bootstrap over rows; None for the ends where there is one row alone."""

    mean: float
    low: float | None
    high: float | None

    @classmethod
    def of(cls, values: Float[Tensor, " B"], seed: int = 0) -> "Interval":
        """Of one value a row."""
        found = values.double().numpy()
        if len(found) < 2:
            return cls(float(found.mean()), None, None)
        drawn = found[np.random.default_rng(seed).integers(0, len(found), (RESAMPLED, len(found)))].mean(1)
        low, high = np.quantile(drawn, (0.025, 0.975))
        return cls(float(found.mean()), float(low), float(high))

    def __str__(self) -> str:
        return f"{self.mean:.4g}" + ("" if self.low is None else f" ({self.low:.4g} to {self.high:.4g})")


@dataclass(frozen=True, eq=False, repr=False)
class Effect:
    """What a manipulation did, beside a control. Lengths are Euclidean, over all of an outcome.

    Attributes:
        change: of the outcome, `[R, B, ...]`.
        control: the same of the control.
        length: of the change, mean over runs and rows: the causal effect strength of 2505.03530.
        by_chance: of the control's change.
        beyond: length less that of the control, row by row.
        share: of the whole change from reference to value, how much lies along it; None where nothing is replaced by another.
        share_by_chance: the same of the control.
    """

    change: Float[Tensor, "R B ..."]
    control: Float[Tensor, "R B ..."]
    length: Interval
    by_chance: Interval
    beyond: Interval
    share: float | None = None
    share_by_chance: float | None = None

    @classmethod
    def of(cls, change: Tensor, control: Tensor, total: Tensor | None = None) -> "Effect":
        """From changes; `total [B, ...]` is what replacing everything does. The same rows are drawn for change and control."""
        own, other = lengths(change), lengths(control)
        shares = (None, None) if total is None else (share(change, total), share(control, total))
        length, by_chance, beyond = map(Interval.of, (own, other, own - other))
        return cls(change, control, length, by_chance, beyond, *shares)

    @property
    def strength(self) -> float:
        """Mean length of the change."""
        return self.length.mean

    def __repr__(self) -> str:
        said = "" if self.share is None else f", {self.share:.0%} of the whole change (control {self.share_by_chance:.0%})"
        return f"Effect {self.length}, control {self.by_chance.mean:.4g}{said}"


def lengths(change: Float[Tensor, "R B ..."]) -> Float[Tensor, " B"]:
    """Euclidean length of each row's change, mean over runs."""
    return change.double().flatten(2).norm(dim=-1).mean(0)


def share(change: Float[Tensor, "R B ..."], total: Float[Tensor, "B ..."]) -> float | None:
    """`<change, total> / |total|^2` over all rows; None where the whole change is nothing."""
    whole = total.double()
    size = float(whole.square().sum())
    return float((change.double().mean(0) * whole).sum()) / size if size else None


# -- the four manipulations ------------------------------------------------------------------------------------------


def by_input(studied: Decoder, value: Any, reference: Any, *, control: Any = None, seed: int = 0) -> Effect:
    """Change the input from `reference` to `value`, as when one factor is changed.

    The control is another change of `reference`: by default the same one, its numbers in a random order. Inputs that are no
    numbers on a scale, such as token ids, need a `control` of your own; raises `BadEdit` without.
    """
    if control is None:
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            raise BadEdit("expected control=, other inputs to compare with; only numbers on a scale have one by default")
        control = reference + _mixed(value - reference, seed)
    plain, *others = (studied(inputs) for inputs in (reference, value, control))
    return Effect.of(*(other[None] - plain for other in others))


def by_latent(
    studied: Decoder,
    inputs: Any,
    concept: str,
    *,
    values: Sequence[float] = (),
    unit: Any = "concept",
    draws: int = 1,
    seed: int = 0,
) -> Effect:
    """Set one coordinate: to each of `values` in turn, or to draws of its own marginal, what it reads in other rows.

    The control is a random direction at the same site, as long, treated alike. `unit` is that of `values`.
    """
    plain, changes = studied(inputs), []
    for bank, names in (places_of(studied.bank, [concept]), at_random(studied.bank, [concept], seed)):
        if values:
            edits = [{name: Set(v, unit=unit) for name in names} for v in values]
        else:
            edits = drawn(studied, bank, names, inputs, draws, seed)
        changes.append(torch.stack([studied.edited(bank, inputs, some) - plain for some in edits]))
    return Effect.of(*changes)


def by_swap(studied: Decoder, inputs: Any, concept: str, others: Sequence[str], *, seed: int = 0) -> Effect:
    """Put each of other codes of a quantiser in the place of one, in turn: discrete codes are swapped, not clamped.

    The control moves the same positions as far, in random directions.
    """
    bank, plain, rng = studied.bank, studied(inputs), torch.Generator().manual_seed(seed + 7_919)
    place, encoder = bank[concept].places[0], bank.encoder(bank[concept].encoder)
    own, changes, controls = bank.rows(place).write[0], [], []
    for other in others:
        far = bank.rows(bank[other]).write[0] - own
        away = normalize(torch.randn(far.shape, generator=rng), dim=0) * far.norm()
        changes.append(studied(inputs, {concept: Swap(other)}) - plain)
        shoved = partial(_shoved, encoder=encoder, index=place.index, away=away)
        with replacing(studied.target, {bank.site_of(place): lambda x, _, shoved=shoved: shoved(x)}):
            controls.append(studied(inputs) - plain)
    return Effect.of(torch.stack(changes), torch.stack(controls))


def by_patch(
    studied: Decoder,
    value: Any,
    reference: Any,
    site: str,
    *,
    channels: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    seed: int = 0,
) -> Effect:
    """Run on `reference` with the activations of `value` at a site: all, some channels, some positions, or both.

    A head is a site of its own. The control patches as many other channels, or else positions, drawn at random (of all, where
    too few others are left); of a whole site, it is the activations of another row of `value`.
    """
    tape: list[Tensor] = []
    with observing(studied.target, {site: lambda x, _: tape.append(x.detach().clone())}):
        total = studied(value)
    plain = studied(reference)

    def patched(rows: Tensor | None, channels: Any, positions: Any) -> Tensor:
        source = iter(tape)
        swap = partial(_laid_in, rows=rows, channels=channels, positions=positions)
        with replacing(studied.target, {site: lambda x, _: swap(x, next(source))}):
            return studied(reference)[None] - plain

    rng = np.random.default_rng(seed)
    shape = tape[0].shape
    if channels is not None:
        control = patched(None, _others(channels, shape[2], rng), positions)
    elif positions is not None:
        control = patched(None, None, _others(positions, shape[1], rng))
    else:
        control = patched(torch.arange(len(plain)).roll(1), None, None)
    return Effect.of(patched(None, channels, positions), control, total - plain)


class Mediated(NamedTuple):
    """Effects of an input in all, around mediators, and through them; row by row `total = direct + indirect`."""

    total: Effect
    direct: Effect
    indirect: Effect


def by_mediators(studied: Decoder, value: Any, reference: Any, concepts: Sequence[str], *, seed: int = 0) -> Mediated:
    """How much of what an input does goes through concepts (`mediation`, row by row): total, natural direct, total indirect.

    The control holds as many random directions at the same sites.
    """
    found = []
    for bank, names in (places_of(studied.bank, concepts), at_random(studied.bank, concepts, seed)):
        how: Any = {"value": value, "reference": reference}
        found.append(mediation(studied.target, bank, names, lambda inputs: studied(inputs)[None], **how))
    own, other = found
    pairs = ((own.te, other.te), (own.nde, other.nde), (own.tie, other.tie))
    return Mediated(*(Effect.of(mine[None], theirs[None], own.te) for mine, theirs in pairs))


# -- parts -----------------------------------------------------------------------------------------------------------


def drawn(
    studied: Decoder, bank: ConceptBank, names: Sequence[str], inputs: Any, draws: int, seed: int
) -> list[dict[Any, Intervention]]:
    """Edits that give each row what the concepts read in another row, of the same pass; in text, at the same position."""
    with torch.no_grad(), record(studied.target, bank, names) as tape:
        rows = len(studied.run(inputs))
    if rows < 2:
        raise BadEdit("expected two rows or more to draw a coordinate's values from each other, got one; give values=")
    order = torch.as_tensor(np.random.default_rng(seed).permutation(rows))
    return [{name: Patch({name: [_dealt(one, order, k + 1) for one in tape[name]]}) for name in names} for k in range(draws)]


def _dealt(recorded: tuple[Any, Tensor], order: Int[Tensor, " B"], by: int) -> tuple[Any, Tensor]:
    """What was recorded, each row given that of another one; halves of guidance are kept apart."""
    state, z = recorded
    if state.real is not None and not bool(state.real.all()):
        raise BadEdit("rows of several lengths cannot take each other's readings; give rows of one length, or values=")
    other = torch.empty_like(order)
    other[order] = order.roll(by % len(order) or 1)
    halves = [part[other.to(z.device)] for part in z.split(len(order))]
    return state, torch.cat(halves)


def at_random(bank: ConceptBank, concepts: Sequence[str], seed: int) -> tuple[ConceptBank, list[str]]:
    """As many random directions at the same sites, each as long as what it stands for writes."""
    rng, rows, made = torch.Generator().manual_seed(seed + 7_919), {}, []
    for place in (place for name in concepts for place in bank[name].places):
        own = rows.setdefault(place.encoder, [])
        write = bank.rows(place).write[0].detach().float().cpu()
        own.append(normalize(torch.randn(len(write), generator=rng), dim=0) * write.norm().clamp(min=1e-12))
        made.append(Concept(name=f"random {len(made)}", encoder=place.encoder, index=len(own) - 1, unit=place.unit))
    made_of: dict[str, Any] = {id: Directions(torch.stack(some)) for id, some in rows.items()}
    where = {id: bank.encoder_facts[id].site for id in rows}
    sites = {site: bank.sites[site] for site in where.values()}
    found = ConceptBank("random", made, made_of, base=bank.base, sites=sites, where=where, levels=bank.levels)
    return found, [concept.name for concept in made]


def _shoved(x: Tensor, *, encoder: Encoder, index: int, away: Tensor) -> Tensor:
    """Activations moved away where a code is."""
    return x + (encoder.encode(x)[..., index, None] * away.to(x.device)).to(x.dtype)


def _laid_in(x: Tensor, source: Tensor, *, rows: Any, channels: Any, positions: Any) -> Tensor:
    """Activations `[B, N, D]` with a part of others in them."""
    if x.shape != source.shape:
        raise BadEdit(f"the site has {tuple(x.shape)} for one input and {tuple(source.shape)} for the other; use equal sizes")
    source = source if rows is None else source[rows.to(source.device)]
    on_channel, on_position = (
        _marked(some, size, x.device) for some, size in ((channels, x.shape[2]), (positions, x.shape[1]))
    )
    return torch.where(on_position[:, None] & on_channel, source, x)


def _marked(some: Sequence[int] | None, size: int, device: torch.device) -> Tensor:
    """Which of a number of places are meant; None: all."""
    marks = torch.full((size,), some is None, device=device)
    if some is not None:
        if not all(0 <= place < size for place in some):
            raise BadEdit(f"expected places from 0 to {size - 1}, got {list(some)!r:.80}")
        marks[list(some)] = True
    return marks


def _others(some: Sequence[int], size: int, rng: np.random.Generator) -> list[int]:
    """As many places drawn from the others, or from all where too few are left."""
    left = np.setdiff1d(np.arange(size), np.asarray(some, int))
    pool = left if len(left) >= len(some) else np.arange(size)
    return rng.choice(pool, min(len(some), len(pool)), replace=False).tolist()


def _mixed(change: Tensor, seed: int) -> Tensor:
    """Each row's numbers in the same random order."""
    flat = change.flatten(1)
    return flat[:, torch.as_tensor(np.random.default_rng(seed).permutation(flat.shape[1]))].reshape(change.shape)
