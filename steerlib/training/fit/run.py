"""Train sparse encoders, several from one pass over activations, on any number of processes.

A run that was killed goes on where its last checkpoint was written and ends with the same bytes. Processes share each batch and
add up their gradients, so that the result does not depend on their number.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ...devices import best_device
from ...encoders import Sparse
from ...errors import BadRecipe
from ...text import progress
from ..store import save
from .encoder_recipe import EncoderRecipe
from .inputs import Batch, Source, first_tokens, pair
from .learner import Learner
from .sparse_step import Outcome

CHECKPOINT = "encoders.safetensors"
PINS = ("cuda", "xpu")
"""Devices to which memory can be pinned."""
LOOK = 50
"""Steps between updates of the figures shown, for which the CPU has to wait for the accelerator."""


def fit(
    recipes: Mapping[str, EncoderRecipe],
    source: Source,
    *,
    steps: int,
    folder: str | os.PathLike[str] | None = None,
    save_every: int = 500,
    accelerator: Any = None,
) -> dict[str, Sparse]:
    """Train an encoder for each recipe, all on the same batches.

    `folder` keeps a checkpoint, from which the same call goes on. `accelerator` (accelerate's) brings the device, the other
    processes and the trackers; without one, this process and its GPU, if there is one. Raises `BadRecipe`.
    """
    batch = checked(recipes, steps, accelerator)
    device = accelerator.device if accelerator else best_device()
    x, y = first_tokens(source, batch)
    x, y = x.to(device), None if y is None else y.to(device)
    gather = accelerator.gather if accelerator and accelerator.num_processes > 1 else None
    learners = {name: Learner(recipe, x, y, steps, gather) for name, recipe in recipes.items()}
    about = json.dumps({"recipes": {n: asdict(r) for n, r in recipes.items()}, "steps": steps, "tokens": len(source)})
    path = None if folder is None else Path(folder) / CHECKPOINT
    step = restored(path, learners, about)
    first = accelerator is None or accelerator.is_main_process
    quiet: dict[str, Any] = {} if first else {"disable": True}
    with progress(None, "fitting", total=steps, initial=step, **quiet) as bar:
        for x, y in islice(ahead(source.batches(step, batch), device, accelerator), steps - step):
            seen = {name: stepped(learner, x, y, step, accelerator) for name, learner in learners.items()}
            step += 1
            bar.update()
            if step % LOOK == 0 or step == steps:
                show(learners, seen, step, bar, accelerator)
            if path is not None and first and (step % save_every == 0 or step == steps):
                keep(path, learners, step, about)
    if step < steps:
        raise BadRecipe(f"expected {steps} batches of {batch} tokens, the source ended after {step}")
    if accelerator:
        accelerator.wait_for_everyone()
    return {name: learner.encoder() for name, learner in learners.items()}


def checked(recipes: Mapping[str, EncoderRecipe], steps: int, accelerator: Any) -> int:
    """The batch of all recipes, which have to be ones that can work."""
    for recipe in recipes.values():
        recipe.check()
    sizes = sorted({recipe.batch for recipe in recipes.values()})
    processes = accelerator.num_processes if accelerator else 1
    if len(sizes) != 1 or sizes[0] % processes or steps < 1 or any("|" in name for name in recipes):
        raise BadRecipe(
            f"expected recipes of one batch size that {processes} processes can share, names without '|' and a step or more, "
            f"got batches {sizes} for {', '.join(recipes) or 'no recipe'} and {steps} steps"
        )
    return sizes[0]


def stepped(learner: Learner, x: Tensor, y: Tensor | None, step: int, accelerator: Any) -> Outcome:
    """Learn from a batch, whose outcomes in all processes are added up; returns the outcome without gradients."""
    outcome = learner.outcome(x, y, step)
    if accelerator is not None and accelerator.num_processes > 1:
        outcome = accelerator.reduce(outcome, reduction="sum")
        outcome = outcome._replace(least=outcome.least / accelerator.num_processes)  # the least potential is their mean
    learner.learn(outcome, step)
    return outcome._replace(gradients={})


def ahead(batches: Iterator[Batch], device: torch.device, accelerator: Any) -> Iterator[tuple[Tensor, Tensor | None]]:
    """This process's part of each batch, on its way to the device while the one before is worked on."""
    moved = (
        (moving(x, device, accelerator), None if y is None else moving(y, device, accelerator)) for x, y in map(pair, batches)
    )
    return (one for one, _ in pairwise(chain(moved, [None])) if one is not None)


def moving(batch: Tensor, device: torch.device, accelerator: Any) -> Tensor:
    """The rows of this process, copied to its device; from pinned memory, where there is some, the copy does not block."""
    rows = len(batch) // (accelerator.num_processes if accelerator else 1)
    part = batch[rows * accelerator.process_index :][:rows] if accelerator else batch
    if device.type not in PINS or part.device.type != "cpu":
        return part.to(device)
    return part.pin_memory().to(device, non_blocking=True)


def show(learners: Mapping[str, Learner], seen: Mapping[str, Outcome], step: int, bar: Any, accelerator: Any) -> None:
    """Of the last batch, on the progress bar and in accelerate's trackers: loss, explained variance, latents that fire on a
    token, share of latents that are dead."""
    figures: dict[str, dict[str, float]] = {}
    for name, learner in learners.items():
        recipe, outcome = learner.recipe, seen[name]
        dead = (learner.since >= recipe.dead_after).float().mean()
        values = torch.stack((outcome.loss, 1 - outcome.error, outcome.fired.sum() / recipe.batch, dead)).tolist()
        figures[name] = dict(zip(("loss", "explained", "l0", "dead"), values, strict=True))
    worst = {key: f"{max(f[key] for f in figures.values()):.3f}" for key in ("loss", "dead")}
    bar.set_postfix(worst | {"explained": f"{min(f['explained'] for f in figures.values()):.3f}"}, refresh=False)
    if accelerator:
        accelerator.log({f"{name}/{key}": value for name, f in figures.items() for key, value in f.items()}, step=step)


def keep(path: Path, learners: Mapping[str, Learner], step: int, about: str) -> None:
    """All that the next step depends on, whole or not at all."""
    tensors = {f"{name}|{key}": t.clone() for name, learner in learners.items() for key, t in learner.tensors.items()}
    save(path, tensors, {"state": json.dumps({"step": step, "of": about})})


def restored(path: Path | None, learners: Mapping[str, Learner], about: str) -> int:
    """Load a checkpoint, if there is one, into the learners; returns its step, or 0."""
    if path is None or not path.is_file():
        return 0
    with safe_open(path, "pt") as file:
        found = json.loads(file.metadata()["state"])
        if found["of"] != about:
            raise BadRecipe(f"expected recipes, steps and tokens as {path.parent.name!r} was begun with; take another folder")
        for name, learner in learners.items():
            prefix = f"{name}|"
            keys = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118
            learner.restore({key.removeprefix(prefix): file.get_tensor(key) for key in keys})
    return found["step"]
