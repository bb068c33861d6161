"""Change what a generation model is thinking of, while it runs.

    import steerlib as sl

    bank = sl.ConceptBank.from_pretrained("smollm2-135m-instruct")
    with sl.steer(model, bank, {"science": 2.1}):
        model.generate(**inputs)

Nothing is loaded before it is used, neither torch nor a part of steerlib: `sl.steer` loads what steering needs, `sl.train`
what training needs. `HOMES` says in which module each public name lives.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import contexts as contexts  # now, so that every task and thread that is started later carries its own sessions

if TYPE_CHECKING:  # what HOMES says, for type checkers and editors
    from .bank.concept_bank import ConceptBank
    from .bank.concepts import Concept, Gate, Part
    from .bank.hub import list_banks
    from .bank.manifest import BaseModel
    from .encoders import Directions, Encoder
    from .evaluation.clip import ClipScore
    from .evaluation.judges import Endpoint
    from .graph.causal_graph import CausalGraph, Edge
    from .hosts import Host, load
    from .passes import StepState
    from .readers import read_bank
    from .schedules import PerStep, Ramp, Schedule, Steps, Window
    from .sites import Site
    from .steering.interventions import Ablate, Add, Clamp, Intervention, Patch, Scale, Set
    from .steering.masks import Word
    from .steering.presets import Preset
    from .steering.recording import record
    from .steering.session import Steering, attach, detach, share, steer
    from .steering.swapping import Swap
    from .steering.switching import Do
    from .training.calibrate.calibration import calibrate
    from .training.calibrate.sweeping import sweep
    from .training.contrast import Contrast, directions
    from .training.linting import lint
    from .training.named import make
    from .training.package.word_bank import words
    from .training.pipeline import train
    from .training.recipe import Recipe

    __version__: str

__all__ = [
    "Ablate", "Add", "BaseModel", "CausalGraph", "Clamp", "ClipScore", "Concept", "ConceptBank", "Contrast", "Directions",
    "Do", "Edge", "Encoder", "Endpoint", "Gate", "Host", "Intervention", "Part", "Patch", "PerStep", "Preset", "Ramp",
    "Recipe", "Scale", "Schedule", "Set", "Site", "Steering", "StepState", "Steps", "Swap", "Window", "Word", "attach",
    "calibrate", "detach", "directions", "lint", "list_banks", "load", "make", "read_bank", "record", "share", "steer",
    "sweep", "train", "words",
]  # fmt: skip

HOMES = {
    "bank.concept_bank": ("ConceptBank",),
    "bank.concepts": ("Concept", "Gate", "Part"),
    "bank.hub": ("list_banks",),
    "bank.manifest": ("BaseModel",),
    "encoders": ("Directions", "Encoder"),
    "evaluation.clip": ("ClipScore",),
    "evaluation.judges": ("Endpoint",),
    "graph.causal_graph": ("CausalGraph", "Edge"),
    "hosts": ("Host", "load"),
    "passes": ("StepState",),
    "readers": ("read_bank",),
    "schedules": ("PerStep", "Ramp", "Schedule", "Steps", "Window"),
    "sites": ("Site",),
    "steering.interventions": ("Ablate", "Add", "Clamp", "Intervention", "Patch", "Scale", "Set"),
    "steering.masks": ("Word",),
    "steering.presets": ("Preset",),
    "steering.recording": ("record",),
    "steering.session": ("Steering", "attach", "detach", "share", "steer"),
    "steering.swapping": ("Swap",),
    "steering.switching": ("Do",),
    "training.calibrate.calibration": ("calibrate",),
    "training.calibrate.sweeping": ("sweep",),
    "training.contrast": ("Contrast", "directions"),
    "training.linting": ("lint",),
    "training.named": ("make",),
    "training.package.word_bank": ("words",),
    "training.pipeline": ("train",),
    "training.recipe": ("Recipe",),
}
"""Public names by the module that defines them."""


def __getattr__(name: str) -> Any:
    """Load the module of a public name when the name is first used."""
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("steerlib")
        except PackageNotFoundError:
            return "unknown (steerlib is not installed)"
    home = next((home for home, names in HOMES.items() if name in names), None)
    if home is None and name != "errors":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f".{home or name}", __name__)
    globals()[name] = value = getattr(module, name) if home else module
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__", "errors"} - {"HOMES", "TYPE_CHECKING", "Any", "import_module"})
