"""Who tells what a concept reads: its own row, the whole code it competes in, or a note from an earlier site."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..bank import ConceptBank
from ..bank.concepts import Concept, Place
from ..encoders import Encoder, Rows
from ..errors import BadEdit, Unanswerable
from ..passes import StepState

Key = Hashable
"""What notes between sites are filed under: one concept of one bank, a gate, a site."""


class Reader(ABC):
    """Tells the reading `z[B, N]` of one concept, raw and float32, from `x[B, N, D]`."""

    is_traceable: bool = False
    """Whether compiled code can read so."""
    is_own: bool = False
    """Whether the concept's own row says it, in one product with those of other edits."""
    code: Encoder | None = None
    """The encoder whose whole code is made to read it; edits that share it share the code."""

    @abstractmethod
    def __call__(self, x: Float[Tensor, "B N D"], now: StepState) -> Float[Tensor, "B N"]:
        """z of the activations."""


@dataclass(frozen=True, eq=False)
class RowReader(Reader):
    """By the concept's own row of its encoder."""

    rows: Rows
    now: Callable[[], Rows] | None = None
    """Tells the row of a concept that learns."""
    is_own: bool = True

    def __call__(self, x: Float[Tensor, "B N D"], now: StepState) -> Float[Tensor, "B N"]:  # noqa: ARG002
        return (self.rows if self.now is None else self.now()).reading(x)[..., 0]

    @property
    def is_traceable(self) -> bool:  # type: ignore[override]
        return not self.rows.norm


@dataclass(frozen=True, eq=False)
class CodeReader(Reader):
    """By all latents of its encoder, with which it competes."""

    encoder: Encoder
    index: int

    @property
    def code(self) -> Encoder:  # type: ignore[override]
        return self.encoder

    def __call__(self, x: Float[Tensor, "B N D"], now: StepState) -> Float[Tensor, "B N"]:  # noqa: ARG002
        return self.encoder.readings(x, [self.index])[..., 0]


@dataclass(frozen=True, eq=False)
class NoteReader(Reader):
    """By a note from the earlier site at which the concept is read."""

    key: Key
    name: str

    def __call__(self, x: Float[Tensor, "B N D"], now: StepState) -> Float[Tensor, "B N"]:
        if self.key not in now.notes:
            raise Unanswerable(f"{self.name!r} is read at an earlier site, which this pass did not go through")
        return laid(now.notes[self.key].to(x.device), x, repr(self.name), "its edit")


@dataclass(frozen=True, eq=False)
class PromptReader:
    """By another reader, over each row's prompt: the mean of what it reads there, but for the first token, once for a text."""

    each: Reader
    key: Key
    name: str
    """Of the concept."""

    def __call__(self, x: Float[Tensor, "B N D"], now: StepState) -> Float[Tensor, "B 1"] | None:
        """The mean; None where no pass saw the whole prompt."""
        if (mean := now.memory.get(self.key)) is None and not now.lacks_prompt:
            mean = now.memory[self.key] = self._mean(x, now)
        if mean is not None and len(mean) != len(x):
            raise Unanswerable(
                f"the gate over the prompt on {self.name!r} was decided for {len(mean)} rows, and this pass has {len(x)}"
            )
        return None if mean is None else mean.to(x.device)

    def _mean(self, x: Float[Tensor, "B N D"], now: StepState) -> Float[Tensor, "B 1"]:
        counted = (now.steps == 0).expand(x.shape[:2])
        counted = counted if now.real is None else counted & now.real
        later = counted & (now.positions > 0)
        counted = torch.where(later.any(1, keepdim=True), later, counted).float()  # a prompt may be one token
        return (self.each(x, now) * counted).sum(1, keepdim=True) / counted.sum(1, keepdim=True)


class Note(NamedTuple):
    """What a site leaves for edits there and at later sites: a reading in units, or whole activations."""

    key: Key
    read: Reader | PromptReader | None
    """None: the activations."""
    unit: float = 1.0

    def of(self, x: Float[Tensor, "B N D"], now: StepState) -> Tensor | None:
        """Its value in this pass; None where it is not known."""
        value = x if self.read is None else self.read(x, now)
        return value if value is None or self.read is None else value / self.unit


def laid(z: Float[Tensor, "B M"], x: Float[Tensor, "B N D"], read: str, moved: str) -> Float[Tensor, "B M"]:
    """A reading of an earlier site as one of each token here; raises `Unanswerable` where the sites have other tokens."""
    if z.shape[1] not in (1, x.shape[1]):
        raise Unanswerable(
            f"{read} is read on {z.shape[1]} tokens and {moved} acts on {x.shape[1]}, so nothing says which token goes with "
            "which; use concepts of sites of the same resolution"
        )
    return z


def reader(bank: ConceptBank, place: Place | Concept, name: str, *, exact: bool = True) -> Reader:
    """The reader of a coordinate of the concept `name`, at the site where it is read.

    With `exact=False` a latent that competes is read by its calibrated threshold. Raises `BadEdit` where the bank has none.
    """
    if not bank.competes(place):
        return _row_reader(bank, place)
    if exact:
        return CodeReader(bank.encoder(place.encoder), place.index)
    if "threshold" not in bank.encoders[place.encoder].settings:
        raise BadEdit(
            f"{name!r} is one of the largest latents of a token or silent, and bank {bank.name!r} has no threshold by "
            "which to tell without the others; leave out exact=False, or calibrate the encoder"
        )
    return _row_reader(bank, place)


def _row_reader(bank: ConceptBank, place: Place | Concept) -> Reader:
    return RowReader(bank.rows(place).detached(), partial(bank.rows, place) if bank.learns(place) else None)
