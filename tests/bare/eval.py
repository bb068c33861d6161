"""With `[eval]`, which is what `[train]` declares too: all modules but the command line load, and a scorer learns."""

import importlib
import pkgutil

import steerlib
from steerlib.evaluation.text import Judge

LEFT = ("steerlib.__main__", "steerlib.cli", "steerlib.terminal")  # these need the extra cli

for module in pkgutil.walk_packages(steerlib.__path__, "steerlib."):
    if module.name not in LEFT and not module.name.startswith("steerlib.hooks.diffusers"):
        importlib.import_module(module.name)
texts = {"sea": ["The ship sails at dawn.", "Waves broke over the deck."], "tea": ["A cup of tea.", "Milk or sugar?"]}
judge = Judge.fit(texts)
assert judge(["The captain steered the boat through the waves."])[0].argmax() == judge.names.index("sea")
