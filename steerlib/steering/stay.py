"""What a session puts into a model and takes away again, also where the session itself was lost."""

import warnings
from typing import Any
from weakref import ref

from ..contexts import ENTERED, Entry, acting, is_inside
from ..errors import ConflictingEdits, ModelBusy, Outlived
from ..hooks.attach import LOCK, attachment, is_compiled, modules_on
from ..hosts import Host
from .dispatch import Owner, Present, depart, is_shared, own, rewire
from .plan import Plan
from .program import Run
from .twin import follow


class Stay:
    """A session's time in a model. It does not keep the session alive, which may be forgotten.

    Args:
        session: whose it is.
        plan: what is done, until `put` says otherwise.
        standing: whether it was set on an attached model; else it begins a block.

    Attributes:
        runs: how far the plan was carried out, by site; place, one: where, and who is present there.
        before: passes of each clock, by what was entered in their context, when this began.
    """

    def __init__(self, session: Any, plan: Plan, *, standing: bool):
        self.host, self.bank, self.held = session.host, session.bank, session.held
        self._session, self._unfollow = ref(session), nothing
        self.runs: dict[str, Run] = {}
        with LOCK:
            self.place = attachment(self.host)
            together = self._together()
            for other in [other for kin in self.place.kin for other in kin.present if other.stay is not None]:
                if other.stay.is_lost or (standing and other in together and other.stay.is_replaced_by(self)):
                    other.stay.forget()
            self.place = attachment(self.host)  # which may have gone with those
            self.one = Present(Entry(standing=standing), plan, self)
            self.place.present.append(self.one)
            self.before = {path: dict(clock.passes) for path, clock in self.place.clocks.items()}
            try:
                self.put(plan, first=True)
            except BaseException:
                depart(self.place, self.one)
                raise

    def put(self, plan: Plan, *, first: bool = False) -> None:
        """Do this, in place of what was done; raises what forbids it, and then changes nothing."""
        with LOCK:
            if self.one.entry.standing and self.one.entry not in (ENTERED.get() or ()):
                self.one.entry.close()
                self.one.entry = Entry(standing=True)  # set again somewhere else
            self._refuse(plan)
            self.place.require(self.host, plan.sites)
            before = self.one.plan, self.runs
            try:
                self._swap(plan, {name: self._run(name, plan) for name in plan.programs})
            except BaseException:
                self._swap(*before)
                self.place.release(self.host, plan.sites)
                raise
            if not first:
                self.place.release(self.host, before[0].sites)

    def leave(self) -> None:
        """Take everything away."""
        with LOCK:
            if self.is_here:
                self._unfollow()
                depart(self.place, self.one)
                self.place.release(self.host, self.one.plan.sites)

    # -- other sessions ----------------------------------------------------------------------------------------

    @property
    def is_here(self) -> bool:
        """Whether it was neither left nor taken away."""
        return self.one in self.place.present

    @property
    def is_lost(self) -> bool:
        """Whether the session was never left and nobody has it any more."""
        return self._session() is None

    def is_replaced_by(self, other: "Stay") -> bool:
        """Whether this was set on an attached model before, with the same bank."""
        return self.one.entry.standing and self.bank is other.bank

    def forget(self) -> None:
        """Take everything away, and say so if it edited."""
        if self.one.plan.programs:
            names = ", ".join(dict.fromkeys(repr(edit.name) for edit in self.one.plan.edits))
            warnings.warn(
                f"an earlier session that edits {names} was not left; its edits are removed now. Keep what sl.attach returns "
                "and call set() on it again, or call sl.detach(model) first",
                Outlived,
                stacklevel=4,
            )
        self.leave()
        while self.is_lost and self.held:
            self.held.pop()()

    def _together(self) -> list[Present]:
        """Who else acts where this code runs."""
        return [one for kin in self.place.kin for one in kin.present if one.stay is not self and is_inside(one.entry)]

    def _refuse(self, plan: Plan) -> None:
        """One concept may be given one value only, and a compiled model be steered in one context."""
        together = [one for one in self._together() if one.plan is not None]
        others = [o for kin in self.place.kin for o in kin.present if o.stay not in (None, self) and not o.is_idle]
        sites = [site for one in (plan, *(other.plan for other in others)) for site in one.sites]
        if any(other not in together for other in others) and any(
            is_compiled(modules_on(self.host.model, site.module)) for site in sites
        ):
            raise ModelBusy("another session steers this compiled model; take turns, or load a second copy")
        fixed = {edit.key for one in together for edit in one.plan.edits if edit.is_sole}
        if twice := next((edit for edit in plan.edits if edit.is_sole and edit.key in fixed), None):
            raise ConflictingEdits(f"{twice.name!r} is set by an outer steer() already; set it once")
        mine = self._targets(self.host, plan)
        for one in together:
            if one.stay.place is not self.place:
                theirs = one.stay._targets(one.stay.host, one.plan)
                if both := next((m for m in mine if m in theirs and (mine[m] or theirs[m])), None):
                    raise ConflictingEdits(
                        f"{mine[both] or theirs[both]!r} is given a value at a module that two pipelines or names of one model "
                        "share and both edit; steer both through one of them"
                    )

    @staticmethod
    def _targets(host: Host, plan: Plan) -> dict[Any, str]:
        """Modules at which a plan edits, each with a concept that it gives a value there, or ""."""
        return {
            modules_on(host.model, site.module)[-1]: next((e.name for e in plan.programs[site.name].edits if e.is_target), "")
            for site in plan.sites
        }

    def _run(self, site: str, plan: Plan) -> Run:
        """A run at a site; one that edits the same concepts as before goes on counting."""
        run, known = Run(plan.programs[site]), self.runs.get(site)
        if known is not None and [e.key for e in known.program.edits] == [e.key for e in run.program.edits]:
            run.tally = known.counts
        return run

    def _swap(self, plan: Plan, runs: dict[str, Run]) -> None:
        self._unfollow()
        self._unfollow, entry = nothing, self.one.entry
        self.one.plan, self.runs = plan, runs
        own(self.one, [(self.place.sockets[name], Owner("edit", run, entry)) for name, run in runs.items()])
        if plan.pins:
            self._unfollow = follow(self.host, self._is_acting)
        rewire(self.place)
        if is_inside(entry):
            for socket, _ in self.one.owners:
                socket.edit.find()  # type: ignore[union-attr]  # where targets cannot all be met, it says so now

    def _is_acting(self) -> bool:
        alive = [one.entry for kin in self.place.kin for one in kin.present if not one.is_idle]
        return self.one.entry in acting(alive, is_shared=is_shared(self.place))


def nothing() -> None:
    """What undoes nothing."""
