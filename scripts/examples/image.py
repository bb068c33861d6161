"""Steer what a diffusers pipeline draws: one prompt, one noise, and concepts of a shipped bank.

pip install "steerlib[transformers,diffusers]"
python image.py
"""

import sys

import torch
from PIL import Image

import steerlib as sl
from steerlib.threads import use_threads

PROMPT = "a medium checked green triangle at the back right by day on sand under an azure sky lit from above"
EDITS = {
    "unsteered": {},
    "night": {"night": sl.Set(2.5)},  # let the concept read 2.5 units
    "blue": {"blue": 4.0},  # add 4 units of it
    "large on stone": {"large": 1.75, "stone": 2.5},  # several at once
}
OUT = sys.argv[1] if len(sys.argv) > 1 else "image.png"

use_threads()  # as many processor threads as are fastest now
bank = sl.ConceptBank.from_pretrained("scenes-32")
pipe, _ = sl.load(f"{bank.folder}/pipeline")  # ships with the bank; 32 by 32 pixels. Any diffusers pipeline can be steered
strip = Image.new("RGB", (256 * len(EDITS), 256))
for column, edits in enumerate(EDITS.values()):
    generator = torch.Generator().manual_seed(0)
    with sl.steer(pipe, bank, edits, branch="cond"):
        drawn = pipe(PROMPT, guidance_scale=2.0, num_inference_steps=20, generator=generator).images[0]
    strip.paste(drawn.resize((256, 256), Image.Resampling.NEAREST), (256 * column, 0))
strip.save(OUT)
print(f"{', '.join(EDITS)}: {OUT}")
