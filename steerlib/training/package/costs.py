"""What a recipe of pictures will take, before any weight is loaded: a dry run."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.benchmark import Timer

from ...devices import best_device
from ...errors import BadRecipe, SteerlibError, UnsupportedTarget
from ...evaluation.denoising import DRAWS
from ...hosts import host_for, outline
from ...steering.recording import observing
from ..calibrate.prompted import Drawing, most_trials
from ..directions.prompted import REACHES
from ..picture_recipe import PictureRecipe
from ..recipe_base import Recipe
from ..record.contrasts import given_to, numbers_at, places, texts
from .prompted import SHARES, SHOWN

SIDE = {"cpu": 1024}
"""Of the matrices whose product is timed, by kind of device; of others `LARGE`."""
LARGE = 8192
TRIAL = 0.3
"""Seconds that it is timed for."""


@dataclass(frozen=True)
class Costs:
    """What making some concepts takes.

    Args:
        pipeline: Its class.
        concepts: How many there are.
        sites: Where they are looked for, with the width of each.
        levels: Stretches of noise.
        weights: Numbers in all networks.
        sums: Bytes of what is kept of one concept while its pairs are drawn.
        pictures: That are drawn for one concept, at most.
        judged: Of these, pictures that the pipeline is asked about.
        passes: Calls of the denoiser for one concept, at most, if pictures are drawn one by one.
        flops: Operations for one concept, at most.
        rate: Operations a second.
        where: Whose rate it is.
    """

    pipeline: str
    concepts: int
    sites: Mapping[str, int]
    levels: int
    weights: int
    sums: int
    pictures: int
    judged: int
    passes: int
    flops: float
    rate: float
    where: str

    @property
    def minutes(self) -> float:
        """For one concept."""
        return self.flops / self.rate / 60

    def __str__(self) -> str:
        names, half = [*self.sites], f"{_short(2 * self.weights)}B in half precision"
        lines = {
            "pipeline": f"{self.pipeline}, without its weights",
            "sites": f"{len(self.sites)}, from {names[0]} to {names[-1]}",
            "weights": f"{self.weights:,}: {_short(4 * self.weights)}B in float32, {half}",
            "sums": f"{_short(self.sums)}B a concept, at {len(self.sites)} sites and {self.levels} stretches of noise",
            "pictures": f"{self.pictures} a concept, {self.judged} of them judged",
            "passes": f"{self.passes:,} of the denoiser a concept, where pictures are drawn one by one",
            "compute": f"{_short(self.flops)}FLOP a concept",
            "rate": f"{_short(self.rate)}FLOP/s, {self.where}",
            "time": f"{self.minutes:.3g} minutes a concept, {self.minutes * self.concepts:.3g} in all",
        }
        return "\n".join(f"{name:<9} {line}" for name, line in lines.items()) + f"\n{BOUNDS}"


BOUNDS = """Pictures, passes and time are the most that the search may take, but networks rarely run as fast as large products.
Not counted: memory of activations, and decoding of the pictures that the card shows."""
PREFIXES = " kMGTP"


def _short(number: float) -> str:
    power = next(k for k in range(len(PREFIXES)) if number < 1000 ** (k + 1) or k == len(PREFIXES) - 1)
    return f"{number / 1000**power:.4g} {PREFIXES[power]}"


def costs_of(recipe: Recipe, rate: float = 0.0) -> Costs:
    """What a recipe takes: its pipeline runs without weights, for shapes alone.

    Args:
        recipe: Of pictures.
        rate: Operations a second of a device; 0: that of the one here, measured.

    Raises:
        BadRecipe: The recipe is of something else than concepts of pictures.
        UnsupportedTarget: The pipeline cannot be made from its configuration alone.
    """
    if not isinstance(recipe, PictureRecipe):
        raise BadRecipe(f"a dry run is of concepts of pictures; recipe {recipe.name!r} is of something else")
    pipe, done = outline(recipe.weights)
    host = host_for(pipe)
    sites, reads = [*recipe.sites] or places(host), texts(host)
    widths, draws, judges = _tried(pipe, recipe, done, (*sites, *map(given_to, sites), *reads))
    judged = (most_trials(recipe.methods, len(REACHES)) + 2) * recipe.dev_prompts + 4 * recipe.evaluation_prompts
    followed = _followed(recipe)
    pictures = 2 * recipe.train_prompts + judged + SHOWN * (len(SHARES) + 2) + followed
    kept = sum(numbers_at(widths[site], widths[given_to(site)]) for site in sites) * len(recipe.levels)
    asked = judged + followed / DRAWS  # the graph has a look at a picture from one noise, under one prompt in place of two
    flops = pictures * draws["flops"] + (judged + followed / DRAWS / 2) * judges["flops"]
    return Costs(
        pipeline=type(pipe).__name__,
        concepts=len(recipe.concepts),
        sites={site: widths[site] for site in sites},
        levels=len(recipe.levels),
        weights=sum(part.numel() for part in host.model.parameters()),
        sums=4 * (kept + sum(2 * widths[site] + 2 for site in reads if site in widths)),
        pictures=pictures,
        judged=judged,
        passes=round(sum(pictures * draws[name] + asked * judges[name] for name in host.passes())),
        flops=flops,
        rate=rate or measured_rate(best_device()),
        where="as given" if rate else f"of large products in float32, measured on {best_device()}",
    )


def _followed(recipe: PictureRecipe) -> int:
    """Pictures for the graph, by concept."""
    if (graph := recipe.graph) is None:
        return 0
    counts = recipe.train_prompts, recipe.dev_prompts, recipe.evaluation_prompts
    return 2 * sum(min(graph.pairs, count) for count in counts) + round(
        graph.contexts * (1 + (1 + graph.controls) / len(recipe.concepts))
    )


def _tried(
    pipe: Any, recipe: PictureRecipe, done: Counter[str], sites: Sequence[str]
) -> tuple[dict[str, int], Counter[str], Counter[str]]:
    """The width of some sites; and what is done to draw one picture, and to ask about it."""
    widths: dict[str, int] = {}
    pair = recipe.read_splits(recipe.concepts[0]).train[0]
    draw = Drawing(pipe, recipe)
    try:
        with observing(pipe, {site: lambda x, _, site=site: widths.update({site: x.shape[-1]}) for site in sites}):
            latents = draw([pair.negative], [pair.seed])
        draws = done.copy()
        draw.errors(latents, [pair.negative], [pair.positive])
    except SteerlibError:
        raise
    except Exception as error:  # whatever asks for words or numbers
        raise UnsupportedTarget(f"{type(pipe).__name__} does not run without its weights: {error}") from error
    return widths, draws, done - draws


def measured_rate(device: torch.device) -> float:
    """Operations a second of a device, by a product of large matrices in float32."""
    side = SIDE.get(device.type, LARGE)
    x = torch.ones(side, side, device=device)
    timer = Timer("x @ x", globals={"x": x}, num_threads=torch.get_num_threads())
    return 2 * side**3 / timer.blocked_autorange(min_run_time=TRIAL).median
