"""What a compiled model runs at a site: edits as tensors of fixed size that are changed in place, so nothing recompiles."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from math import inf
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..bank import ConceptBank
from ..devices import unrounded
from ..errors import Unanswerable
from ..hooks.attach import LOCK, attachment
from ..hosts import Host
from ..passes import StepState
from ..schedules import gain
from .edit import Edit, EditTensors, Given
from .shares import Section, When

EDITS, ROWS = 8, 64
"""Edits, and rows, for which a compiled site has room at least."""


@dataclass(eq=False)
class Openings:
    """When and where `K` edits act, as tensors."""

    schedule: Float[Tensor, "K 5"]
    paced: Float[Tensor, " K"]
    """1 where progress opens the schedule, 0 where steps do."""
    span: Float[Tensor, "K 2"]
    """Positions from and up to which an edit acts."""
    sections: Float[Tensor, "K 2"]
    """Whether it acts in the prompt and on new tokens."""

    @classmethod
    def of(cls, edits: Sequence[Edit]) -> "Openings":
        """Those of some edits, on the CPU."""
        schedules = [next((s.schedule.numbers() for s in e.shares if isinstance(s, When)), ALWAYS) for e in edits]
        parts = [next((s.numbers() for s in e.shares if isinstance(s, Section)), Section("all").numbers()) for e in edits]
        spans, sections = zip(*parts, strict=True)
        paced = [any(share.clock == "progress" for share in edit.shares) for edit in edits]
        return cls(*(torch.tensor(values, dtype=torch.float32) for values in (schedules, paced, spans, sections)))

    def gains(self, x: Float[Tensor, "B N D"], now: StepState) -> Float[Tensor, "B N K"]:
        """The share of each edit at each token."""
        positions, steps = now.positions[..., None], now.steps[..., None]
        inside = (positions >= self.span[:, 0]) & (positions < self.span[:, 1])
        section = torch.where(steps > 0, self.sections[:, 1], self.sections[:, 0])
        moment = steps if now.progress is None else torch.where(self.paced > 0, now.progress, steps)
        g = gain(moment, self.schedule) * section * inside
        return (g if now.real is None else g * now.real[..., None]).expand(*x.shape[:2], -1)


ALWAYS = (0.0, inf, 1.0, 1.0, 0.0)
"""The numbers of a schedule that never closes."""


class CompiledEdit:
    """The edits of one site in tensors with room for `edits` of them and `rows` amounts."""

    def __init__(self, edits: int, rows: int, width: int, device: torch.device):
        new = torch.zeros(0, device=device).new_full
        self.tensors = EditTensors(
            read=new((edits, width), 0),
            bias=new((edits,), 0),
            write=new((edits, width), 0),
            threshold=new((edits,), -inf),
            same=torch.eye(edits, device=device),
            scale=new((rows, edits), 1),
            shift=new((rows, edits), 0),
            low=new((rows, edits), -inf),
            high=new((rows, edits), inf),
            target=new((edits,), 0),
            takes=new((edits,), 0),
            cap=new((), inf),
        )
        always, anywhere = (torch.tensor(values, device=device).repeat(edits, 1) for values in (ALWAYS, (0.0, inf)))
        self.openings = Openings(always, new((edits,), 0), anywhere, new((edits, 2), 1))
        self.prompts = new((), 1)
        """`R` of the contents, which may be less than there is room for."""
        self.hits = torch.zeros((), dtype=torch.long, device=device)
        """Passes through the site."""
        self.seen, self.acts, self.tokens = self.hits.clone(), new((edits,), 0), new((edits,), 0)
        """Positions that went by; passes, and positions per row, at which each edit acted."""
        self.runs: list[tuple[Any, slice]] = []
        """Whose edits these are, and which."""
        self._empty = [tensor.clone() for tensor in self._all(self.tensors, self.openings)]

    def __call__(self, x: Tensor, now: StepState) -> Tensor:
        """The steered x."""
        gains = self.openings.gains(x.float(), now)
        self.hits.add_(1)
        self.seen.add_(x.shape[1])
        self.acts.add_((gains > 0).flatten(0, 1).any(0))
        self.tokens.add_((gains > 0).sum((0, 1)) / len(x))
        row = now.row(self.prompts.long(), len(x)).to(x.device)
        with unrounded(x):
            change = self.tensors.change(x, Given(gains=gains, row=row))
        return x + change.delta.to(x.dtype)

    def fill(self, edits: Sequence[Edit], cap: float) -> None:
        """Replace the contents in place, leaving shapes, and so compiled code, as they are."""
        contents = self._all(EditTensors.of(edits, cap), Openings.of(edits)) if edits else []
        rows = len(contents[ROWED]) if edits else 1
        if len(edits) > len(self.tensors.read) or rows > len(self.tensors.scale):
            raise Unanswerable(
                f"a compiled model has room for {len(self.tensors.read)} edits and {len(self.tensors.scale)} rows at a site, "
                f"got {len(edits)} and {rows}; edit fewer at once, or do not compile"
            )
        mine = self._all(self.tensors, self.openings)
        for tensor, empty in zip(mine, self._empty, strict=True):
            tensor.copy_(empty)
        for tensor, values in zip(mine, contents, strict=False):
            tensor[tuple(slice(size) for size in values.shape)] = values.to(tensor.device)
        self.prompts.fill_(rows)

    def tell(self) -> None:
        """Tell the runs what was counted since the last time; the device is waited for."""
        hits, seen, acts, tokens = int(self.hits), int(self.seen), self.acts.cpu(), self.tokens.cpu()
        for run, mine in self.runs if hits else ():
            tally = run.tally
            tally.passes, tally.seen = tally.passes + hits, tally.seen + seen
            tally.acted, tally.tokens = tally.acted + acts[mine], tally.tokens + tokens[mine]
        for counter in (self.hits, self.seen, self.acts, self.tokens) if hits else ():
            counter.zero_()

    @staticmethod
    def _all(*parts: EditTensors | Openings) -> list[Tensor]:
        return [getattr(part, f.name) for part in parts for f in fields(part)]


def stand(host: Host, bank: ConceptBank) -> Callable[[], None]:
    """Put permanent sockets at every site of a bank, with tensors that compiled code reads; gives back what removes them."""
    sites = tuple(host.site(name) for name in bank.sites)
    room = Counter(bank.site_of(place) for concept in bank.concepts.values() for place in concept.places)
    with LOCK, torch.inference_mode(False):  # their tensors are changed in place later, in whatever mode
        attached = attachment(host)
        attached.require(host, sites)
        for site in sites:
            if (socket := attached.sockets[site.name]).traced is None:
                inside = host.model.get_submodule(site.module).parameters()
                device = next(inside, next(host.model.parameters(), torch.zeros(()))).device
                socket.traced = CompiledEdit(max(EDITS, room[site.name]), ROWS, bank.sites[site.name].width, device)

    def remove() -> None:
        with LOCK:
            for site in sites:
                if (socket := attached.sockets.get(site.name)) is not None and attached.uses(site) == 1:
                    socket.traced = None
            attached.release(host, sites)

    return remove


ROWED = [f.name for f in fields(EditTensors)].index("scale")


def why_not(edit: Edit, *, blind: bool) -> str:
    """Why compiled code cannot do an edit, by the parts that it is made of; empty if it can.

    `blind`: whether the module that tells the time is compiled itself, where steps cannot be counted.
    """
    shares = [share for share in edit.shares if not share.is_traceable]
    if shares or not edit.aim.is_traceable or edit.aim.keeps_norm:
        return (
            f"{edit.name!r}: gates, parts of the text in tokens=, PerStep, when= at several levels, match_norm, keep_norm, "
            "masks, branches, patches, swaps, Do, Ablate(exact=True) of latents, do='hold' and 'graph' need Python at every "
            "pass, which a compiled model leaves out; use them on one that is not compiled"
        )
    if edit.now is not None:
        return (
            f"{edit.name!r} requires gradients: its values may change between passes, and a compiled model keeps them; train "
            "it on one that is not compiled, and steer with vector.detach()"
        )
    if blind and any(share.clock == "steps" for share in edit.shares):
        return (
            f"{edit.name!r}: steps cannot be counted where the whole denoiser is compiled; use a Window, or "
            "compile_repeated_blocks() in place of compile()"
        )
    if not edit.is_constant and not edit.read.is_traceable:
        return (
            f"{edit.name!r}: latents that compete, that are read at an earlier site or from normalised tokens need Python at "
            "every pass, which a compiled model leaves out; a TopK latent can do with exact=False"
        )
    return ""
