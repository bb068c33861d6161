"""Change what a generation model is thinking of, while it runs."""

from .bank import ConceptBank as ConceptBank
from .concepts import Concept as Concept
from .concepts import Gate as Gate
from .concepts import Part as Part
from .encoders import Directions as Directions
from .encoders import Encoder as Encoder
from .graph import CausalGraph as CausalGraph
from .graph import Edge as Edge
from .hosts import Host as Host
from .hosts import load as load
from .hub import list_banks as list_banks
from .interventions import Ablate as Ablate
from .interventions import Add as Add
from .interventions import Clamp as Clamp
from .interventions import Intervention as Intervention
from .interventions import Patch as Patch
from .interventions import Scale as Scale
from .interventions import Set as Set
from .manifest import BaseModel as BaseModel
from .masks import Word as Word
from .readers import read_bank as read_bank
from .recording import record as record
from .schedules import PerStep as PerStep
from .schedules import Ramp as Ramp
from .schedules import Schedule as Schedule
from .schedules import Steps as Steps
from .schedules import StepState as StepState
from .schedules import Window as Window
from .sites import Site as Site
from .steering import Steering as Steering
from .steering import attach as attach
from .steering import steer as steer
from .training.pipeline import train as train
from .training.recipe import Recipe as Recipe

__all__ = [
    "Ablate", "Add", "BaseModel", "CausalGraph", "Clamp", "Concept", "ConceptBank", "Directions", "Edge", "Encoder",
    "Gate", "Host", "Intervention", "Part", "Patch", "PerStep", "Ramp", "Recipe", "Scale", "Schedule", "Set", "Site",
    "Steering", "StepState", "Steps", "Window", "Word", "attach", "list_banks", "load", "read_bank", "record", "steer", "train",
]  # fmt: skip
