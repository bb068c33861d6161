"""`record`: what passes read, by concept or by site; and activations replaced by hand."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..bank import ConceptBank
from ..bank.concepts import Concept
from ..bank.editing import together
from ..devices import unrounded
from ..errors import Unanswerable
from ..hosts import host_for
from ..passes import StepState
from .dispatch import beside
from .reading import reader

Observe = Callable[[Tensor, StepState], Any]
Replace = Callable[[Tensor, StepState], Tensor]


class Tape(dict[str, list[tuple[StepState, Tensor]]]):
    """What was recorded, by name: see `record`. `bank` is whose concepts they are, None where whole sites were recorded."""

    bank: ConceptBank | None = None

    def latents(self) -> dict[str, Tensor]:
        """Readings `z[B, N]` of its sparse latents in their units, those of all passes one after the other: where a forecast
        for this prompt starts, `bank.graph.forecast(changes, given=tape)`."""
        if self.bank is None:
            raise Unanswerable("whole sites were recorded, which read no concepts; record a bank: sl.record(model, bank)")
        sparse = {name: passes for name, passes in self.items() if self.bank.rows(self.bank[name]).is_sparse}
        return {name: torch.cat([z for _, z in passes], 1) / self.bank[name].unit for name, passes in sparse.items()}


@contextmanager
def record(
    target: object,
    bank_or_sites: ConceptBank | Sequence[ConceptBank] | Sequence[str],
    concepts: Sequence[str | Concept] | None = None,
) -> Iterator[Tape]:
    """Record every pass inside a `with` block.

    Args:
        target: what `sl.steer` takes.
        bank_or_sites: a bank, several, or names of sites.
        concepts: of the bank, by name, or combinations of them; None: all.

    Gives a tape: `tape[name]` lists `(state, values)`, one for each pass, where `state` says where the pass stands. With a
    bank, values are the concepts' readings `z[B, N]`, in raw coordinates and after any edit; with names of sites, the
    activations `x[B, N, D]` themselves. Raises `UnknownConcept`, `UnknownSite` or `WrongModel`.

    >>> with sl.record(model, bank, ["a"]) as tape:
    ...     _ = model(torch.ones(1, 4, dtype=torch.long))
    >>> tape["a"][0][1].shape
    torch.Size([1, 4])
    """
    tape = Tape()
    given: Any = [bank_or_sites] if isinstance(bank_or_sites, str | ConceptBank) else [*bank_or_sites]
    if not any(isinstance(one, ConceptBank) for one in given):
        with observing(target, {name: _keeper(tape.setdefault(name, []), lambda x, _: x.detach().clone()) for name in given}):
            yield tape
        return
    bank, host = together(given), host_for(target)
    bank.check(host)
    tape.bank, acts = bank, []
    for concept in [bank[name] for name in (concepts if concepts is not None else bank.concepts)]:
        keep = _keeper(tape.setdefault(concept.name, []), reader(bank, concept, concept.name))
        acts.append((host.site(bank.read_at(concept)), "observe", keep))
    with beside(host, acts):
        yield tape


@contextmanager
def observing(target: object, observers: Mapping[str, Observe]) -> Iterator[None]:
    """Inside a `with` block, show every pass to an observer at each of some sites, by name: `x[B, N, D]` and the state.

    What an observer raises ends the pass and reaches whoever ran the model.
    """
    with _acting(target, "observe", observers):
        yield


@contextmanager
def replacing(target: object, edits: Mapping[str, Replace]) -> Iterator[None]:
    """Inside a `with` block, what goes on from each of some sites, by name, is what a function makes of it: `x[B, N, D]` and
    the state, to a tensor of the same shape.

    For whoever patches activations by hand. Edits of `steer` at the same site act on what the function gives.
    """
    with _acting(target, "replace", edits):
        yield


@contextmanager
def _acting(target: object, role: Any, acts: Mapping[str, Callable[[Tensor, StepState], Any]]) -> Iterator[None]:
    host = host_for(target)
    with beside(host, [(host.site(name), role, act) for name, act in acts.items()]):
        yield


def conditional(x: Tensor, state: StepState) -> Tensor | None:
    """The rows that the prompt steers: all without guidance, none in a pass for the other half alone."""
    if not state.branches:
        return x
    if "cond" not in state.branches:
        return None
    return x.chunk(len(state.branches))[state.branches.index("cond")]


def _keeper(out: list[tuple[StepState, Tensor]], read: Callable[[Tensor, StepState], Tensor]) -> Observe:
    def keep(x: Tensor, state: StepState) -> None:
        with unrounded(x):
            out.append((state.detached(), read(x, state)))

    return keep
