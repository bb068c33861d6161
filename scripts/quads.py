"""Context modules on quad data, beside the paper's table: `python scripts/quads.py [--seeds 5] [--out out/quads]`.

Pictures of four coloured quadrants and a disc or square, drawn by us after the description in arXiv 2507.04754. Contexts are
observed, and an intervention on each concept. Nine pairs are never seen together in training: what a method gives for them is
compared with true renders by sliced Wasserstein distance. Methods: a module trained with its autoencoder (`end to end`), one in
a pooled autoencoder that stays as it is (`frozen`) or learns on after a fifth of the steps (`fine-tuned`), an autoencoder
without a module on observed pictures (`base`) and on all (`pooled`), a module with labels of contexts shuffled (`shuffled`),
and one that is linear, trained with its autoencoder (`linear`). Smaller than the paper's: pictures, layers, steps; see
`--help`.

Every seed of every set keeps its figures in the folder, so that the same command goes on where it stopped; at the end they
are in `quads.json` there, from which `python scripts/readme.py --no-banks --quads FILE` writes the table.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import typer
from benchmarks.measurement import machine
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy

from steerlib.evaluation.contexts import sliced_wasserstein
from steerlib.evaluation.report import markdown
from steerlib.training.fit.contexts import OBSERVED, ContextFit, ContextLayer, fit_contexts
from steerlib.training.store import remembered

CONCEPTS = ("first", "second", "third", "fourth", "size", "colour")
"""Hues of the quadrants, size and hue of what is in the centre."""
EFFECTS = {
    **{("first", "third"): 0.9, ("second", "fourth"): -0.9, ("first", "size"): 0.7},
    **{("fourth", "colour"): 0.8, ("third", "colour"): 0.5, ("colour", "angle"): 0.5},
}
"""Of the dependent set, structural effects by cause and effect, causes first; its eight nodes have a shape and an angle too."""
PAIRS = [pair for k, pair in enumerate(combinations(CONCEPTS, 2)) if k % 5 < 3]
"""Nine pairs that no training shows."""
SHIFT, SPREAD = 2.0, 0.3
"""Mean and standard deviation of an intervened concept."""
PAPER = {
    "independent": {"end to end": (0.063, 0.081), "frozen": (0.086, 0.132), "base": (0.175, 0.288), "pooled": (0.166, 0.248),
                    "shuffled": (0.202, 0.306), "fine-tuned": (0.059, 0.086)},
    "dependent": {"end to end": (0.116, 0.127), "frozen": (0.121, 0.134), "base": (0.170, 0.222), "pooled": (0.167, 0.212),
                  "shuffled": (0.166, 0.203), "fine-tuned": (0.112, 0.121)},
}  # fmt: skip
"""Of the paper: distance of concepts and of compositions."""
PARTS = (("base", "pooled", "end to end", "frozen", "shuffled"), ("linear",), ("fine-tuned",))
"""Methods whose figures are kept in a file of their own, by the first of them but for the first file."""


class Size(NamedTuple):
    """How much is trained and measured."""

    side: int = 32
    pictures: int = 2000
    hidden: int = 32
    latents: int = 48
    compared: int = 500
    fit: ContextFit = ContextFit(inner=8, outer=8, steps=3000, batch=64)


def factors(n: int, done: tuple[str, ...], g: torch.Generator, *, dependent: bool) -> dict[str, Tensor]:
    """Values of every concept, from a linear Gaussian system or independent; those intervened on are cut from their causes."""
    values: dict[str, Tensor] = {}
    for name in (*CONCEPTS, "shape", "angle"):
        own = torch.randn(n, generator=g)
        if name in done:
            values[name] = SHIFT + SPREAD * own
            continue
        causes = {cause: effect for (cause, to), effect in EFFECTS.items() if to == name and dependent}
        values[name] = sum((effect * values[cause] for cause, effect in causes.items()), own) / (1 + len(causes)) ** 0.5
    return values


def hue(v: Tensor) -> Tensor:
    """Colours `[n, 3]` around a circle, two standard deviations being a third of it."""
    angle = v / 6 * 2 * torch.pi
    return torch.stack([(1 + torch.cos(angle + 2 * torch.pi * k / 3)) / 2 for k in range(3)], 1)


def render(values: dict[str, Tensor], side: int) -> Tensor:
    """Pictures `[n, 3, side, side]` from 0 to 1."""
    at = (torch.arange(side) + 0.5) / side * 2 - 1
    y, x = torch.meshgrid(at, at, indexing="ij")
    corners = [(y < 0) & (x < 0), (y < 0) & (x >= 0), (y >= 0) & (x < 0), (y >= 0) & (x >= 0)]
    image = sum(hue(values[name])[:, :, None, None] * mask for name, mask in zip(CONCEPTS, corners, strict=False))
    radius = (0.35 + 0.08 * values["size"]).clamp(0.1, 0.7)[:, None, None]
    turn = (values["angle"] * 0.3)[:, None, None]
    u, v = x * turn.cos() + y * turn.sin(), y * turn.cos() - x * turn.sin()
    square = torch.maximum(u.abs(), v.abs()) * 1.1
    away = torch.where((values["shape"] > 0)[:, None, None], square, (u.square() + v.square()).sqrt())
    inside = ((radius - away) * side / 2 + 0.5).clamp(0, 1)[:, None]
    return image * (1 - inside) + hue(values["colour"] + 3)[:, :, None, None] * inside


def pictures(n: int, done: tuple[str, ...], side: int, seed: int, *, dependent: bool) -> Tensor:
    """Renders with some concepts intervened on."""
    return render(factors(n, done, torch.Generator().manual_seed(seed), dependent=dependent), side)


class Autoencoder(nn.Module):
    """Pictures to latents and back, with a context layer between, or noise of its own where there is none."""

    def __init__(self, size: Size, seed: int, *, module: bool):
        super().__init__()
        torch.manual_seed(seed)
        h, small = size.hidden, size.side // 4
        self.encoder = nn.Sequential(
            *(nn.Conv2d(3, h, 4, 2, 1), nn.GELU(), nn.Conv2d(h, 2 * h, 4, 2, 1), nn.GELU(), nn.Flatten()),
            nn.Linear(2 * h * small * small, size.latents),
        )
        self.decoder = nn.Sequential(
            *(nn.Linear(size.latents, 2 * h * small * small), nn.GELU(), nn.Unflatten(1, (2 * h, small, small))),
            *(nn.ConvTranspose2d(2 * h, h, 4, 2, 1), nn.GELU(), nn.ConvTranspose2d(h, 3, 4, 2, 1), nn.Sigmoid()),
        )
        self.spread, self.kl = nn.Parameter(torch.full((size.latents,), -1.0)), torch.zeros(())
        self.context = ContextLayer(CONCEPTS, size.latents, size.fit) if module else None

    def forward(self, x: Tensor, g: torch.Generator | None = None) -> Tensor:
        z = self.encoder(x)
        if self.context is not None:
            return self.decoder(self.context(z))
        self.kl = (z.square() + (2 * self.spread).exp() - 1 - 2 * self.spread).sum(-1).mean() / 2
        return self.decoder(z + self.spread.exp() * torch.randn(z.shape, generator=g))

    @torch.no_grad()
    def draws(self, n: int, done: tuple[str, ...], seed: int) -> Tensor:
        """Pictures from noise, with some concepts intervened on, if it has a module for that."""
        g = torch.Generator().manual_seed(seed)
        if self.context is None:
            return self.decoder(torch.randn(n, len(self.spread), generator=g))
        with self.context.within(dict.fromkeys(done, 1.0)):
            return self.decoder(self.context.draws(n, g))


def error(x: Tensor, y: Tensor) -> Tensor:
    """Binary cross entropy, summed over pixels, mean over pictures."""
    return binary_cross_entropy(y.clamp(1e-6, 1 - 1e-6), x, reduction="sum") / len(x)


def plain(size: Size, data: Tensor, seed: int) -> Autoencoder:
    """An autoencoder without a module."""
    model, fit = Autoencoder(size, seed, module=False), size.fit
    adam = torch.optim.Adam(model.parameters(), lr=fit.rate)
    for step in range(fit.steps):
        g = torch.Generator().manual_seed(seed * 1_000_003 + step)
        x = data[torch.randint(len(data), (fit.batch,), generator=g)]
        loss = error(x, model(x, g)) + fit.beta * model.kl
        adam.zero_grad()
        loss.backward()
        adam.param_groups[0]["lr"] = fit.rate_at(step)
        adam.step()
    return model.eval()


def with_module(
    size: Size,
    data: dict[str, Tensor],
    seed: int,
    around: Autoencoder | None = None,
    learns: Literal["all", "module", "late"] = "all",
) -> Autoencoder:
    """An autoencoder with a module, trained together, or in one that was trained already."""
    model = Autoencoder(size, seed, module=True)
    if around is not None:
        model.load_state_dict(around.state_dict(), strict=False)
        assert model.context is not None
        with torch.no_grad():
            model.context.begin({name: model.encoder(x) for name, x in data.items()})
    batches = lambda name, g: data[name][torch.randint(len(data[name]), (size.fit.batch,), generator=g)]  # noqa: E731
    fit_contexts(model, batches, lambda x: error(x, model(x)), size.fit, learns=learns)
    return model


def ways(size: Size, data: dict[str, Tensor], seed: int) -> dict[str, Callable[[], Autoencoder]]:
    """How each method is trained, on pictures of every context."""
    every = torch.cat([*data.values()])
    mixed = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))].split(size.pictures)
    pooled = cache(lambda: plain(size, every, seed))
    linear = size._replace(fit=replace(size.fit, depth=0))
    return {
        "base": lambda: plain(size, data[OBSERVED], seed),
        "pooled": pooled,
        "end to end": lambda: with_module(size, data, seed),
        "frozen": lambda: with_module(size, data, seed, pooled(), "module"),
        "shuffled": lambda: with_module(size, dict(zip(data, mixed, strict=True)), seed),
        "linear": lambda: with_module(linear, data, seed),
        "fine-tuned": lambda: with_module(size, data, seed, pooled(), "late"),
    }


def measured(
    size: Size, seed: int, methods: Sequence[str], *, dependent: bool
) -> tuple[dict[str, Any], dict[str, Autoencoder]]:
    """Distances of each method, mean over concepts and over held-out pairs, and the bits a pixel of its reconstruction."""
    side, n = size.side, size.pictures
    names = {OBSERVED: (), **{name: (name,) for name in CONCEPTS}}
    data = {name: pictures(n, done, side, 1000 * seed + k, dependent=dependent) for k, (name, done) in enumerate(names.items())}
    make = ways(size, data, seed)
    made = {method: make[method]() for method in methods}
    wanted = {
        done: pictures(size.compared, done, side, 500 + 1000 * seed, dependent=dependent) for done in [*names.values(), *PAIRS]
    }
    found: dict[str, Any] = {}
    for method, model in made.items():
        far = {
            done: sliced_wasserstein(model.draws(size.compared, done, seed), truth) for done, truth in wanted.items() if done
        }
        with torch.no_grad():
            bits = float(error(wanted[()], model(wanted[()])) / wanted[()][0].numel() / torch.tensor(2.0).log())
        singles, pairs = ([v for done, v in far.items() if len(done) == k] for k in (1, 2))
        found[method] = {"concept": sum(singles) / len(singles), "composition": sum(pairs) / len(pairs), "bits": bits}
    return found, made


def figure(made: dict[str, Autoencoder], size: Size, path: Path, *, dependent: bool) -> None:
    """A picture: for three held-out pairs true renders, and what each method draws."""
    import numpy as np
    from PIL import Image

    rows = []
    for done in PAIRS[:3]:
        cells = [pictures(4, done, size.side, 7, dependent=dependent), *(model.draws(4, done, 7) for model in made.values())]
        rows.append(torch.cat([torch.cat([*cell], 2) for cell in cells], 2))
    grid = (torch.cat(rows, 1).permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    Image.fromarray(grid).resize((grid.shape[1] * 2, grid.shape[0] * 2), Image.Resampling.NEAREST).save(path)


BARS = {"independent": (0.5, 0.25), "dependent": (0.35, 0.175)}
"""By what share compositions have to be nearer than the base's: of a module trained end to end, and of a frozen one."""


