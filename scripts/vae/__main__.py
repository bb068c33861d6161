"""Make runs of the study, and write its tables: `python -m scripts.vae run`, then `python -m scripts.vae tables`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from scripts.benchmarks.sections import put
from steerlib.text import progress
from steerlib.threads import use_threads

from . import findings, shipped
from .run import KINDS, QUICK, Size, run
from .scatter import scatter
from .truth import truth
from .worlds import WORLDS

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
OUT, OTHERS, README = Path("out/vae"), Path("out/vae-64"), Path(__file__).parent / "README.md"
BANKS = Path(__file__).parents[2] / "concept_banks"
SEEDS = 3
Job = tuple[str, str, int]


def jobs(sets: list[str], kinds: list[str], seeds: int) -> Iterator[Job]:
    """Data set, kind and seed of every run, first all of the first seed."""
    yield from ((world, kind, seed) for seed in range(seeds) for world in sets for kind in kinds)


def file_of(out: Path, job: Job) -> Path:
    """Where a run is written."""
    return out / "{}-{}-{}.json".format(Path(job[0]).stem, *job[1:])


def read(out: Path) -> list[dict[str, Any]]:
    """All runs in a folder."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("*.json"))]


@app.command("run")
def runs(
    out: Annotated[
        Path, typer.Option(help="folder of a JSON file for each run; those that are there are not made again")
    ] = OUT,
    data: Annotated[list[str] | None, typer.Option(help=f"{', '.join(WORLDS)}, or a file that `steerlib study` reads")] = None,
    kind: Annotated[list[str] | None, typer.Option(help=", ".join(KINDS))] = None,
    seeds: Annotated[int, typer.Option(help="number of seeds", min=1)] = SEEDS,
    quick: Annotated[bool, typer.Option(help="small runs, to try it")] = False,
    steps: Annotated[int, typer.Option(help="of training, if other than the size's own", min=0)] = 0,
    side: Annotated[int, typer.Option(help="pixels, a multiple of 8, if other than the size's own", min=0)] = 0,
    device: Annotated[str, typer.Option(help="where autoencoders are trained, such as cuda")] = "cpu",
    threads: Annotated[int, typer.Option(help="of the processor", min=0)] = 1,
) -> None:
    """Train and measure whatever is not there yet; a run that was cut off begins again."""
    use_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    size = QUICK if quick else Size()
    size = size._replace(**{name: value for name, value in {"steps": steps, "side": side}.items() if value})
    left = [job for job in jobs(data or [*WORLDS], kind or [*KINDS], seeds) if not file_of(out, job).exists()]
    with progress(None, "training and measuring", total=len(left) * size.steps) as bar:
        for job in left:
            found = run(*job, size, device=device, tick=lambda: bar.update(1))
            held = file_of(out, job).with_suffix(".part")
            held.write_text(json.dumps(found, indent=1, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
            held.rename(file_of(out, job))


@app.command()
def tables(
    out: Annotated[Path, typer.Option(help="folder of the runs")] = OUT,
    others: Annotated[Path, typer.Option(help="folder of runs of other sizes, of which a line each is written")] = OTHERS,
    readme: Annotated[Path, typer.Option(help="where to write them, between its marks; the picture goes beside it")] = README,
) -> None:
    """Write tables, findings and the picture of all runs in a folder."""
    made = read(out)
    if not made or any(one["size"] != made[0]["size"] for one in made):
        raise typer.BadParameter(f"expected runs of one size in {out}, got {len(made)} runs of several or none")
    order = {job: k for k, job in enumerate(jobs([*WORLDS], [*KINDS], 1000))}
    made.sort(key=lambda one: order.get((one["world"], one["kind"], one["seed"]), len(order)))
    planned = len(WORLDS) * len(KINDS) * SEEDS
    parts = {
        "runs": findings.about(made, planned),
        "strength": findings.strength_and_disentanglement(made),
        "bottleneck": findings.bottleneck(made),
        "winners": findings.winners(made),
        "quantised": findings.quantised(made),
        "all": findings.everything(made),
        "truth": truth(),
    }
    if single := read(others):
        parts["others"] = "\n".join(["Of another size:\n", *(f"- {findings.single(one)}" for one in single)])
    for name, content in parts.items():
        put([readme], name, content)
    readme.with_name("scatter.svg").write_text(scatter(made), encoding="utf-8")
    typer.echo(f"wrote {readme}")


@app.command()
def bank(
    out: Annotated[Path, typer.Option(help="folder of the bank")] = BANKS / shipped.NAME,
    work: Annotated[Path, typer.Option(help="folder of the autoencoder; training goes on in it")] = OUT / "faces",
    steps: Annotated[int, typer.Option(help="of training, if other than the bank's own", min=0)] = 0,
    readme: Annotated[list[Path] | None, typer.Option(help="where to write tables, between their marks")] = None,
    threads: Annotated[int, typer.Option(help="of the processor", min=0)] = 1,
) -> None:
    """Make the shipped bank: train an autoencoder of faces, study it, and write the bank and its tables."""
    use_threads(threads)
    made = shipped.bank(work, shipped.SIZE._replace(steps=steps) if steps else shipped.SIZE)
    typer.echo(made.save_pretrained(out))
    for name, content in shipped.tables(made, README.read_text(encoding="utf-8")).items():
        put(readme or [BANKS / "README.md", README], name, content)


if __name__ == "__main__":
    app()
