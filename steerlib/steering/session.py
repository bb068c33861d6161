"""`steer`, `attach`, `share` and `detach`: the live session between a bank and a model."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from types import TracebackType
from typing import Any, Literal

from ..bank import ConceptBank
from ..bank.editing import together
from ..bank.matching import Match
from ..errors import BadEdit, UnknownConcept
from ..hooks.attach import LOCK, related
from ..hosts import host_for
from ..passes import Branch
from .compiled import stand
from .dispatch import SHARED, rewire
from .ending import has_run, said_of
from .plan import Do, Edits, Options, Plan, plan_for
from .presets import Preset
from .program import Run
from .report import Report, line
from .stay import Stay

Banks = ConceptBank | Sequence[ConceptBank]


class Steering:
    """A live session: what is attached, what is edited, what happened. `sl.steer` and `sl.attach` make one.

    A context manager: edits act inside its `with` block, in the context (`contextvars`) that it was entered in: in this task,
    in threads that are given the context, and, if no other session is alive, in threads that are started there. Entered in a
    generator, it acts in what the generator runs. Printing it shows the report.

    Attributes:
        bank: the bank whose concepts it edits; one of all concepts, where several were given.
        host: the model, as steerlib sees it.
        plan: what is done.

    >>> with sl.steer(model, bank, {"a": 2.0}) as session:
    ...     _ = model(torch.ones(1, 4, dtype=torch.long))
    >>> [(line.concept, line.site, line.tokens) for line in session.report().lines]
    [('a', 'layers.0', 4)]
    """

    def __init__(self, target: object, bank: Banks, edits: Edits, options: Options):
        self.host, self.options = host_for(target), options
        given: Any = bank
        self.bank: ConceptBank = together(given) if isinstance(given, list | tuple) else given
        self.plan: Plan = plan_for(self.bank, self.host, edits, options)
        self.held: list[Callable[[], None]] = []
        """What takes away that it is attached."""
        self._stay: Stay | None = None
        self._ran = False

    def attach(self) -> "Steering":
        """Put permanent sockets at every site of the bank, so that the model can be compiled afterwards."""
        if not self.held:
            self.held.append(stand(self.host, self.bank))
        return self

    def set(self, edits: Edits, **options: Any) -> "Steering":
        """Edit these concepts from now on, in place of those before.

        Args:
            edits: as for `sl.steer`.
            options: `branch`, `do`, `hold`, `free`, `allow_ood`, `exact`, `tokenizer`, `match` of `sl.steer`; others stay.

        Returns this session. Raises what `sl.steer` raises, and then edits what it edited before.

        >>> steering = sl.attach(model, bank)
        >>> steering.set({"a": 2.0}).clear().detach()
        """
        chosen = self.options._replace(**{n: tuple(v) if n in ("hold", "free") else v for n, v in options.items()})
        plan = plan_for(self.bank, self.host, edits, chosen)
        if self._stay is not None and self._stay.is_here:
            self._stay.put(plan)
        else:
            self._stay, self._ran = Stay(self, plan, standing=True), False
        self.plan, self.options = plan, chosen
        notify(plan, 3)
        return self

    def clear(self) -> "Steering":
        """Edit nothing, and stay attached."""
        return self.set({})

    def detach(self) -> None:
        """Leave the model as it was: no hook, attribute or tensor of steerlib stays."""
        if self._stay is not None:
            self._ran = has_run(self._stay)
            self._stay.leave()
        while self.held:
            self.held.pop()()

    def __enter__(self) -> "Steering":
        if self._stay is None or not self._stay.is_here:
            self._stay, self._ran = Stay(self, self.plan, standing=False), False
        self._stay.one.entry.standing = False
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        stay = self._stay
        said = [*said_of(stay)] if stay is not None and stay.is_here and kind is None else ()
        self.detach()
        for what in said:
            if not isinstance(what, Warning):
                raise what
            warnings.warn(what, stacklevel=2)

    @property
    def runs(self) -> Mapping[str, Run]:
        """How far the plan was carried out, by site."""
        return self._stay.runs if self._stay is not None else {}

    def report(self) -> Report:
        """What was edited where, how much, and how far off the natural range; and why nothing happened, if so."""
        lines = []
        for name, run in self.runs.items():
            edits = run.program.edits
            lines += [line(edit, k, name, self.bank.norm_of(edit.place), run.counts) for k, edit in enumerate(edits)]
        ran = self._stay is not None and (self._ran or has_run(self._stay))
        unknown = islice(_unmeasured(self.bank, dict.fromkeys(one.concept for one in lines)), 3)
        return Report(tuple(lines), ran, (*self.plan.cautions, *unknown))

    def __repr__(self) -> str:
        return str(self.report())

    def _repr_html_(self) -> str:
        return self.report()._repr_html_()


def _unmeasured(bank: ConceptBank, names: Iterable[str]) -> Iterator[str]:
    """What is not known of the amounts of concepts; nothing of combinations."""
    for name in names:
        with suppress(UnknownConcept):
            if said := bank[name].unmeasured:
                yield f"{name}: {said}"


def notify(plan: Plan, stacklevel: int) -> None:
    """Give the plan's warnings, at the line of whoever is `stacklevel` calls above."""
    for text, kind in plan.notices:
        warnings.warn(text, kind, stacklevel=stacklevel)


