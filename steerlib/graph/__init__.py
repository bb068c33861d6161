"""The causal graph of a bank: its edges, the effects and forecasts that follow, questions to it, and pages to look at."""

from .causal_graph import CausalGraph as CausalGraph
from .causal_graph import Edge as Edge
