"""With `[diffusers]`: steer the pipeline that ships with a bank."""

import torch

import steerlib as sl

bank = sl.ConceptBank.from_pretrained("scenes-32")
pipe, _ = sl.load(f"{bank.folder}/pipeline")
pipe.set_progress_bar_config(disable=True)


def draw() -> torch.Tensor:
    noise = torch.Generator().manual_seed(0)
    drawn = pipe("a red square at night", num_inference_steps=4, guidance_scale=2.0, generator=noise, output_type="pt")
    return drawn.images


plain = draw()
with sl.steer(pipe, bank, {"blue": sl.Set(3.0)}, branch="cond"):
    steered = draw()
assert not torch.equal(plain, steered) and torch.equal(plain, draw())
