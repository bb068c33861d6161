"""With `[train]` (and `[eval]`, which is the same): all modules load, and the scorer learns to tell texts apart."""

import importlib
import pkgutil

import steerlib
from steerlib.evaluation.text import Judge

for module in pkgutil.walk_packages(steerlib.__path__, "steerlib."):
    importlib.import_module(module.name)
texts = {"sea": ["The ship sails at dawn.", "Waves broke over the deck."], "tea": ["A cup of tea.", "Milk or sugar?"]}
judge = Judge.fit(texts)
assert judge(["The captain steered the boat through the waves."])[0].argmax() == judge.names.index("sea")
