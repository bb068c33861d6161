"""`record`: what passes see, by concept or by site."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from torch import Tensor

from ..bank.concept_bank import ConceptBank
from ..bank.concepts import Concept
from ..errors import ConflictingEdits
from ..hooks.attach import LOCK, Attachment, attachment
from ..hosts import Host, host_for
from ..passes import StepState
from ..sites import Site
from .edit import Reading

Replace = Callable[[Tensor, StepState], Tensor]
Tape = dict[str, list[tuple[StepState, Tensor]]]


@contextmanager
def record(target: object, bank_or_sites: ConceptBank | Sequence[str], concepts: Sequence[str] | None = None) -> Iterator[Tape]:
    """Record every pass inside a `with` block: `tape[name]` lists `(state, values)`.

    With a bank, values are the concepts' readings `z[B, N]` (raw coordinates, after any edit); with names of sites,
    the activations `x[B, N, D]` themselves.
    """
    host = host_for(target)
    tape: Tape = {}
    with ExitStack() as stack:
        if isinstance(bank_or_sites, ConceptBank):
            bank_or_sites.check(host)
            for name in concepts if concepts is not None else bank_or_sites.concepts:
                concept = bank_or_sites[name]
                site = host.site(bank_or_sites.read_at(concept))
                _observe(host, site, _reader(bank_or_sites, concept, tape.setdefault(concept.name, [])), stack)
        else:
            for name in [bank_or_sites] if isinstance(bank_or_sites, str) else bank_or_sites:
                _observe(host, host.site(name), _keeper(tape.setdefault(name, [])), stack)
        yield tape


@contextmanager
def observing(target: object, observers: Mapping[str, Callable[[Tensor, StepState], None]]) -> Iterator[None]:
    """Inside a `with` block, show every pass to an observer at each of some sites, by name: `x[B, N, D]` and the state.

    What an observer raises ends the pass and reaches whoever ran the model.
    """
    host = host_for(target)
    with ExitStack() as stack:
        for name, observe in observers.items():
            _observe(host, host.site(name), observe, stack)
        yield


@contextmanager
def replacing(target: object, edits: Mapping[str, Replace]) -> Iterator[None]:
    """Inside a `with` block, what goes on from each of some sites, by name, is what a function makes of it: `x[B, N, D]` and
    the state, to a tensor of the same shape.

    For whoever patches activations by hand. Raises `ConflictingEdits` where a session steers one of the sites.
    """
    host = host_for(target)
    sites = {name: host.site(name) for name in edits}
    with ExitStack() as stack:
        for name, edit in edits.items():
            with LOCK:
                place = attachment(host)
                place.require(host, [sites[name]])
            stack.callback(_release, place, host, sites[name])
            socket = place.sockets[sites[name].name]
            if socket.edit is not None:
                raise ConflictingEdits(f"expected nobody to steer {name!r}, but a session does; leave it first")
            socket.edit = edit
            stack.callback(setattr, socket, "edit", None)
        yield


def _observe(host: Host, site: Site, observe: Callable[[Tensor, StepState], None], stack: ExitStack) -> None:
    with LOCK:
        place = attachment(host)
        place.require(host, [site])
    stack.callback(_release, place, host, site)
    observers = place.sockets[site.name].observers
    observers.append(observe)
    stack.callback(observers.remove, observe)


def _release(place: Attachment, host: Host, site: Site) -> None:
    with LOCK:
        place.release(host, [site])


def _reader(bank: ConceptBank, concept: Concept, out: list[tuple[StepState, Tensor]]) -> Callable[[Tensor, StepState], None]:
    crowd = bank.encoder(concept.encoder) if bank.competes(concept) else None
    reading = Reading(concept.id, bank.rows(concept), 1.0, crowd, concept.index)

    def observe(x: Tensor, state: StepState) -> None:
        out.append((state.detached(), reading.of(x)))

    return observe


def _keeper(out: list[tuple[StepState, Tensor]]) -> Callable[[Tensor, StepState], None]:
    return lambda x, state: out.append((state.detached(), x.detach().clone()))
