"""`steer` and `attach`: the live session between a bank and a model."""

import threading
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Literal

from ..bank import ConceptBank
from ..errors import ConflictingEdits, ModelBusy, OutOfRange, SiteNotReached
from ..hooks.attach import LOCK, Attachment, Socket, attachment, is_compiled
from ..hosts import host_for
from ..passes import Branch
from .compiled import CompiledEdit, stand
from .dispatch import Owner, rewire
from .plan import Do, Edits, Options, Plan, plan_for
from .program import Run
from .report import Report, line
from .twin import follow


class Steering:
    """A live session: what is attached, what is edited, what happened. `sl.steer` and `sl.attach` make one.

    A context manager: edits act inside its `with` block. Printing it shows the report.

    Attributes:
        bank: the bank whose concepts it edits.
        host: the model, as steerlib sees it.
        plan: what is done; runs: how far it was done, by site; thread: in which one it acts.

    >>> with sl.steer(model, bank, {"a": 2.0}) as session:
    ...     _ = model(torch.ones(1, 4, dtype=torch.long))
    >>> [(line.concept, line.site, line.tokens) for line in session.report().lines]
    [('a', 'layers.0', 4)]
    """

    def __init__(self, target: object, bank: ConceptBank, *, edits: Edits, options: Options):
        self.host, self.bank, self.options = host_for(target), bank, options
        self.plan: Plan = plan_for(bank, self.host, edits, options)
        self.runs: dict[str, Run] = {}
        self.thread = 0
        self._place: Attachment | None = None
        self._owners: list[tuple[Socket, Owner]] = []
        self._passes: dict[str, Counter[int]] = {}
        self._remove: Callable[[], None] | None = None
        self._ran = self._entered = False
        self._undo = ExitStack()

    def attach(self) -> "Steering":
        """Put permanent sockets at every site of the bank, so that the model can be compiled afterwards."""
        self._remove = self._remove or stand(self.host, self.bank)
        return self

    def set(self, edits: Edits, **options: Any) -> "Steering":
        """Edit these concepts from now on, in place of those before.

        Args:
            edits: as for `sl.steer`.
            options: `branch`, `do`, `hold`, `free`, `allow_ood` and `exact` of `sl.steer`; those left out stay as they were.

        Returns this session. Raises what `sl.steer` raises, and then edits what it edited before.

        >>> steering = sl.attach(model, bank)
        >>> steering.set({"a": 2.0}).clear().detach()
        """
        chosen = self.options._replace(**{n: tuple(v) if n in ("hold", "free") else v for n, v in options.items()})
        before, plan = (self.plan, self.options), plan_for(self.bank, self.host, edits, chosen)
        self._leave()
        self.plan, self.options, self._ran = plan, chosen, False
        try:
            self._enter()
        except BaseException:
            self.plan, self.options = before
            self._enter()
            raise
        notify(plan, 3)
        return self

    def clear(self) -> "Steering":
        """Edit nothing, and stay attached."""
        return self.set({})

    def detach(self) -> None:
        """Leave the model as it was: no hook, attribute or tensor of steerlib stays."""
        self._leave()
        if self._remove is not None:
            self._remove()
            self._remove = None

    def __enter__(self) -> "Steering":
        if not self._entered:
            self._enter()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        missed, capped = ([], False) if kind else (self._missed(), any(r.counts.capped for r in self.runs.values()))
        self.detach()
        if missed:
            raise SiteNotReached(
                f"the model ran, but never through {', '.join(map(repr, missed))}; "
                f"nothing was edited there. Sites of this model: {', '.join(list(self.host.sites())[:6])}, …"
            )
        if capped:
            warnings.warn("edits were capped in length at run time; see report()", OutOfRange, stacklevel=2)

    def _enter(self) -> None:
        self.thread = threading.get_ident()
        with LOCK:
            place = attachment(self.host)
            _refuse(self, place.sessions)
            place.require(self.host, self.plan.sites)
            self._place, self._entered = place, True
            try:
                self._passes = {path: clock.passes.copy() for path, clock in place.clocks.items()}
                self.runs = {name: Run(program) for name, program in self.plan.programs.items()}
                if self.plan.programs:
                    place.sessions.append(self)
                    self._owners = [(place.sockets[name], Owner("edit", run, self.thread)) for name, run in self.runs.items()]
                    for socket, owner in self._owners:
                        socket.owners.append(owner)
                    if self.plan.pins:
                        self._undo.callback(follow(self, place))
                rewire(place)
            except BaseException:
                self._leave()
                raise

    def _leave(self) -> None:
        place = self._place
        if place is None or not self._entered:
            return
        self._ran, self._entered = self._ran or self._has_run(), False
        with LOCK:
            self._undo.close()
            if self in place.sessions:
                place.sessions.remove(self)
            for socket, owner in self._owners:
                socket.owners.remove(owner)
            self._owners = []
            rewire(place)
            place.release(self.host, self.plan.sites)

    def _missed(self) -> list[str]:
        """Sites that were never reached although the model ran."""
        if self._place is None or not self._entered or not self._has_run():
            return []
        hit = {n for n, s in self._place.sockets.items() if isinstance(s.traced, CompiledEdit) and bool(s.traced.hits)}
        return [site.name for site in self.plan.sites if not self.runs[site.name].tally.passes and site.name not in hit]

    def _has_run(self) -> bool:
        """Whether the model made a pass inside this session."""
        if (place := self._place) is None:
            return False
        alone = all(session.thread == self.thread for session in place.sessions)
        new = [clock.passes - self._passes.get(path, Counter()) for path, clock in place.clocks.items()]
        return any(passes[self.thread] or (alone and passes) for passes in new)

    def report(self) -> Report:
        """What was edited where, how much, and how far off the natural range; and why nothing happened, if so."""
        lines = []
        for name, run in self.runs.items():
            counts, norm = run.counts, self.bank.sites[name].norm if run.program.edits else None
            lines += [line(edit, k, name, norm, counts) for k, edit in enumerate(run.program.edits)]
        return Report(tuple(lines), self._ran or self._has_run(), self.plan.cautions)

    def __repr__(self) -> str:
        return str(self.report())

    def _repr_html_(self) -> str:
        return self.report()._repr_html_()


