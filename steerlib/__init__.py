"""Change what a generation model is thinking of, while it runs."""

from .bank.concept_bank import ConceptBank as ConceptBank
from .bank.concepts import Concept as Concept
from .bank.concepts import Gate as Gate
from .bank.concepts import Part as Part
from .bank.hub import list_banks as list_banks
from .bank.manifest import BaseModel as BaseModel
from .encoders import Directions as Directions
from .encoders import Encoder as Encoder
from .graph.causal_graph import CausalGraph as CausalGraph
from .graph.causal_graph import Edge as Edge
from .hosts import Host as Host
from .hosts import load as load
from .passes import StepState as StepState
from .readers import read_bank as read_bank
from .schedules import PerStep as PerStep
from .schedules import Ramp as Ramp
from .schedules import Schedule as Schedule
from .schedules import Steps as Steps
from .schedules import Window as Window
from .sites import Site as Site
from .steering.interventions import Ablate as Ablate
from .steering.interventions import Add as Add
from .steering.interventions import Clamp as Clamp
from .steering.interventions import Intervention as Intervention
from .steering.interventions import Patch as Patch
from .steering.interventions import Scale as Scale
from .steering.interventions import Set as Set
from .steering.masks import Word as Word
from .steering.recording import record as record
from .steering.session import Steering as Steering
from .steering.session import attach as attach
from .steering.session import steer as steer
from .training.pipeline import train as train
from .training.recipe import Recipe as Recipe

__all__ = [
    "Ablate", "Add", "BaseModel", "CausalGraph", "Clamp", "Concept", "ConceptBank", "Directions", "Edge", "Encoder",
    "Gate", "Host", "Intervention", "Part", "Patch", "PerStep", "Ramp", "Recipe", "Scale", "Schedule", "Set", "Site",
    "Steering", "StepState", "Steps", "Window", "Word", "attach", "list_banks", "load", "read_bank", "record", "steer", "train",
]  # fmt: skip
