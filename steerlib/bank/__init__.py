"""A bank: concepts, the encoders they are coordinates of, the graph that joins them, and the files they are kept in."""

from .concept_bank import ConceptBank as ConceptBank
from .concepts import Concept as Concept
from .concepts import Effects as Effects
from .concepts import Gate as Gate
from .concepts import Part as Part
from .concepts import Place as Place
from .manifest import BaseModel as BaseModel
from .manifest import EncoderFacts as EncoderFacts
from .manifest import SiteFacts as SiteFacts