def _refuse(new: Steering, others: Sequence[Steering]) -> None:
    """One concept may be given one value only, and a compiled model be steered by one thread."""
    same = [session for session in others if session.thread == new.thread]
    if len(same) < len(others) and new.plan.programs and is_compiled([new.host.model]):
        raise ModelBusy("another thread steers this compiled model; take turns, or load a second copy")
    fixed = {edit.key for session in same for edit in session.plan.edits if edit.is_target}
    if twice := next((edit for edit in new.plan.edits if edit.is_target and edit.key in fixed), None):
        raise ConflictingEdits(f"{twice.name!r} is set by an outer steer() already; set it once")


def notify(plan: Plan, stacklevel: int) -> None:
    """Give the plan's warnings, at the line of whoever is `stacklevel` calls above."""
    for text, kind in plan.notices:
        warnings.warn(text, kind, stacklevel=stacklevel)


def steer(
    target: object,
    bank: ConceptBank,
    edits: Edits,
    *,
    branch: Literal["both"] | Branch = "both",
    do: Do = "model",
    hold: Sequence[str] = (),
    free: Sequence[str] = (),
    allow_ood: bool = False,
    exact: bool = True,
) -> Steering:
    """Change concepts of a model inside a `with` block.

    Args:
        target: a transformers or PEFT model, a diffusers pipeline, or any `torch.nn.Module`. Compiled ones: `sl.attach` first.
        bank: whose concepts are edited; it must have been made for this architecture.
        edits: name, or `encoder/index`, -> an addition in units of the concept, one for each prompt, or an intervention.
        branch: the half of guidance that is edited: "both", "cond" (with the prompt) or "uncond".
        do: "model": the network carries an edit on. "hold": each pass runs unsteered too, and descendants in the bank's graph
            are pinned to their values there; edits are skipped on tokens where a stored gate of a pinned concept is open
            that they do not share. "graph": the graph's forecast is added at later sites.
        hold, free: with `do="hold"`, other concepts to pin, and descendants that are not pinned.
        allow_ood: allow changes of any length and values outside the natural range ("out of distribution"): no caps.
        exact: read latents that compete (TopK) beside all others; False: by the bank's threshold, as cheap as a direction.
            `Ablate(exact=True)` is about what is read afterwards.

    Returns a `Steering`; its `report()` says what happened. Raises before the model is touched: `UnknownConcept`,
    `UnknownSite`, `UnsupportedTarget`, `BadEdit`, `BadBank`, `CompiledModel`. From the run: `RowMismatch` where amounts are
    not one for each prompt; at the end of the block: `SiteNotReached` where the model never went through an edited site.

    >>> with sl.steer(model, bank, {"a": 2.0, "b": sl.Ablate()}) as session:
    ...     _ = model(torch.ones(1, 4, dtype=torch.long))
    >>> session.report().ran
    True
    """
    session = Steering(target, bank, edits=edits, options=Options(branch, do, tuple(hold), tuple(free), allow_ood, exact))
    notify(session.plan, 3)
    return session


def attach(target: object, bank: ConceptBank, *, allow_ood: bool = False, exact: bool = True) -> Steering:
    """Put sockets at every site of a bank that stay until `detach()`. Do this before compiling; edit with `set`.

    Args:
        target, bank, allow_ood, exact: as for `sl.steer`.

    Returns a `Steering` that edits nothing yet. Raises `CompiledModel` where torch has compiled the model already, since it
    ignores hooks that are added later, and what `sl.steer` raises about bank and model.

    >>> steering = sl.attach(model, bank)
    >>> steering.set({"a": 2.0}).detach()
    """
    session = Steering(target, bank, edits={}, options=Options(allow_ood=allow_ood, exact=exact))
    notify(session.plan, 3)
    return session.attach()
