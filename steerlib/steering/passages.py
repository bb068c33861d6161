"""Edits in parts of a text, as a chat template or delimiters tell them apart: an answer, thinking, code."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import BadEdit, Unanswerable
from ..passes import StepState, TextPass
from .dialect import DELIMITERS, ROLES, Dialect, State, dialect
from .shares import Section, Share


@dataclass(eq=False)
class Read:
    """How far a text was read: its tokens, and for each row and column whether a part has it, and what is known then."""

    ids: Int[Tensor, "B T"]
    rows: list[list[tuple[bool, State]]]


@dataclass(frozen=True, eq=False)
class Passage(Share):
    """Parts of a text by name: tokens that any of them has.

    Attributes:
        answers: take new tokens that none of them has, in their place.
        rest: take all tokens but those.
    """

    dialect: Dialect
    names: tuple[str, ...]
    answers: bool = False
    rest: bool = False
    is_constant: bool = True

    def weight(self, x: Float[Tensor, "B N D"], now: StepState) -> "float | Tensor":
        if self.answers and now.section == "prompt":
            return float(self.rest)
        inside = self._inside(x, now)
        if self.answers:
            inside = (1 - inside) * (1.0 if now.section == "generated" else (now.steps > 0).float())
        return 1 - inside if self.rest else inside

    def _inside(self, x: Float[Tensor, "B N D"], now: StepState) -> "float | Tensor":
        """Whether each token lies in one of the parts; one number where all agree, as a new token of one row does."""
        key = "passage", self.dialect, self.names
        if (inside := now.notes.get(key)) is None:
            read = now.memory[key] = self._followed(tokens_of(now), now.memory.get(key))
            table = [[float(touched) for touched, _ in row[-now.length :]] for row in read.rows]
            first, *others = {one for row in table for one in row}
            inside = now.notes[key] = torch.tensor(table).to(x.device, non_blocking=True) if others else first
        return inside

    def _followed(self, ids: Int[Tensor, "B T"], before: Read | None) -> Read:
        """The text read on, from where it is as it was."""
        if before is None or len(before.ids) != len(ids):
            before = Read(ids[:, :0], [[] for _ in ids])
        both = min(ids.shape[1], before.ids.shape[1])
        same = (
            (ids[:, :both] == before.ids[:, :both]).cumprod(1).sum(1).tolist()
        )  # beams change places, and guesses are dropped
        parts = [part for name in self.names for part in self.dialect.parts(name)]
        for row, kept, tokens in zip(before.rows, same, ids, strict=True):
            kept = min(kept, len(row))
            del row[kept:]
            state = row[-1][1] if row else self.dialect.begin(parts)
            for token in tokens[kept:].tolist():
                touched, state = self.dialect.step(parts, state, self.dialect.text(token))
                row.append((touched, state))
        return Read(ids, before.rows)

    def why_closed(self, progress: tuple[float, float] | None, halves: frozenset[str]) -> str:  # noqa: ARG002
        return f"no token lay in its part of the text, {' or '.join(map(repr, self.names))}"


UNKNOWN = (
    "parts of a text such as tokens='answer' need all tokens of the text so far, and {}; use generate(input_ids=...), one text "
    "a row, or a forward over whole texts"
)


def tokens_of(now: StepState) -> Int[Tensor, "B T"]:
    """Tokens of each row from its first column to the end of a pass, on the host, -1 on pads; a device is waited for once.

    Raises `Unanswerable` where they are not known.
    """
    if not isinstance(now, TextPass) or now.refused or now.places is not None:
        raise Unanswerable(now.refused or UNKNOWN.format("several texts lie in one row"))
    end, given = now.start + now.length, now.like
    if given is None or given.ndim != 2 or given.is_floating_point():
        raise Unanswerable(UNKNOWN.format("this pass is given embeddings"))
    whole = given if given.shape[1] == end else None if now.text is None else now.text.ids(now)
    if whole is None:
        raise Unanswerable(UNKNOWN.format("those before this pass are not known, as where a cache was filled earlier"))
    if now.mask is not None:
        real = now.mask[:, :end].bool()
        whole = torch.where(F.pad(real, (0, end - real.shape[1]), value=True), whole, -1)  # it may be that of the prompt alone
    if given.shape[1] == end:
        return whole.cpu()
    ids, last = torch.cat((whole, given), dim=1).cpu().split((end, given.shape[1]), dim=1)
    if ((ids[:, -last.shape[1] :] != last) & (ids[:, -last.shape[1] :] >= 0)).any():
        raise Unanswerable(UNKNOWN.format("those that generate() keeps are not those of this pass"))
    return ids


def passage(word: str, tokenizer: Any, name: str) -> Share:
    """The share that a word for a part of a text means in an edit of the concept `name`.

    Raises `BadEdit` where no tokenizer is given, and where it does not tell the part.
    """
    part, rest = word.removeprefix("not-"), word.startswith("not-")
    if tokenizer is None:
        raise BadEdit(
            f"{name!r}: tokens={word!r} is told by the text, which only the tokenizer can write; give it: "
            "sl.steer(model, bank, edits, tokenizer=tokenizer)"
        )
    own = dialect(getattr(tokenizer, "tokenizer", tokenizer))  # a processor has one
    if part == "answer":
        known = tuple(other for other in DELIMITERS if own.parts(other))
        return Passage(own, known, answers=True, rest=rest) if known else Section("prompt" if rest else "generated")
    if not own.parts(part):
        shown = "chat template" if part in ROLES else "tokens or its chat template"
        raise BadEdit(
            f"{name!r}: tokens={word!r} cannot be told: this tokenizer's {shown} delimits no {part}; name what does, as "
            "tokens='<begin>...<end>'"
        )
    return Passage(own, (part,), rest=rest)
