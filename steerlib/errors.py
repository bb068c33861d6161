"""Every error steerlib raises on purpose.

SteerlibError
├── UnknownName (KeyError)           UnknownConcept, UnknownSite
├── UnsupportedTarget (TypeError)
├── BadEdit (ValueError)             ConflictingEdits, RowMismatch, Unanswerable
├── BadBank (ValueError)             WrongModel, WrongWidth, UnknownFormat, UnknownBank, NoAccess, NotReached
│   └── CorruptBank                  WrongSignature
├── BadRecipe (ValueError)
├── SiteNotReached, CompiledModel, ModelBusy, NoSession, NoScore (RuntimeError)
└── MissingExtra (ImportError)
SteeringWarning (UserWarning)        OutOfRange, OtherWeights, Outlived, Unmeasured
"""

from collections.abc import Iterable
from difflib import get_close_matches

# fmt: off

class SteerlibError(Exception):
    """Anything steerlib refuses to do."""

class UnknownName(SteerlibError, KeyError):
    """No concept or site has this name; the message offers the nearest ones."""

    def __str__(self) -> str:  # KeyError would show the repr
        return str(self.args[0])

class UnknownConcept(UnknownName):
    """No such concept in the bank."""

class UnknownSite(UnknownName):
    """No such site in the model."""

class UnsupportedTarget(SteerlibError, TypeError):
    """Not a model or pipeline that can be steered."""

class BadEdit(SteerlibError, ValueError):
    """An edit that cannot be carried out as asked."""

class ConflictingEdits(BadEdit):
    """One concept is given two values."""

class RowMismatch(BadEdit):
    """Amounts for other rows than the batch has."""

class Unanswerable(BadEdit):
    """This model or pipeline lacks what a schedule, a gate or a mode needs."""

class BadBank(SteerlibError, ValueError):
    """A bank that cannot be used."""

class WrongModel(BadBank):
    """The bank was made for another architecture."""

class WrongWidth(BadBank):
    """A vector does not fit its site."""

class CorruptBank(BadBank):
    """Missing, truncated or altered file, or values that are not finite."""

class UnknownFormat(BadBank):
    """Written by a newer steerlib, or by a library in a form that nothing here reads."""

class WrongSignature(CorruptBank):
    """Not signed, or by another key."""

class UnknownBank(BadBank):
    """The Hub has no such repository or revision, or it is no bank."""

class NoAccess(BadBank):
    """The Hub has it, and this token does not open it."""

class NotReached(BadBank):
    """Offline or no answer, and not in the cache."""

class BadRecipe(SteerlibError, ValueError):
    """A recipe that cannot be carried out."""

class SiteNotReached(SteerlibError, RuntimeError):
    """The model ran, but a steered site was never reached."""

class CompiledModel(SteerlibError, RuntimeError):
    """torch would silently ignore a hook added now."""

class ModelBusy(SteerlibError, RuntimeError):
    """Another session steers this compiled model."""

class NoSession(SteerlibError, RuntimeError):
    """Several sessions steer this model, and this thread or task has none."""

class NoScore(SteerlibError, RuntimeError):
    """A judge gave no score."""

class MissingExtra(SteerlibError, ImportError):
    """An optional dependency is not installed."""

class SteeringWarning(UserWarning):
    """Something worth knowing that is not an error."""

class OutOfRange(SteeringWarning):
    """An amount beyond what was measured to be safe."""

class OtherWeights(SteeringWarning):
    """Same architecture as the bank's base model, other weights."""

class Unmeasured(SteeringWarning):
    """Something is done, or left out, of which nothing was measured."""

class Outlived(SteeringWarning):
    """A generation goes on after its block, or a session was never left."""

# fmt: on


def nearest(name: str, known: Iterable[str], hidden: Iterable[str] = ()) -> str:
    """The end of an "unknown name" message: near spellings, of `hidden` names too, then a listing of the `known`."""
    names = list(known)
    near = " or ".join(map(repr, get_close_matches(name, [*names, *hidden], n=3, cutoff=0.5)))
    shown = ", ".join(names[:24]) + (f", … ({len(names)} in all)" if len(names) > 24 else "")
    return f"{f'did you mean {near}? ' if near else ''}It has: {shown or 'nothing'}"
