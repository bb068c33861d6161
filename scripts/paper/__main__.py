"""Run the protocol, or say what it takes: `PYTHONPATH=scripts python -m paper run PROTOCOL RECIPE PIPELINE --out out/paper`."""

import json
import re
from pathlib import Path
from typing import Annotated

import torch
import typer

from paper import dry as drying
from paper import sd14
from paper.protocol import Protocol, figures_table
from paper.stages import Run
from steerlib import load
from steerlib.devices import best_device
from steerlib.training.recipe import PipelineEncoderRecipe

HERE = Path(__file__).parent
app = typer.Typer(add_completion=False, help=__doc__)
Plan = Annotated[Path, typer.Option(help="what is drawn, erased and replaced")]
Encoders = Annotated[Path, typer.Option(help="the recipe of the encoders, with its prompts beside it")]


def read(recipe: Path, *, to_train: bool = True) -> PipelineEncoderRecipe:
    """The recipe, of which a dry run needs no prompts."""
    return PipelineEncoderRecipe.from_file(recipe, to_train=to_train)


@app.command()
def run(
    pipeline: Annotated[str, typer.Argument(help="a folder or a Hub id")],
    protocol: Plan = HERE / "protocol.toml",
    recipe: Encoders = HERE / "recipe.toml",
    out: Annotated[Path, typer.Option(help="where every stage keeps its results")] = Path("out/paper"),
) -> None:
    """All of it. Run it again to go on."""
    pipe = load(pipeline)[0].to(best_device())
    print(Run(pipe, Protocol.from_file(protocol), read(recipe), out).report())


@app.command()
def dry(
    pipeline: Annotated[str, typer.Argument(help="a folder with configurations; default: those of Stable Diffusion 1.4")] = "",
    protocol: Plan = HERE / "protocol.toml",
    recipe: Encoders = HERE / "recipe.toml",
    prompts: Annotated[int, typer.Option(help="how many are recorded; 0: the recipe's")] = 10_000,
    tflops: Annotated[float, typer.Option(help="of a device; 0: this one's, measured")] = 0.0,
    out: Annotated[Path, typer.Option(help="where the configurations are written")] = Path("out/sd14"),
    write: Annotated[bool, typer.Option(help="put it into the README beside this file")] = False,
) -> None:
    """What it takes, without any weight."""
    source = pipeline or sd14.described(out)
    made = read(recipe, to_train=False)
    text = drying.dry(source, Protocol.from_file(protocol), made, prompts=prompts, tflops=tflops)
    print(text := f"{text}\n\n{figures_table()}")
    if write:
        put("dry", text)


@app.command()
def step(
    protocol: Plan = HERE / "protocol.toml",
    recipe: Encoders = HERE / "recipe.toml",
    size: Annotated[int, typer.Option(help="pixels of a picture's side")] = 512,
    out: Annotated[Path, typer.Option(help="keeps what was recorded")] = Path("out/paper"),
    write: Annotated[bool, typer.Option(help="put it into the README beside this file")] = False,
) -> None:
    """One denoising step of Stable Diffusion 1.4 at full width and depth, with random weights."""
    torch.manual_seed(0)
    print(text := json.dumps(drying.step(Protocol.from_file(protocol), read(recipe, to_train=False), out, size=size), indent=1))
    if write:
        put("step", f"```json\n{text}\n```")


def put(section: str, text: str) -> None:
    """Write a measured part of the README."""
    marks = re.compile(rf"(<!-- begin: {section} -->\n).*?(<!-- end: {section} -->)", re.DOTALL)
    path = HERE / "README.md"
    path.write_text(marks.sub(lambda m: f"{m[1]}{text}\n{m[2]}", path.read_text(encoding="utf-8")), encoding="utf-8")


app()
