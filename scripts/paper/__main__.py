"""Run the protocol, or say what it takes: `python -m scripts.paper run`, `dry`, `step`."""

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from scripts.benchmarks.sections import put as written
from steerlib import load
from steerlib.devices import best_device
from steerlib.training.recipe import PipelineEncoderRecipe

from . import dry as drying
from . import sd14
from .protocol import Protocol, figures_table
from .stages import Run

HERE = Path(__file__).parent
put = partial(written, [HERE / "README.md"])
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
Plan = Annotated[Path, typer.Option(help="what is drawn, erased and replaced")]
Encoders = Annotated[Path, typer.Option(help="the recipe of the encoders, with its prompts beside it")]
Write = Annotated[bool, typer.Option(help="put it into the README beside this file")]


@app.command()
def run(
    pipeline: Annotated[str, typer.Option(help="a folder or a Hub id; default: the recipe's source")] = "",
    protocol: Plan = HERE / "protocol.toml",
    recipe: Encoders = HERE / "recipe.toml",
    out: Annotated[Path, typer.Option(help="where every stage keeps its results")] = Path("out/paper"),
    write: Write = False,
) -> None:
    """All of it. Run it again to go on."""
    made = PipelineEncoderRecipe.from_file(recipe)
    pipe = load(pipeline or made.weights)[0].to(best_device())
    pipe.set_progress_bar_config(disable=True)
    if hasattr(pipe, "safety_checker"):
        pipe.safety_checker = None  # which blackens just the pictures that are counted
    print(text := Run(pipe, Protocol.from_file(protocol), made, out).report())
    if write:
        put("run", text.replace("## ", "### "))


@app.command()
def dry(
    pipeline: Annotated[str, typer.Option(help="a folder with configurations; default: those of Stable Diffusion 1.4")] = "",
    protocol: Plan = HERE / "protocol.toml",
    recipe: Encoders = HERE / "recipe.toml",
    prompts: Annotated[int, typer.Option(help="how many are recorded; 0: the recipe's")] = 10_000,
    tflops: Annotated[float, typer.Option(help="of a device; 0: this one's, measured")] = 0.0,
    out: Annotated[Path, typer.Option(help="where the configurations are written")] = Path("out/sd14"),
    write: Write = False,
) -> None:
    """What it takes, without any weight."""
    made = PipelineEncoderRecipe.from_file(recipe, to_train=False)
    source = pipeline or sd14.described(out)
    print(text := drying.dry(source, Protocol.from_file(protocol), made, prompts=prompts, tflops=tflops))
    print(figures := figures_table())
    if write:
        put("dry", text)
        put("figures", figures)


@app.command()
def step(
    recipe: Encoders = HERE / "recipe.toml",
    size: Annotated[int, typer.Option(help="pixels of a picture's side")] = 512,
    out: Annotated[Path, typer.Option(help="keeps what was recorded")] = Path("out/paper-step"),
    write: Write = False,
) -> None:
    """One denoising step of Stable Diffusion 1.4 at full width and depth, in bfloat16, with random weights."""
    found = drying.step(PipelineEncoderRecipe.from_file(recipe, to_train=False), out, size=size)
    print(text := json.dumps(found, indent=1))
    if write:
        put("step", f"```json\n{text}\n```")


if __name__ == "__main__":
    app()