def table(found: Mapping[str, Any]) -> str:
    """Distances of every set over seeds, beside the paper's, in Markdown; then whether the bars are reached."""
    head = "method | concept | composition | below base | bits a pixel | paper: concept, composition | paper: below base"
    return "\n\n".join([*(_part(name, head, found["runs"][name]) for name in found["runs"]), _about(found)])


def _part(name: str, head: str, runs: Sequence[Mapping[str, Any]]) -> str:
    paper, far, lines = PAPER[name], {}, []
    for method in runs[0]:
        concept, far[method], bits = ([run[method][what] for run in runs] for what in ("concept", "composition", "bits"))
        own = paper.get(method)
        cells = [_over(concept), _over(far[method]), f"{_below(far, method):.0%}", f"{_mean(bits):.3f}"]
        cells += [f"{own[0]:.3f}, {own[1]:.3f}", f"{1 - own[1] / paper['base'][1]:.0%}"] if own else ["", ""]
        lines.append((method, *cells))
    whole, frozen = BARS[name]
    bars = {"end to end": whole, "fine-tuned": whole, "frozen": frozen}
    said = [
        f"- {method} at least {bar:.1%} below the base: {_said(_below(far, method) >= bar)}"
        for method, bar in bars.items()
        if method in far
    ]
    if {"shuffled", "pooled"} <= {*far}:
        at, least, most = _mean(far["shuffled"]), min(far["pooled"]), max(far["pooled"])
        said.append(f"- shuffled at the pooled level ({least:.3f} to {most:.3f}): {_said(least <= at <= most)}; at {at:.3f}")
    return f"Concepts {name}:\n\n{markdown(head, lines)}\n\n" + "\n".join(said)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _over(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{_mean(values):.3f} ({min(values):.3f}–{max(values):.3f})"


def _below(far: Mapping[str, Sequence[float]], method: str) -> float:
    return 1 - _mean(far[method]) / _mean(far["base"])


def _said(holds: bool) -> str:
    return "yes" if holds else "**no**"


def _rate(rate: float) -> str:
    return "" if rate == ContextFit.rate else f" at a rate of {rate:g}"


def _about(found: Mapping[str, Any]) -> str:
    size, count = found["size"], len(next(iter(found["runs"].values())))
    seeds = f"Means over {count} seeds (least–most)" if count > 1 else "One seed"
    side = "" if size["side"] == 64 else f"{size['side']} × {size['side']} pixels in place of 64 × 64, "
    return (
        f"{seeds}; lower is nearer. What differs from the paper: {side}{size['pictures']:,} pictures of each context, "
        f"convolutions of {size['hidden']} and {2 * size['hidden']} channels, {size['fit']['steps']:,} steps of "
        f"{size['fit']['batch']}{_rate(size['fit']['rate'])}, and pictures of our own. "
        f"Machine: {found['machine']}; torch {found['torch']}."
    )


def main(
    only: Annotated[str, typer.Option(help="independent or dependent; default: both")] = "",
    seeds: Annotated[int, typer.Option(help="number of seeds")] = 5,
    side: Annotated[int, typer.Option(help="pixels of a side, a multiple of 4")] = 32,
    steps: Annotated[int, typer.Option(help="steps of every training")] = 1500,
    rate: Annotated[float, typer.Option(help="learning rate")] = 1e-3,
    method: Annotated[list[str], typer.Option(help="a method that is trained, beside the base; may be repeated (all)")] = [],  # noqa: B006
    count: Annotated[int, typer.Option("--pictures", help="pictures of each context")] = 2000,
    out: Annotated[Path, typer.Option(help="folder that keeps the figures of every seed, and pictures of the first")] = Path(
        "out/quads"
    ),
) -> None:
    """Print distances beside the paper's; lower is better."""
    torch.set_num_threads(1)
    fit = ContextFit(inner=8, outer=8, steps=steps, batch=64, rate=rate, warmup=min(200, steps // 5))
    size = Size(side=side, pictures=count, compared=min(500, count), fit=fit)
    own = out / (f"{side}-{steps}-{count}" + ("" if rate == ContextFit.rate else f"-{rate:g}"))
    parts = tuple((one,) for one in ("base", *method)) if method else PARTS
    names = [name for name in PAPER if only in ("", name)]

    def run(name: str, seed: int, methods: Sequence[str]) -> dict[str, Any]:
        found, made = measured(size, seed, methods, dependent=name == "dependent")
        if seed == 0 and methods == PARTS[0]:
            figure(made, size, own / f"{name}.png", dependent=name == "dependent")
        return found

    own.mkdir(parents=True, exist_ok=True)
    runs: dict[str, list[Any]] = {name: [{} for _ in range(seeds)] for name in names}
    for part, seed, name in product(parts, range(seeds), names):
        kept = own / (f"{name}-{seed}.json" if part == PARTS[0] else f"{name}-{seed}-{part[0]}.json")
        runs[name][seed] |= remembered(kept, lambda name=name, seed=seed, part=part: run(name, seed, part))
    shape = {**size._asdict(), "fit": asdict(fit)}
    found = {"machine": machine(), "torch": torch.__version__, "size": shape, "runs": runs}
    (own / "quads.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    typer.run(main)
