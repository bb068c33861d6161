"""Tokens per second of one optimiser step of a sparse autoencoder, beside SAELens, sparsify and dictionary_learning.

    python -m venv .venv-peers
    .venv-peers/bin/pip install torch==2.13.0
    .venv-peers/bin/pip install sae-lens==6.54.12 transformers==4.57.6
    .venv-peers/bin/pip install --no-deps eai-sparsify==1.3.3 dictionary-learning==0.1.0
    .venv-peers/bin/pip install schedulefree natsort simple-parsing einops
    python scripts/bench_sae_train.py --peers .venv-peers/bin/python [--rounds 7] [--out bench.json]

One process each, one thread, one at a time; every round runs all of them, in another order; ratios are formed within a round.
"steerlib again" is the noise floor; where other work shares the machine, ratios of processor time are the steadier. Memory is
the height of one late step above what was there before it. What is left unexplained is measured on activations
that none of them trains on, after as many tokens for each.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from benchmarks.measurement import machine

from steerlib.text import progress

OWN = ("steerlib", "steerlib again", "steerlib bf16", "encode product")
PEERS = ("sparsify", "dictionary_learning", "saelens")
SETTINGS = {"4608": (4608, 4096, 576, 32), "18432": (18432, 2048, 576, 32)}
"""Latents, batch, width, k."""


class Worker:
    """One of those measured, in its own process."""

    def __init__(self, name: str, python: str, setting: tuple[int, ...], stack: ExitStack):
        command = [python, str(Path(__file__).parent / "sae" / "contestants.py"), name, *map(str, setting), "1000000"]
        quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
        self.process = stack.enter_context(
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={**os.environ, **quiet},
            )  # fmt: skip
        )
        self.name = name

    def ask(self, **what: int) -> dict[str, float]:
        """An answer, when it comes."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("ANSWER "):
                return json.loads(line.removeprefix("ANSWER "))
        raise SystemExit(f"{self.name} ended; run scripts/sae/contestants.py by hand to see why")


def measured(setting: tuple[int, ...], names: dict[str, str], rounds: int, curve: list[int], what: str) -> dict[str, Any]:
    """Seconds of a step by round, height of memory, and unexplained variance after some steps, by name."""
    with ExitStack() as stack:
        workers = {name: Worker(name, python, setting, stack) for name, python in names.items()}
        for worker in progress(list(workers.values()), f"{what}: warming up"):
            worker.ask(steps=2)
        figures: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        order = list(names)
        for r in progress(range(rounds), f"{what}: rounds"):
            for name in order[r % len(order) :] + order[: r % len(order)]:
                figures[name].append(workers[name].ask(steps=1))
        found: dict[str, Any] = {name: {"rounds": figures[name], **workers[name].ask(peak=1)} for name in names}
        for name, worker in progress(list(workers.items()), f"{what}: loss"):
            if name not in ("encode product", "steerlib again"):
                found[name]["unexplained"] = {steps: round(after(worker, steps), 5) for steps in curve}
        for worker in workers.values():
            assert worker.process.stdin is not None
            worker.process.stdin.close()
    return found


def after(worker: Worker, steps: int) -> float:
    """What is left unexplained when so many steps are done."""
    done = int(worker.ask(test=1)["done"])
    worker.ask(steps=max(0, steps - done))
    return worker.ask(test=1)["unexplained"]


def summary(found: dict[str, Any], batch: int) -> dict[str, Any]:
    """Median, least and most of tokens per second, and of steerlib's speed over each round's others."""
    result = {}
    for name, figures in found.items():
        ratios = {
            what: [other[key] / own[key] for other, own in zip(figures["rounds"], found["steerlib"]["rounds"], strict=True)]
            for what, key in (("time over steerlib's", "seconds"), ("processor time over", "busy"))
        }
        columns = {"tokens/s": [round(batch / each["seconds"]) for each in figures["rounds"]], **ratios}
        spread = {what: [round(f(values), 3) for f in (statistics.median, min, max)] for what, values in columns.items()}
        result[name] = {**spread, "peak MiB": round(figures["peak"]), "unexplained": figures.get("unexplained", {})}
    return result


def show(title: str, rows: dict[str, Any]) -> None:
    """One row a contestant."""
    columns = [column for column in next(iter(rows.values())) if column != "unexplained"]
    print(f"\n{title}\n{'':<22}" + "".join(f"{column:>26}" for column in columns) + "   unexplained after steps")
    for name, row in rows.items():
        cells = [
            f"{c[0]:g} ({c[1]:g}–{c[2]:g})" if isinstance(c, list) else str(c) for c in (row[column] for column in columns)
        ]
        curve = ", ".join(f"{steps}: {value:.4f}" for steps, value in row["unexplained"].items())
        print(f"{name:<22}" + "".join(f"{cell:>26}" for cell in cells) + f"   {curve}")


def main(
    peers: Annotated[str, typer.Option(help="the Python of an environment with the peers")] = "",
    rounds: Annotated[int, typer.Option(help="rounds of each comparison")] = 7,
    out: Annotated[Path | None, typer.Option(help="write the figures here as JSON")] = None,
    setting: Annotated[list[str], typer.Option(help="4608 or 18432; may be repeated (default: both)")] = [],  # noqa: B006
    low: Annotated[bool, typer.Option(help="measure bfloat16 too; slow where the processor has no instructions for it")] = True,
    only: Annotated[list[str], typer.Option(help="measure these beside steerlib; may be repeated (default: all)")] = [],  # noqa: B006
    curve: Annotated[str, typer.Option(help="steps after which to measure what is left unexplained")] = "20,40,60",
) -> None:
    """Print how fast autoencoders are trained."""
    names = dict.fromkeys(OWN, sys.executable) | (dict.fromkeys((*PEERS, "sparsify autocast"), peers) if peers else {})
    names = {name: python for name, python in names.items() if low or not name.endswith(("bf16", "autocast"))}
    names = {name: python for name, python in names.items() if not only or name in ("steerlib", *only)}
    figures = {}
    for chosen in setting or SETTINGS:
        latents, batch, width, k = SETTINGS[chosen]
        steps = [int(number) for number in curve.split(",") if number]
        rows = summary(measured(SETTINGS[chosen], names, rounds, steps, chosen), batch)
        title = f"{width} -> {latents}, k {k}, batch {batch}"
        figures[title] = rows
        show(title, rows)
    if out is not None:
        about = {"machine": machine(), "torch": torch.__version__, "python": platform.python_version(), "rounds": rounds}
        out.write_text(json.dumps({**about, **figures}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