def steer(
    target: object, bank: Banks | Preset, edits: Edits | None = None, *, branch: Literal["both"] | Branch = "both",
    do: Do = "model", hold: Sequence[str] = (), free: Sequence[str] = (), allow_ood: bool = False, exact: bool = True,
    tokenizer: Any = None, match: Match = "model",
) -> Steering:  # fmt: skip
    """Change concepts of a model inside a `with` block.

    Args:
        target: a transformers or PEFT model, a diffusers pipeline, or any `torch.nn.Module`. Compiled ones: `sl.attach` first.
        bank: whose concepts are edited. Or a list of banks: edits, gates and `hold` name concepts of all; a name that two of
            them have is `bank/name`, after the bank's. Or an `sl.Preset`, which says edits and options too.
        edits: name, `encoder/index` or a combination such as `bank["a"] - bank["b"]` -> an addition in units of the concept,
            one for each prompt, or an intervention.
        branch: the half of guidance that is edited: "both", "cond" (with the prompt) or "uncond".
        do: "model": the network carries an edit on. "hold": each pass runs unsteered too, and descendants in the bank's graph
            are pinned to their values there; edits are skipped on tokens where a stored gate of a pinned concept is open
            that they do not share. "graph": the graph's forecast is added at later sites. "spare": amounts of concepts
            that answers would show more of, too, are added, so that by the graph's edges to answers these stay as they are.
        hold, free: with `do="hold"`, other concepts to pin, and descendants that are not pinned.
        allow_ood: allow changes of any length and values outside the natural range ("out of distribution"): no caps.
        exact: read latents that compete (TopK) beside all others; False: by the bank's threshold, as cheap as a direction.
        tokenizer: the model's, for edits of parts of the text, as with `tokens="answer"`. Each pass then waits for the device
            once, to read the tokens so far.
        match: "model": the model must have the architecture the bank was made for (a vocabulary of another size is said).
            "sites": sites must agree by name and width, as on an inpainting kin (`bank.fits(model)`).

    Returns a `Steering`; its `report()` says what happened. Raises before the model is touched: `UnknownConcept`,
    `UnknownSite`, `UnsupportedTarget`, `BadEdit`, `BadBank`, `CompiledModel`. From the run: `RowMismatch` where amounts are
    not one for each prompt; at the end of the block: `SiteNotReached` where the model never went through an edited site.

    >>> with sl.steer(model, bank, {"a": 2.0, "b": sl.Ablate()}) as session:
    ...     _ = model(torch.ones(1, 4, dtype=torch.long))
    """
    options = Options(branch, do, tuple(hold), tuple(free), allow_ood, exact, tokenizer, match)
    session = Steering(target, *_said(bank, edits, options))
    notify(session.plan, 3)
    return session


def _said(bank: Any, edits: Any, options: Options) -> tuple[Any, Any, Options]:
    """Bank, edits and options, as a preset says them where one was given."""
    if not isinstance(bank, Preset):
        if edits is None:
            raise BadEdit("expected edits as a mapping from concept names, got none; a preset says them itself")
        return bank, edits, options
    if edits is not None or options != Options(tokenizer=options.tokenizer):
        raise BadEdit("a preset says edits and options itself; make another one: sl.Preset({...}, preset.banks, ...)")
    return bank.bank, bank.edits, Options(**bank.options, tokenizer=options.tokenizer)


def attach(
    target: object, bank: Banks, *, allow_ood: bool = False, exact: bool = True, tokenizer: Any = None, match: Match = "model"
) -> Steering:  # fmt: skip
    """Put sockets at every site of a bank that stay until `detach()`. Do this before compiling; edit with `set`.

    Args:
        target, bank, allow_ood, exact, tokenizer, match: as for `sl.steer`.

    Returns a `Steering` that edits nothing yet. Raises `CompiledModel` where torch has compiled the model already, since it
    ignores hooks that are added later, and what `sl.steer` raises about bank and model.

    >>> steering = sl.attach(model, bank)
    >>> steering.set({"a": 2.0}).detach()
    """
    options = Options(allow_ood=allow_ood, exact=exact, tokenizer=tokenizer, match=match)
    session = Steering(target, bank, {}, options)
    notify(session.plan, 3)
    return session.attach()


def share(target: object) -> None:
    """Declare that a model serves several requests at once: from now on a pass without a session is plain.

    Without it, a thread that carries no context is served by the session that is alive, as transformers' streamers need, and
    refused with `NoSession` while there are several.

    Args:
        target: what `sl.steer` takes.

    >>> sl.share(model)
    """
    host = host_for(target)
    with LOCK:
        SHARED.update({host.model, *host.model.children()})
        for place in related(host.model):
            rewire(place)


def detach(target: object) -> None:
    """Remove every session, hook and attribute of steerlib from a model, whoever lost them. Harmless where there are none.

    Args:
        target: what `sl.steer` takes, or the wrapper of `torch.compile` around it.

    >>> steering = sl.attach(model, bank).set({"a": 2.0})
    >>> sl.detach(model)
    """
    with LOCK:
        for place in related(host_for(getattr(target, "_orig_mod", target)).model):
            for one in [*place.present]:
                one.entry.close()
            place.clear()
            for kin in [*place.kin]:
                rewire(kin)
